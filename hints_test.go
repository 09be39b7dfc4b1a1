package mesh

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/meshtest"
)

// Every server hears of what runs out, and one looks: the others are told, and
// need not ask Redis. So it costs the same with six servers as with two.
func TestHintsCostTheSameWithMoreServers(t *testing.T) {
	t.Parallel()
	const entries = 20
	looks := map[int]int{}
	for _, servers := range []int{2, 6} {
		t.Run(fmt.Sprintf("servers=%d", servers), func(t *testing.T) {
			embedded(t, func(t *testing.T, w *world) {
				var log commandLog
				long := func(o *Options) { o.LeaseTTL = time.Minute }
				var living []*testServer
				for range servers {
					s := w.server(long, log.logging)
					s.track(".*", PresenceOptions{TTL: 2 * time.Second})
					living = append(living, s)
				}
				s, line := w.mortal(long)
				s.track(".*", PresenceOptions{TTL: 2 * time.Second})
				w.sleep(2 * time.Minute) // all have been in touch for one lease: they may judge
				for i := range entries {
					s.dial().join(fmt.Sprintf("room %d", i%5))
				}
				watcher := living[0].dial()
				watcher.subscribe("room 0")
				line.cut()
				before := log.sent("hget")
				w.sleep(10 * time.Second)

				require.Len(t, watcher.got(), entries/5, "leaves: %v", watcher.got())
				var acted uint64
				for _, l := range living {
					acted += l.Stats().Hints
				}
				require.EqualValues(t, entries, acted)
				looks[servers] = log.sent("hget") - before
				require.NotZero(t, looks[servers])
			})
		})
	}
	require.Equal(t, looks[2], looks[6])
}

// A note names rooms as they are, and is about nothing else.
func TestHintsForgetWhatOthersEnded(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server()
		h := s.n.hints
		waiting := func() (n int) {
			h.mu.Lock()
			defer h.mu.Unlock()
			return len(h.waiting)
		}
		h.add(expiredConn, "a room: with words", "c1")
		h.add(expiredConn, "other", "c1")
		require.Equal(t, 2, waiting())
		for _, note := range []string{"", "\n", "c", "c c1", "c c2 other\n", "s c1 other\n", "c  c1 other\n", "cc c1 other\n"} {
			s.n.Message(s.n.keys.Ended(), note)
			require.Equal(t, 2, waiting(), "%q", note)
		}
		s.n.Message(s.n.keys.Ended(), "c c9 room\nc c1 a room: with words\n")
		require.Equal(t, 1, waiting())
		w.sleep(2 * time.Second) // the other is looked after, and is nothing
		require.Zero(t, waiting())
	}, meshtest.WithoutExpiredEvents())
}

// Hints whose turn has come, and that wait for a write only, are not looked
// through all the time: there may be thousands, and the write may hang.
func TestHintsThatAwaitAWriteCostLittle(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server()
		h := newHints(s.n)
		h.put(hint{expiredConn, "room", "c1"}, 0, false)
		w.sleep(ownersTurn + hintDelay)
		require.NoError(t, s.n.store.TryWrite(t.Context(), 0))
		due, next := h.due(t.Context(), time.Now().Add(confirmed))
		require.Empty(t, due, "the newest success is too old")
		require.Equal(t, hintStep, next)
		due, _ = h.due(t.Context(), time.Now())
		require.Len(t, due, 1)
	}, meshtest.WithoutExpiredEvents())
}

// Of a batch that Redis refuses in part, the rest is ended, counted and told.
func TestHintsOfWhichOneIsRefused(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server()
		w.sleep(2 * s.n.opts.LeaseTTL) // it may judge
		c, keys := w.client(), s.n.keys
		var due []dueHint
		_, err := s.n.store.Register(t.Context(), "I", time.Hour)
		require.NoError(t, err)
		for i, room := range []string{"a", "odd", "z"} {
			op := store.Op{Kind: store.OpJoin, Room: room, Conn: "c", Entry: "E", TTL: time.Second, Left: time.Second}
			results, err := s.n.store.Commit(t.Context(), 0, "I", uint64(i+1), 0, []store.Op{op})
			require.NoError(t, err)
			require.NoError(t, results[0].Err)
			require.NoError(t, c.Del(t.Context(), keys.Conn(room, "c")).Err())
			due = append(due, dueHint{hint{expiredConn, room, "c"}, waitingHint{learned: time.Now(), bucket: 0}})
		}
		require.NoError(t, c.Del(t.Context(), keys.Seq("odd")).Err())
		require.NoError(t, c.HSet(t.Context(), keys.Seq("odd"), "not", "a position").Err())
		w.sleep(ownersTurn)
		require.NoError(t, s.n.store.TryWrite(t.Context(), 0))
		s.n.hints.act(t.Context(), due)
		require.EqualValues(t, 2, s.Stats().Hints)
		require.EqualValues(t, 1, s.Stats().HintsMissed)
	}, meshtest.WithoutExpiredEvents())
}

// A note that comes late may meet a hint about who has joined anew and run out
// since: whoever was held up after it looked says nothing.
func TestHintsAreNotToldLate(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		from, to := w.server().n.hints, w.server().n.hints
		waiting := func() (n int) {
			to.mu.Lock()
			defer to.mu.Unlock()
			return len(to.waiting)
		}
		ended := []hint{{expiredConn, "room", "c1"}}
		to.add(expiredConn, "room", "c1")
		from.tell(t.Context(), ended, time.Now().Add(-tellWithin))
		w.sleep(time.Millisecond)
		require.Equal(t, 1, waiting())
		from.tell(t.Context(), ended, time.Now().Add(time.Millisecond-tellWithin))
		w.sleep(0)
		require.Zero(t, waiting())
	}, meshtest.WithoutExpiredEvents())
}
