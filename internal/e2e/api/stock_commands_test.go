package api

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// roomNames returns n names of rooms.
func roomNames(n int) []string {
	rooms := make([]string, n)
	for i := range rooms {
		rooms[i] = fmt.Sprintf("room%d", i)
	}
	return rooms
}

func TestStockClientJoinsAndSubscribesInOneBurst(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		c := s.Stock("")
		var calls []*harness.StockCall
		rooms := roomNames(90)
		for _, room := range rooms {
			calls = append(calls, c.JoinRoom(room))
		}
		for _, room := range rooms {
			calls = append(calls, c.SubscribePresence(room))
		}
		c.AllOK(calls...)
		conn, ok := s.Connection(c.ID)
		require.True(t, ok)
		assert.Len(t, conn.Rooms(), 90)
		assert.Equal(t, 90, s.Stats().Subscriptions)
	})
}

func TestStockClientReconnectsIntoAllOfItsRooms(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		c := s.Stock("")
		var calls []*harness.StockCall
		for _, room := range roomNames(95) {
			calls = append(calls, c.JoinRoom(room), c.SubscribePresence(room))
		}
		c.AllOK(calls...)
		before := c.ID
		joins, subscribes := c.Reconnect()
		c.AllOK(slices.Concat(joins, subscribes)...)
		require.NotEqual(t, before, c.ID)
		conn, ok := s.Connection(c.ID)
		require.True(t, ok)
		assert.Len(t, conn.Rooms(), 95)
		for _, room := range roomNames(95) {
			w.Eventually(10*time.Second, func() bool {
				ids, err := s.Rooms().ConnectionIDs(t.Context(), room)
				return err == nil && slices.Equal(ids, []string{c.ID})
			}, "%s: only the new connection is a member", room)
		}
	})
}

func TestStockClientAsksForMetadataInOneBurst(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, other := w.Tracked(), w.Tracked()
		c := s.Stock("")
		var ids []string
		for i := range 101 {
			id := fmt.Sprintf("member%d", i)
			ids = append(ids, id)
			require.NoError(t, other.Presence().Connect(t.Context(), id, map[string]any{"n": i}))
			require.NoError(t, other.Presence().Join(t.Context(), "lobby", id))
		}
		// The clients' common room is joined in the same burst.
		join := c.JoinRoom("lobby")
		var calls []*harness.StockCall
		for _, id := range ids {
			calls = append(calls, c.Send("mesh/get-connection-metadata", "", map[string]any{"connectionId": id}))
		}
		c.AllOK(join)
		for i, a := range c.WaitAll(calls...) {
			assert.JSONEq(t, fmt.Sprintf(`{"metadata":{"n":%d}}`, i), string(a.Payload))
		}
	})
}

func TestStockClientSendsManyCommandsOfTheApp(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		var running, most atomic.Int64
		require.NoError(t, s.HandleCommand("work", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
			n := running.Add(1)
			defer running.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(10 * time.Millisecond)
			return true, nil
		}))
		c := s.Stock("")
		var calls []*harness.StockCall
		for range 300 {
			calls = append(calls, c.Send("work", "", nil))
		}
		c.AllOK(c.Room("mesh/join-room", "lobby"))
		c.AllOK(calls...)
		assert.EqualValues(t, 8, most.Load(), "HandlerConcurrency")
		assert.Positive(t, s.Stats().Delayed, "300 are more than twice the rate")
	})
}

func TestRoomsOfAConnectionDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.SlowGuards()
		c := s.Stock("")
		begun := time.Now()
		hangs := c.JoinRoom("hangs")
		behind := c.Room("mesh/leave-room", "hangs")
		var calls []*harness.StockCall
		for _, room := range roomNames(20) {
			calls = append(calls, c.JoinRoom(room))
		}
		c.AllOK(calls...)
		assert.LessOrEqual(t, time.Since(begun), 300*time.Millisecond)
		c.AllOK(c.Send("mesh/noop", "", nil), c.Room("mesh/leave-room", "room3"))
		assert.LessOrEqual(t, time.Since(begun), 300*time.Millisecond)
		assert.Empty(t, behind.Done, "commands about the same room wait")
		assert.False(t, c.Wait(hangs).Ok())
		c.AllOK(behind)
		assert.InDelta(t, 5, time.Since(begun).Seconds(), 0.1, "until the time limit of the guard")
	})
}

// The guards hang for all rooms but the last one that a connection may be in. That room
// does not wait.
func TestManyRoomsThatHang(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		hang := func(ctx context.Context, _ mesh.Member, _ string) (bool, error) {
			<-ctx.Done()
			return false, nil
		}
		s.Track("^room", mesh.PresenceOptions{Guard: hang, JoinGuard: hang})
		s.Track("^fine", mesh.PresenceOptions{})
		c := s.Stock("")
		for _, room := range roomNames(99) {
			c.JoinRoom(room)
		}
		begun := time.Now()
		c.AllOK(c.JoinRoom("fine"), c.SubscribePresence("fine"), c.Publish("fine", map[string]any{"a": 1}))
		assert.Zero(t, time.Since(begun))
	})
}

func TestCommandsOfARoomStayInOrder(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.NoCommandLimit)
		watcher, c := s.Dial(), s.Stock("")
		rooms := roomNames(5)
		for _, room := range rooms {
			watcher.Subscribe(room)
		}
		var calls []*harness.StockCall
		const rounds = 10
		for i := range rounds {
			for _, room := range rooms {
				calls = append(calls, c.Room("mesh/join-room", room), c.Publish(room, map[string]any{"i": i}), c.Publish(room, map[string]any{"j": i}),
					c.Room("mesh/clear-presence-state", room), c.Room("mesh/leave-room", room))
			}
		}
		c.AllOK(calls...)
		w.Eventually(10*time.Second, func() bool { return len(watcher.Got()) >= 5*rounds*len(rooms) }, "all updates arrive")
		got := map[string][]string{}
		for _, u := range watcher.Got() {
			got[u.RoomName] = append(got[u.RoomName], u.Type+" "+string(u.State))
		}
		var want []string
		for i := range rounds {
			want = append(want, "join ", fmt.Sprintf(`state {"i":%d}`, i), fmt.Sprintf(`state {"j":%d}`, i), "state null", "leave ")
		}
		for _, room := range rooms {
			assert.Equal(t, want, got[room])
		}
	})
}

// Commands after a change of the metadata wait for it, whatever they are about.
// Commands before a change of rooms take effect before it.
func TestCommandsTakeEffectInSequence(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.Limits(func(l *mesh.Limits) { l.RoomsPerConnection = 2 }), func(o *mesh.Options) {
			o.ClientMetadata = func(_ context.Context, _ mesh.Member, proposed json.RawMessage) (any, error) {
				time.Sleep(50 * time.Millisecond)
				return proposed, nil
			}
		})
		second := func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			return string(m.Metadata) == `{"n":2}`, nil
		}
		s.Track(".*", mesh.PresenceOptions{})
		s.Track("^second", mesh.PresenceOptions{Guard: second, JoinGuard: second})
		require.NoError(t, s.HandleCommand("mine", func(_ context.Context, c *mesh.Connection, _ json.RawMessage) (any, error) {
			return c.Member().Metadata, nil
		}))
		c := s.Stock("")
		mine := func() *harness.StockCall { return c.Send("mesh/get-my-connection-metadata", "", nil) }
		set := func(n int) *harness.StockCall {
			return c.Send("mesh/set-my-connection-metadata", "", map[string]any{"metadata": map[string]any{"n": n}})
		}
		begun := time.Now()
		answers := c.WaitAll(mine(), set(1), mine(), c.JoinRoom("second1"), set(2), mine(), c.JoinRoom("second2"), c.Send("mine", "", nil))
		var got []string
		for _, a := range answers {
			got = append(got, string(a.Payload))
		}
		assert.Equal(t, []string{`{"metadata":null}`, `{"success":true}`, `{"metadata":{"n":1}}`}, got[:3])
		assert.Contains(t, got[3], `"success":false`)
		assert.Equal(t, []string{`{"success":true}`, `{"metadata":{"n":2}}`}, got[4:6])
		assert.Contains(t, got[6], `"success":true`)
		assert.Equal(t, `{"n":2}`, got[7])
		assert.Equal(t, 100*time.Millisecond, time.Since(begun))

		// At the limit of rooms, leaving a room makes space for the next one.
		c.AllOK(c.JoinRoom("a"))
		for _, move := range [][2]string{{"a", "b"}, {"b", "c"}, {"second2", "a"}} {
			c.AllOK(c.Room("mesh/leave-room", move[0]), c.Room("mesh/join-room", move[1]))
		}
		require.Equal(t, "ELIMIT", c.Wait(c.Room("mesh/join-room", "x")).Code())
	})
}

// The number of waiting commands is limited. At the limit the connection is not read,
// and it counts as alive, although its pongs are unread.
func TestAClientWhoseCommandsWaitIsAlive(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.NoCommandLimit, func(o *mesh.Options) { o.PingInterval = 500 * time.Millisecond }, harness.Limits(func(l *mesh.Limits) { l.QueueBytes = 8 << 10 }))
		s.Track(".*", mesh.PresenceOptions{TTL: time.Second})
		s.Track("^hangs$", mesh.PresenceOptions{Guard: func(ctx context.Context, _ mesh.Member, _ string) (bool, error) {
			<-ctx.Done()
			return false, ctx.Err()
		}})
		watcher, r := s.Dial(), s.Raw()
		watcher.Subscribe("lobby")
		r.Send(`{"id":1,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
		r.Next()
		const n = 30
		go func() { // ends when the server has read all messages
			for range n {
				_ = r.WS.WriteMessage(websocket.TextMessage, []byte(`{"id":2,"command":"mesh/get-presence-state","payload":{"roomName":"hangs"}}`))
			}
		}()
		begun := time.Now()
		for answered := 0; answered < n; {
			if strings.HasPrefix(r.Next(), `{"id":2,`) {
				answered++
			}
		}
		assert.GreaterOrEqual(t, time.Since(begun), 5*time.Second, "the time limit of the guard")
		assert.Positive(t, s.Stats().ReadsPaused)
		assert.Zero(t, watcher.Count("leave", ""))
		watcher.Expect(1200*time.Millisecond, "leave", r.ID) // it has never answered a ping
	})
}

// A client that does not read its answers is not closed because of their size. Their
// memory is limited, also that of answers while Redis is away.
func TestUnreadAnswersDoNotCloseAConnection(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "megabytes of answers")
	for name, away := range map[string]bool{"": false, "away": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) { answersNotRead(t, w, away) })
		})
	}
}

func answersNotRead(t *testing.T, w *harness.World, away bool) {
	const queue = 64 << 10
	s := w.Tracked(harness.NoCommandLimit, harness.Limits(func(l *mesh.Limits) { l.QueueBytes = queue }), func(o *mesh.Options) { o.WriteTimeout = time.Hour })
	rooms := roomNames(60)
	for i := range 30 {
		id := fmt.Sprintf("member%d", i)
		require.NoError(t, s.Presence().Connect(t.Context(), id, strings.Repeat("x", 1000)))
		for _, room := range rooms {
			require.NoError(t, s.Presence().Join(t.Context(), room, id))
		}
	}
	r := s.Raw()
	c, ok := s.Connection(r.ID)
	require.True(t, ok)
	if away {
		w.Sleep(time.Second)
		w.Away()
		w.Sleep(6 * time.Second)
	}
	n := 0
	for _, command := range []string{"join-room", "subscribe-presence", "get-presence-state"} {
		for _, room := range rooms {
			n++
			r.Send(fmt.Sprintf(`{"id":%d,"command":"mesh/%s","payload":{"roomName":%q}}`, n, command, room))
		}
	}
	w.Sleep(5 * time.Second)
	assert.Positive(t, testhook.QueueBytes(c))
	assert.LessOrEqual(t, testhook.QueueBytes(c), 5*queue)
	for answered := 0; answered < n; {
		if strings.HasPrefix(r.Next(), `{"id":`) {
			answered++
		}
		assert.LessOrEqual(t, testhook.QueueBytes(c), 5*queue)
	}
	assert.Zero(t, s.Stats().Closed["slow"])
	if away {
		w.Back()
	}
}

func TestFloodOfCommands(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.CommandsPerSecond = 5 }))
		c, other := s.Stock(""), s.Dial()
		var calls []*harness.StockCall
		for range 101 {
			calls = append(calls, c.Send("mesh/noop", "", nil))
		}
		assert.Equal(t, "ELIMIT", c.Wait(calls[100]).Code())
		<-c.Client.Done()
		assert.EqualValues(t, 1, s.Stats().Closed["flood"])
		assert.EqualValues(t, 1, s.Stats().Limited)
		assert.Equal(t, "true", string(other.Call("mesh/noop", nil)))
		assert.Equal(t, websocket.ClosePolicyViolation, c.Client.AwaitClose().Code)
	})
}
