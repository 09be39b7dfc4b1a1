package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// A client that reconnects while Redis is away, and renews 90 rooms in one burst, does
// not wait for one room after the other.
func TestStockBurstWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	for name, wait := range map[string]time.Duration{"unknown": 0, "known": 6 * time.Second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s, far := w.Tracked(), w.Tracked()
				c, mirrors := s.Stock(""), s.Dial()
				room := func(i int) string { return fmt.Sprintf("room-%02d", i) }
				for i := range 45 { // the other rooms have no mirror on this server
					mirrors.Subscribe(room(i))
				}
				w.Sleep(3 * time.Second)
				w.Away()
				w.Sleep(wait)
				var joins, subscribes, reads []*harness.StockCall
				for i := range 15 {
					reads = append(reads, c.Room("mesh/get-presence-state", fmt.Sprint("other-", i)))
				}
				for i := range 90 {
					joins, subscribes = append(joins, c.JoinRoom(room(i))), append(subscribes, c.SubscribePresence(room(i)))
				}
				limit := 2*testhook.LimitsOf().Away + 50*time.Millisecond
				if wait == 0 {
					limit += testhook.LimitsOf().Call
				}
				first := make([]harness.View, 90)
				for i := range 90 {
					require.Equal(t, []string{c.ID}, c.StaleOK(joins[i]).IDs(t))
					first[i] = c.ViewOf(subscribes[i])
					require.True(t, first[i].Success)
					require.Equal(t, wait > 0 || i >= 45, first[i].Stale, "a mirror that is up to date is not stale")
				}
				for _, a := range c.WaitAll(slices.Concat(joins, subscribes, reads)...) {
					require.LessOrEqual(t, a.Took, limit, "%s", a.Room)
				}
				for _, call := range reads {
					require.Equal(t, "EUNAVAILABLE", c.Wait(call).Code())
				}
				w.Back()
				w.Sleep(10 * time.Second)
				for i := range 90 {
					require.Equal(t, harness.MemberStates{c.ID: ""}, c.Sees(first[i], room(i)), room(i))
					require.Equal(t, 1, c.JoinsOf(first[i], room(i), c.ID), room(i))
					members, err := far.InRedis(room(i))
					require.NoError(t, err)
					require.Contains(t, members, c.ID)
				}
			})
		})
	}
}

// Stale answers are queued like others. If a client does not read them, their memory is
// limited, and none is lost.
func TestUnreadStaleAnswers(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "megabytes of answers")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		const limit, rooms = 64 << 10, 40
		s := w.Tracked(func(o *mesh.Options) {
			o.Limits.QueueBytes = limit
			o.Authenticate = func(context.Context, *http.Request) (any, error) { return strings.Repeat("x", 8<<10), nil }
		})
		for range 5 {
			p := s.Dial()
			for i := range rooms {
				p.Join(fmt.Sprint(i))
			}
		}
		r := s.Raw()
		w.Sleep(3 * time.Second)
		w.Away()
		w.Sleep(6 * time.Second)
		for i := range rooms {
			r.Send(fmt.Sprintf(`{"id":%d,"command":"mesh/join-room","payload":{"roomName":"%d"}}`, i+1, i))
		}
		w.Sleep(2 * time.Second)
		require.LessOrEqual(t, s.Stats().LongestQueue, int64(4*limit))
		for range rooms {
			var f harness.Frame
			require.NoError(t, json.Unmarshal([]byte(r.Next()), &f))
			var v harness.View
			require.NoError(t, json.Unmarshal(f.Payload, &v))
			require.True(t, v.Success && v.Stale)
			require.Len(t, v.IDs(t), 6)
		}
		w.Back()
		w.Sleep(5 * time.Second)
	})
}

// A stale answer lists no more members than the limit, and reports the number of known
// members. The connection itself is listed, whether or not the mirror has it.
func TestStaleAnswersAreLimited(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.Limits.SnapshotMembers = 2 })
		a, b, c := s.Dial(), s.Dial(), s.Stock("")
		for _, room := range []string{"mirrored", "unknown"} {
			a.Join(room)
			b.Join(room)
		}
		a.Subscribe("mirrored")
		w.Sleep(3 * time.Second)
		w.Away()
		w.Sleep(6 * time.Second)
		for _, room := range []string{"mirrored", "unknown"} {
			joined := c.StaleOK(c.JoinRoom(room))
			require.Len(t, joined.IDs(t), 2)
			require.Contains(t, joined.IDs(t), c.ID)
			require.Equal(t, 3, joined.Total, room)
		}
		first := c.StaleOK(c.SubscribePresence("unknown"))
		require.Empty(t, first.IDs(t))
		w.Back()
		w.Sleep(5 * time.Second)
		// The room is read before or after the join of c is written. If it is read before,
		// the join follows as an update.
		listed := slices.DeleteFunc(c.Got("unknown"), func(u harness.Update) bool { return u.ConnectionID == c.ID })
		require.LessOrEqual(t, len(listed), 2, "the limit of an answer: %v", listed)
		require.GreaterOrEqual(t, len(c.Got("unknown")), 2)
	})
}

// A client with a limit of one room can leave it and join the next one.
func TestNextRoomWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.Limits.RoomsPerConnection = 1 })
		c := s.Stock("")
		require.True(t, c.Wait(c.JoinRoom("first")).Ok())
		w.Sleep(3 * time.Second)
		w.Away()
		w.Sleep(6 * time.Second)
		require.Equal(t, "ELIMIT", c.Wait(c.JoinRoom("second")).Code())
		for _, room := range []string{"second", "third"} {
			c.Wait(c.Room("mesh/leave-room", c.Rooms[0]))
			c.Rooms[0] = room
			require.Equal(t, []string{c.ID}, c.StaleOK(c.Room("mesh/join-room", room)).IDs(t))
		}
		w.Back()
		w.Sleep(5 * time.Second)
		for room, in := range map[string]bool{"first": false, "second": false, "third": true} {
			members, err := s.InRedis(room)
			require.NoError(t, err)
			require.Equal(t, in, len(members) == 1, room)
		}
	})
}
