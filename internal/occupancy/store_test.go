package occupancy

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/channels"
	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/meshtest"
)

// realRig is Rooms over a store and a listener on the embedded Redis. Beside them a second
// part follows the same rooms.
type realRig struct {
	*testing.T
	*Rooms
	store *store.Store
	keys  keys.Space
	mux   *channels.Mux
	batch uint64
}

// prefixed converts names of rooms to names of channels.
type prefixed struct {
	to     *store.Listener
	prefix string
}

func (p prefixed) Add(room string)    { p.to.Add(p.prefix + room) }
func (p prefixed) Remove(room string) { p.to.Remove(p.prefix + room) }

// Message implements store.Handler.
func (r *realRig) Message(channel, payload string) {
	r.mux.HandleEvent(strings.TrimPrefix(channel, r.keys.EventsPrefix()), payload)
}

// Subscribed implements store.Handler.
func (r *realRig) Subscribed(channel string, again bool) {
	r.mux.HandleSubscribed(strings.TrimPrefix(channel, r.keys.EventsPrefix()), again)
}

// Disconnected implements store.Handler.
func (r *realRig) Disconnected() { r.mux.HandleDisconnect() }

// eventCount is a part that counts the events that it gets.
type eventCount struct {
	mu     sync.Mutex
	events map[string]int
}

func (c *eventCount) HandleSubscribed(string, bool) {}
func (c *eventCount) HandleDisconnect()             {}
func (c *eventCount) HandleEvent(room, _ string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events[room]++
}

func (c *eventCount) of(room string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.events[room]
}

func newRealRig(t *testing.T) (*realRig, *channels.Share, *eventCount) {
	t.Helper()
	redis := meshtest.StartRedis(t)
	space := keys.Space{Prefix: keys.DefaultPrefix}
	r := &realRig{T: t, store: store.New(redis.Client(), space), keys: space}
	r.store.CountUsers()
	l := store.NewListener(store.ListenerConfig{Client: redis.Client(), Handler: r})
	var late sync.WaitGroup
	r.mux = channels.New(prefixed{l, space.EventsPrefix()}, late.Go)
	share, other := r.mux.NewShare(), r.mux.NewShare()
	wheel := clock.NewWheel(step)
	r.Rooms = New(Config{Store: r.store, Listener: share, Wheel: wheel, Bucket: space.RoomBucket})
	share.Connect(r.Rooms)
	count := &eventCount{events: map[string]int{}}
	other.Connect(count)
	wheel.Start()
	l.Start()
	t.Cleanup(func() {
		l.Stop()
		r.Stop()
		wheel.Stop()
		late.Wait()
	})
	return r, other, count
}

// commit writes ops as the next batch.
func (r *realRig) commit(ops ...store.Op) {
	r.Helper()
	r.batch++
	results, err := r.store.Commit(r.Context(), 0, "I", r.batch, 0, ops)
	require.NoError(r, err)
	for _, result := range results {
		require.NoError(r, result.Err)
	}
}

// listed returns the numbers and the position of a room as text, from its list of members.
func (r *realRig) listed(room string) string {
	r.Helper()
	snap, err := r.store.Snapshot(r.Context(), room)
	require.NoError(r, err)
	users, alone := map[string]bool{}, 0
	for _, record := range snap.Records {
		if record.User == "" {
			alone++
		} else {
			users[record.User] = true
		}
	}
	return fmt.Sprint(len(snap.Records), "/", alone+len(users), " at ", snap.Position.Epoch, " ", snap.Position.Seq)
}

func positionText(u *Update) string {
	return fmt.Sprint(u.Connections, "/", u.Users, " at ", u.Epoch, " ", u.Seq)
}

// waitFor is a watcher that keeps the last update.
type waitFor struct {
	mu   sync.Mutex
	last *Update
	got  int
}

func (w *waitFor) Deliver(u *Update) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = u
	w.got++
}

// On a Redis, at each position that is shown the numbers are those of the list.
func TestNumbersAreThoseOfTheList(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, other, count := newRealRig(t)
		other.Add("r")
		w := &waitFor{}
		results := r.Watch(t.Context(), w, []string{"r", "none"})
		require.NoError(t, results[0].Err)
		require.Equal(t, "0/0 at  0", positionText(results[1].Update))

		rnd := rand.New(rand.NewPCG(1, 1))
		entries := map[string]string{}
		for i := range 60 {
			conn := fmt.Sprint("c", rnd.IntN(8))
			op := store.Op{Kind: store.OpJoin, Room: "r", Conn: conn, Entry: fmt.Sprint("e", i), User: []string{"", "ann", "bob"}[rnd.IntN(3)]}
			if entry := entries[conn]; entry != "" {
				op = store.Op{Kind: store.OpLeave, Room: "r", Conn: conn, Entry: entry, Cause: store.CauseLeft}
				delete(entries, conn)
			} else {
				entries[conn] = op.Entry
			}
			r.commit(op)
			time.Sleep(2500 * time.Millisecond)
			synctest.Wait()
			w.mu.Lock()
			last := w.last
			w.mu.Unlock()
			if last != nil && last.Seq == uint64(i+1) {
				require.Equal(t, r.listed("r"), positionText(last), "step %d", i)
			}
			require.False(t, last != nil && last.Stale)
		}
		require.Greater(t, w.got, 30)
		require.Equal(t, 60, count.of("r"), "the other part gets every event")

		require.Equal(t, 2, r.Unwatch(w, "r", "none"))
		time.Sleep(time.Minute)
		require.Empty(t, r.Rooms.Rooms())
		r.commit(store.Op{Kind: store.OpJoin, Room: "r", Conn: "last", Entry: "last"})
		time.Sleep(time.Second)
		assert.Equal(t, 61, count.of("r"), "the channel is still the other part's")
	})
}

// A reading of a room that lacks data is uncertain.
func TestReadingOf(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r, _, _ := newRealRig(t)
		read := func() Reading {
			o, err := r.store.Occupancy(t.Context(), "r")
			require.NoError(t, err)
			return ReadingOf(&o[0])
		}
		require.Equal(t, Reading{}, read())
		r.commit(
			store.Op{Kind: store.OpJoin, Room: "r", Conn: "a", Entry: "a", User: "ann"},
			store.Op{Kind: store.OpJoin, Room: "r", Conn: "b", Entry: "b", User: "ann"},
		)
		got := read()
		require.Equal(t, []any{2, 1, false}, []any{got.Connections, got.Users, got.Rebuilding})
	})
	lost := &store.Occupancy{Numbers: store.Numbers{Connections: 1, Users: 1}, Incomplete: true}
	require.True(t, ReadingOf(lost).Rebuilding)
	uncounted := &store.Occupancy{Numbers: store.Numbers{Connections: 3, Users: -1}}
	require.Equal(t, Reading{Connections: 3, Users: 3, Rebuilding: true}, ReadingOf(uncounted))
	rebuilding := &store.Occupancy{Numbers: store.Numbers{Connections: 3, Users: 2, Rebuilding: true}}
	require.Equal(t, Reading{Connections: 3, Users: 2, Rebuilding: true}, ReadingOf(rebuilding))
}
