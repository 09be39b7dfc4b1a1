package local

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

func TestConnectionFromConnectToClose(t *testing.T) {
	virtual(t, func(r *rig) {
		c, err := r.Connect("a", []byte(`1`), nil, func() {})
		require.NoError(r, err)
		require.NoError(r, c.Registered(r.Context()))
		assert.Equal(r, store.MetaValue{Version: 1, Data: []byte(`1`), Owner: "I1"}, r.redis.conns["a"])

		j := r.join(c, "x")
		assert.Equal(r, Joined{Position: store.Position{Epoch: "E", Seq: 1, Tag: "1"}, Total: 1, Users: 1}, j)
		assert.True(r, r.join(c, "x").Again)
		h, _ := r.storedEntry("x", "a")
		assert.Equal(r, "1", h.meta)
		assert.EqualValues(r, 1, r.wrote["x"])
		r.publish(c, "x", "s1", 0)
		r.publish(c, "x", "s2", 0)
		c.SetMeta(5, []byte(`5`))
		c.SetMeta(4, []byte(`4`))
		require.NoError(r, c.Flush(r.Context()))
		h, _ = r.storedEntry("x", "a")
		assert.Equal(r, "5", h.meta)
		assert.Equal(r, "s2", h.state)
		meta, version := c.Metadata()
		assert.Equal(r, "5", string(meta))
		assert.EqualValues(r, 5, version)
		require.NoError(r, c.ClearState(r.Context(), "x"))
		assert.True(r, c.In("x"))
		assert.Equal(r, []string{"x"}, c.Rooms())
		assert.Len(r, r.InRoom("x"), 1)
		r.atRest()

		r.leave(c, "x")
		was, err := c.Leave(r.Context(), "x", store.CauseLeft)
		require.NoError(r, err)
		assert.False(r, was)
		require.ErrorIs(r, c.PublishState(r.Context(), "x", []byte("s"), 0, false), ErrNotPresent)
		assert.Equal(r, []string{"J a/x", "S a/x s1", "S a/x s2", "M a/x", "S a/x", "L a/x l"}, r.told())
		assert.Empty(r, r.InRoom("x"))
		assert.Equal(r, 1, r.metas)

		r.join(c, "x")
		r.join(c, "y")
		c.Close(store.CauseClosed, false)
		c.Close(store.CauseLeft, false)
		<-c.Gone()
		_, err = c.Join(r.Context(), "z")
		require.ErrorIs(r, err, ErrClosed)
		assert.Equal(r, "J a/x", r.told()[6])
		assert.ElementsMatch(r, []string{"L a/x c", "L a/y c"}, r.told()[8:])
		s := r.Stats()
		assert.EqualValues(r, 1, s.LeftAsked)
		assert.EqualValues(r, 2, s.LeftClosed)
		r.nothingLeft()
	})
}

func TestRedisAway(t *testing.T) {
	virtual(t, func(r *rig) {
		in := r.connect("in")
		r.join(in, "x")
		r.join(in, "z")
		r.forgetTold()
		r.away()
		began := time.Now()
		var wg sync.WaitGroup
		for _, f := range []func() error{
			func() error { _, err := in.Join(r.Context(), "y"); return err },
			func() error { _, err := in.Leave(r.Context(), "x", store.CauseLeft); return err },
			func() error { return in.PublishState(r.Context(), "z", []byte("s"), 0, false) },
			func() error { return r.connect("late").Registered(r.Context()) },
			func() error { time.Sleep(10 * time.Millisecond); return in.Flush(r.Context()) },
			func() error {
				ctx, cancel := context.WithTimeout(r.Context(), 100*time.Millisecond)
				defer cancel()
				_, err := in.Join(ctx, "w")
				assert.ErrorIs(r, err, context.DeadlineExceeded)
				return err
			},
		} {
			wg.Go(func() { assert.ErrorIs(r, f(), ErrUnavailable) })
		}
		wg.Wait()
		assert.Less(r, time.Since(began), 2*time.Second)
		r.sleep(time.Minute)
		assert.Empty(r, r.told())
		assert.LessOrEqual(r, r.calls(), 60*6, "it backs off")

		r.heal()
		r.sleep(time.Second + 100*time.Millisecond)
		assert.ElementsMatch(r, []string{"J in/y", "J in/w", "L in/x l", "S in/z s"}, r.told())
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

func TestLeaveWhileTheJoinIsInFlight(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		require.NoError(r, c.Registered(r.Context()))
		r.plan(func(int, []store.Op) fault { return fault{before: 50 * time.Millisecond, after: 50 * time.Millisecond} })
		var wg sync.WaitGroup
		wg.Go(func() { _, err := c.Join(r.Context(), "x"); assert.NoError(r, err) })
		r.sleep(10 * time.Millisecond)
		r.leave(c, "x")
		wg.Wait()
		assert.Equal(r, []string{"J a/x", "L a/x l"}, r.told())

		// The last of in, out, in, out, in counts.
		for range 2 {
			wg.Go(func() { _, err := c.Join(r.Context(), "x"); assert.NoError(r, err) })
			r.sleep(time.Millisecond)
			wg.Go(func() { r.leave(c, "x") })
			r.sleep(time.Millisecond)
		}
		wg.Go(func() { r.join(c, "x") })
		wg.Wait()
		r.atRest()
		_, ok := r.storedEntry("x", "a")
		assert.True(r, ok)
		requireLegal(r, r.redis.events)
	})
}

// After NotIn has reported that a connection has left a room, no event of it follows.
func TestNotInWaitsForTheLeave(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		require.NoError(r, c.Registered(r.Context()))
		assert.Equal(r, []string{"a", "b"}, r.NotIn("x", []string{"a", "b"}), "b does not exist")
		r.plan(func(int, []store.Op) fault { return fault{before: 50 * time.Millisecond} })
		var wg sync.WaitGroup
		wg.Go(func() { _, err := c.Join(r.Context(), "x"); assert.NoError(r, err) })
		r.sleep(10 * time.Millisecond)
		assert.Empty(r, r.NotIn("x", []string{"a"}), "it may get there")
		wg.Go(func() { r.leave(c, "x") })
		r.sleep(10 * time.Millisecond)
		assert.Empty(r, r.NotIn("x", []string{"a"}), "its join may run, and the leave comes after that")
		wg.Wait()
		r.sleep(time.Millisecond)
		assert.Equal(r, []string{"a"}, r.NotIn("x", []string{"a"}))
		r.join(c, "x")
		c.Close(store.CauseClosed, false)
		assert.Empty(r, r.NotIn("x", []string{"a"}), "its end is not written")
		<-c.Gone()
		assert.Equal(r, []string{"a"}, r.NotIn("x", []string{"a"}))
	})
}

// A refusal of one op does not affect the others, and the op is tried again.
func TestSingleOpRefused(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.refuse(func(op store.Op) bool { return op.Room == "bad" || op.Conn == "bad" })
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := c.Join(r.Context(), "bad")
			assert.ErrorIs(r, err, ErrUnavailable)
			assert.ErrorIs(r, err, errRefused, "and says why")
		})
		bad := r.connect("bad")
		r.join(c, "good")
		wg.Wait()
		r.sleep(10 * time.Second)
		assert.LessOrEqual(r, r.calls(), 30)
		r.heal()
		require.NoError(r, bad.Registered(r.Context()))
		r.sleep(1100 * time.Millisecond)
		_, ok := r.storedEntry("bad", "a")
		assert.True(r, ok)
		r.atRest()

		r.refuse(func(op store.Op) bool { return op.Kind == store.OpLeave || op.Kind == store.OpDisconnect })
		c.Close(store.CauseClosed, false)
		bad.Close(store.CauseClosed, false)
		r.sleep(5 * time.Second)
		r.heal()
		<-c.Gone()
		<-bad.Gone()
		r.nothingLeft()
	})
}

func TestConnectTheSameIDWhileItCloses(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		_, err := r.Connect("a", nil, nil, func() { r.Error("known") })
		require.ErrorIs(r, err, ErrExists)
		assert.NotNil(r, r.Closing("a"))
		assert.Nil(r, r.Closing("b"))
		r.plan(func(int, []store.Op) fault { return fault{before: 100 * time.Millisecond} })
		c.Close(store.CauseClosed, false)
		_, ok := r.Conn("a")
		assert.False(r, ok)
		_, err = r.Connect("a", nil, nil, func() {})
		require.ErrorIs(r, err, ErrExists, "the old one is still in Redis")
		<-r.Closing("a")
		again := r.connect("a")
		r.join(again, "x")
		assert.Equal(r, []string{"J a/x", "L a/x c", "J a/x"}, r.told())
		got, _ := r.Conn("a")
		assert.Same(r, again, got)
		r.atRest()
	})
}

func TestTooManyRooms(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.join(c, "y")
		_, err := c.Join(r.Context(), "z")
		require.ErrorIs(r, err, ErrTooMany)
		r.join(c, "x")
		r.leave(c, "x")
		r.join(c, "z")
		assert.Equal(r, []string{"y", "z"}, c.Rooms())
	}, func(cfg *Config) { cfg.MaxRooms = 2 })
}

func TestDrain(t *testing.T) {
	virtual(t, func(r *rig) {
		for i := range 50 {
			c := r.connect(fmt.Sprint(i))
			r.join(c, "x")
			r.join(c, "y")
		}
		r.away()
		ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
		defer cancel()
		require.ErrorIs(r, r.Drain(ctx, store.CauseClosed, false), context.DeadlineExceeded)
		_, err := r.Connect("late", nil, nil, func() {})
		require.ErrorIs(r, err, ErrClosed)
		r.heal()
		r.drain()
		r.nothingLeft()
		assert.EqualValues(r, 100, r.Stats().LeftClosed)
	})
}

// Stop ends everything that runs, even with unwritten changes and a Redis that hangs.
func TestStop(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.plan(func(int, []store.Op) fault { return fault{before: time.Hour} })
		done := make(chan error, 1)
		go func() { done <- c.PublishState(r.Context(), "x", []byte("s"), 0, false) }()
		r.sleep(10 * time.Millisecond)
		began := time.Now()
		r.Stop()
		assert.Zero(r, time.Since(began))
		require.ErrorIs(r, <-done, ErrUnavailable)
		_, err := c.Join(r.Context(), "y")
		require.ErrorIs(r, err, ErrUnavailable)
		r.Heartbeat(0, true)
		r.Stop()
		r.rule("x", time.Second)
		r.ApplyRules(r.Rooms())
		c.Close(store.CauseClosed, false)
		synctest.Wait()
		_, err = r.Connect("b", nil, nil, func() {})
		require.ErrorIs(r, err, ErrClosed)
	})
}

// Two servers have the same connection id. The later one owns it.
func TestOwnedByAnotherServer(t *testing.T) {
	for _, endSilent := range []bool{true, false} {
		t.Run(fmt.Sprint(endSilent), func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.rule("x", 10*time.Second)
				c := r.connect("a")
				r.join(c, "x")
				if !endSilent {
					r.sleep(20 * time.Second) // it has lapsed
				}
				r.redis.do(func() {
					r.redis.execute(ownerKey{0, "other"}, store.Op{Kind: store.OpJoin, Room: "x", Conn: "a", Entry: "theirs"})
				})
				require.ErrorIs(r, c.PublishState(r.Context(), "x", []byte("s"), 0, false), ErrOwnedElsewhere)
				assert.False(r, c.In("x"))
				h, _ := r.storedEntry("x", "a")
				assert.Equal(r, "theirs", h.entry)
				synctest.Wait()
				assert.Zero(r, c.frameWaiters.Load())
				assert.Zero(r, r.wheel.Armed())
				c.Close(store.CauseClosed, false)
				<-c.Gone()
				h, _ = r.storedEntry("x", "a")
				assert.Equal(r, "theirs", h.entry)
			}, func(cfg *Config) { cfg.EndSilent = endSilent })
		})
	}
}

// After Redis lost everything, a late batch may bring back an earlier entry of the
// connection. It does not belong to another server.
func TestOwnOlderEntryComesBack(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.redis.do(func() {
			r.redis.execute(ownerKey{0, "I1"}, store.Op{Kind: store.OpJoin, Room: "x", Conn: "a", Entry: "older"})
		})
		r.publish(c, "x", "s", 0)
		assert.True(r, c.In("x"))
		h, _ := r.storedEntry("x", "a")
		assert.Equal(r, "s", h.state)
		assert.NotEqual(r, "older", h.entry)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}
