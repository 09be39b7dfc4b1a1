package owner

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

func TestLifeOfAConnection(t *testing.T) {
	virtual(t, func(r *rig) {
		c, err := r.Connect("a", []byte(`1`), nil, func() {})
		require.NoError(r, err)
		require.NoError(r, c.Registered(r.Context()))
		assert.Equal(r, store.MetaValue{Version: 1, Data: []byte(`1`), Owner: "I1"}, r.redis.conns["a"])

		j := r.join(c, "x")
		assert.Equal(r, Joined{Position: store.Position{Epoch: "E", Seq: 1, Tag: "1"}, Total: 1}, j)
		assert.True(r, r.join(c, "x").Again)
		h, _ := r.held("x", "a")
		assert.Equal(r, "1", h.meta)
		assert.EqualValues(r, 1, r.wrote["x"])
		r.publish(c, "x", "s1", 0)
		r.publish(c, "x", "s2", 0)
		c.SetMeta(5, []byte(`5`))
		c.SetMeta(4, []byte(`4`))
		require.NoError(r, c.Flush(r.Context()))
		h, _ = r.held("x", "a")
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
		assert.Equal(r, []string{"J a/x", "S a/x s1", "S a/x s2", "M a/x", "S a/x", "L a/x l"}, r.said())
		assert.Empty(r, r.InRoom("x"))
		assert.Equal(r, 1, r.metas)

		r.join(c, "x")
		r.join(c, "y")
		c.Close(store.CauseClosed)
		c.Close(store.CauseLeft)
		<-c.Gone()
		_, err = c.Join(r.Context(), "z")
		require.ErrorIs(r, err, ErrClosed)
		assert.Equal(r, "J a/x", r.said()[6])
		assert.ElementsMatch(r, []string{"L a/x c", "L a/y c"}, r.said()[8:])
		s := r.Stats()
		assert.EqualValues(r, 1, s.LeftAsked)
		assert.EqualValues(r, 2, s.LeftClosed)
		r.nothingLeft()
	})
}

// Callers that wait together go together, at most MaxOps in one call.
func TestGroupCommit(t *testing.T) {
	virtual(t, func(r *rig) {
		r.plan(func(int, []store.Op) fault { return fault{before: time.Millisecond} })
		const n = 512
		conns := make([]*Conn, n)
		for i := range n {
			conns[i] = r.connect(fmt.Sprint(i))
		}
		r.sleep(time.Second)
		before := r.calls()
		var wg sync.WaitGroup
		began := time.Now()
		for i, c := range conns {
			wg.Go(func() {
				j, err := c.Join(r.Context(), fmt.Sprint("room", i%7))
				assert.NoError(r, err)
				assert.NotZero(r, j.Total)
			})
		}
		wg.Wait()
		assert.LessOrEqual(r, r.calls()-before, 1+(n+store.MaxOps-1)/store.MaxOps)
		assert.LessOrEqual(r, time.Since(began), 10*time.Millisecond)
		assert.Len(r, r.said(), n)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// Large states keep a call within MaxBytes.
func TestBatchesAreBoundedInBytes(t *testing.T) {
	virtual(t, func(r *rig) {
		r.plan(func(int, []store.Op) fault { return fault{before: time.Millisecond} })
		state := make([]byte, 20<<10)
		conns := make([]*Conn, 20)
		for i := range conns {
			conns[i] = r.connect(fmt.Sprint(i))
			r.join(conns[i], "x")
		}
		var wg sync.WaitGroup
		for _, c := range conns {
			wg.Go(func() { assert.NoError(r, c.PublishState(r.Context(), "x", state, 0, false)) })
		}
		wg.Wait()
		for _, b := range r.redis.batches {
			size := 0
			for i := range b {
				size += b[i].Size()
			}
			assert.Less(r, size, store.MaxBytes+21<<10)
		}
	})
}

// Each way in which an outcome can be unknown ends in one join and one leave.
func TestUnknownOutcomes(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]fault{
		"ran, reply lost":  {lost: true},
		"did not run":      {never: true},
		"runs much later":  {late: 500 * time.Millisecond},
		"runs a bit later": {late: 10 * time.Millisecond},
		"slow and lost":    {before: time.Second, after: 500 * time.Millisecond, lost: true},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				twice := func(call int, _ []store.Op) fault {
					if call < 2 {
						return x
					}
					return fault{}
				}
				c := r.connect("a")
				require.NoError(r, c.Registered(r.Context()))
				r.plan(twice)
				_, _ = c.Join(r.Context(), "x")
				r.sleep(5 * time.Second)
				r.atRest()
				r.plan(twice)
				_ = c.PublishState(r.Context(), "x", []byte("s"), 0, false)
				r.sleep(5 * time.Second)
				r.plan(twice)
				_, _ = c.Leave(r.Context(), "x", store.CauseLeft)
				r.sleep(5 * time.Second)
				r.plan(twice)
				c.Close(store.CauseClosed)
				r.sleep(5 * time.Second)
				assert.Equal(r, []string{"J a/x", "S a/x s", "L a/x l"}, r.said())
				r.nothingLeft()
			})
		})
	}
}

// What is asked for while the outcome of a join is unknown is written with the
// join that is made anew, or after it.
func TestStateWhileAJoinIsUnknown(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.plan(func(call int, _ []store.Op) fault {
			if call == 0 {
				return fault{after: 300 * time.Millisecond, lost: true}
			}
			return fault{}
		})
		var wg sync.WaitGroup
		wg.Go(func() { r.join(c, "x") })
		r.sleep(100 * time.Millisecond)
		r.publish(c, "x", "s", 0)
		c.SetMeta(1, []byte("m"))
		wg.Wait()
		require.NoError(r, c.Flush(r.Context()))
		h, ok := r.held("x", "a")
		require.True(r, ok)
		assert.Equal(r, "s", h.state)
		assert.Equal(r, "m", h.meta)
		r.atRest()
	})
}

func TestRedisAway(t *testing.T) {
	virtual(t, func(r *rig) {
		in := r.connect("in")
		r.join(in, "x")
		r.join(in, "z")
		r.forgetSaid()
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
		assert.Empty(r, r.said())
		assert.LessOrEqual(r, r.calls(), 60*6, "it backs off")

		r.heal()
		r.sleep(time.Second + 100*time.Millisecond)
		assert.ElementsMatch(r, []string{"J in/y", "J in/w", "L in/x l", "S in/z s"}, r.said())
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

func TestLeaveWhileTheJoinIsUnderWay(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		require.NoError(r, c.Registered(r.Context()))
		r.plan(func(int, []store.Op) fault { return fault{before: 50 * time.Millisecond, after: 50 * time.Millisecond} })
		var wg sync.WaitGroup
		wg.Go(func() { _, err := c.Join(r.Context(), "x"); assert.NoError(r, err) })
		r.sleep(10 * time.Millisecond)
		r.leave(c, "x")
		wg.Wait()
		assert.Equal(r, []string{"J a/x", "L a/x l"}, r.said())

		// In, out, in, out, in: what counts is the last.
		for range 2 {
			wg.Go(func() { _, err := c.Join(r.Context(), "x"); assert.NoError(r, err) })
			r.sleep(time.Millisecond)
			wg.Go(func() { r.leave(c, "x") })
			r.sleep(time.Millisecond)
		}
		wg.Go(func() { r.join(c, "x") })
		wg.Wait()
		r.atRest()
		_, ok := r.held("x", "a")
		assert.True(r, ok)
		legal(r, r.redis.events)
	})
}

// Whoever is told that a connection has left a room must not hear of it again.
func TestGoneWhenNothingIsLeftToBeWritten(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		require.NoError(r, c.Registered(r.Context()))
		assert.Equal(r, []string{"a", "b"}, r.Gone("x", []string{"a", "b"}), "b is nobody's")
		r.plan(func(int, []store.Op) fault { return fault{before: 50 * time.Millisecond} })
		var wg sync.WaitGroup
		wg.Go(func() { _, err := c.Join(r.Context(), "x"); assert.NoError(r, err) })
		r.sleep(10 * time.Millisecond)
		assert.Empty(r, r.Gone("x", []string{"a"}), "it may get there")
		wg.Go(func() { r.leave(c, "x") })
		r.sleep(10 * time.Millisecond)
		assert.Empty(r, r.Gone("x", []string{"a"}), "its join may run, and the leave comes after that")
		wg.Wait()
		r.sleep(time.Millisecond)
		assert.Equal(r, []string{"a"}, r.Gone("x", []string{"a"}))
		r.join(c, "x")
		c.Close(store.CauseClosed)
		assert.Empty(r, r.Gone("x", []string{"a"}), "its end is not written")
		<-c.Gone()
		assert.Equal(r, []string{"a"}, r.Gone("x", []string{"a"}))
	})
}

// A refusal of one op is nothing to the others, and is tried again.
func TestOpRefusedAlone(t *testing.T) {
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
		_, ok := r.held("bad", "a")
		assert.True(r, ok)
		r.atRest()

		r.refuse(func(op store.Op) bool { return op.Kind == store.OpLeave || op.Kind == store.OpDisconnect })
		c.Close(store.CauseClosed)
		bad.Close(store.CauseClosed)
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
		c.Close(store.CauseClosed)
		_, ok := r.Conn("a")
		assert.False(r, ok)
		_, err = r.Connect("a", nil, nil, func() {})
		require.ErrorIs(r, err, ErrExists, "the old one is still in Redis")
		<-r.Closing("a")
		again := r.connect("a")
		r.join(again, "x")
		assert.Equal(r, []string{"J a/x", "L a/x c", "J a/x"}, r.said())
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
		require.ErrorIs(r, r.Drain(ctx, store.CauseClosed), context.DeadlineExceeded)
		_, err := r.Connect("late", nil, nil, func() {})
		require.ErrorIs(r, err, ErrClosed)
		r.heal()
		r.drain()
		r.nothingLeft()
		assert.EqualValues(r, 100, r.Stats().LeftClosed)
	})
}

// Stop ends what runs, whatever is not written and however Redis hangs.
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
		r.Retime(r.Rooms())
		c.Close(store.CauseClosed)
		synctest.Wait()
		_, err = r.Connect("b", nil, nil, func() {})
		require.ErrorIs(r, err, ErrClosed)
	})
}

// Two servers with the same connection id: the later one has it.
func TestTakenByAnotherServer(t *testing.T) {
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
					r.redis.execute(where{0, "other"}, store.Op{Kind: store.OpJoin, Room: "x", Conn: "a", Entry: "theirs"})
				})
				require.ErrorIs(r, c.PublishState(r.Context(), "x", []byte("s"), 0, false), ErrTaken)
				assert.False(r, c.In("x"))
				h, _ := r.held("x", "a")
				assert.Equal(r, "theirs", h.entry)
				synctest.Wait()
				assert.Zero(r, c.sleepers.Load())
				assert.Zero(r, r.wheel.Armed())
				c.Close(store.CauseClosed)
				<-c.Gone()
				h, _ = r.held("x", "a")
				assert.Equal(r, "theirs", h.entry)
			}, func(cfg *Config) { cfg.EndSilent = endSilent })
		})
	}
}

// A batch that was late may, after Redis forgot everything, bring back what
// the connection had before: that is no other server's.
func TestOwnOlderEntryComesBack(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.redis.do(func() {
			r.redis.execute(where{0, "I1"}, store.Op{Kind: store.OpJoin, Room: "x", Conn: "a", Entry: "older"})
		})
		r.publish(c, "x", "s", 0)
		assert.True(r, c.In("x"))
		h, _ := r.held("x", "a")
		assert.Equal(r, "s", h.state)
		assert.NotEqual(r, "older", h.entry)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// What is offered again while its batch is being made goes with the next one.
func TestOnceInABatch(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		require.NoError(r, c.Registered(r.Context()))
		l := &lane{o: r.Owner, running: true} // nobody runs it but this test
		for _, room := range []string{"x", "y"} {
			l.offer(&eager{entry: &entry{c: c, room: room}, l: l}, asked)
		}
		for range 3 {
			batch := l.take(nil).items
			require.Len(r, batch, 2)
			assert.NotSame(r, batch[0], batch[1])
		}
	})
}

// eager is offered anew as soon as it has been taken.
type eager struct {
	*entry
	l *lane
}

func (e *eager) next(_ string, after *store.Op) (store.Op, bool) {
	if after != nil {
		return store.Op{}, false
	}
	e.l.offer(e, asked)
	return store.Op{}, true
}

func TestBucketsAreWrittenBesideEachOther(t *testing.T) {
	virtual(t, func(r *rig) {
		r.plan(func(_ int, ops []store.Op) fault {
			if ops[0].Room == "bad" {
				return fault{before: 10 * time.Minute}
			}
			return fault{}
		})
		c := r.connect("a")
		_, err := c.Join(r.Context(), "bad")
		require.ErrorIs(r, err, ErrUnavailable)
		began := time.Now()
		r.join(c, "good")
		assert.Zero(r, time.Since(began))
	}, func(cfg *Config) {
		cfg.Buckets = 2
		cfg.RoomBucket = func(room string) int { return len(room) % 2 }
	})
}

// The client library tells of the timeout of an earlier dial at once, where
// many have failed. That must not have batches made as fast as they can be.
func TestATimeoutToldAtOnceIsNoWaiting(t *testing.T) {
	virtual(t, func(r *rig) {
		in := r.connect("in")
		r.plan(func(int, []store.Op) fault {
			return fault{err: fmt.Errorf("dial: %w", context.DeadlineExceeded)}
		})
		_, err := in.Join(r.Context(), "x")
		assert.ErrorIs(r, err, ErrUnavailable)
		before := r.calls()
		r.sleep(time.Minute)
		assert.LessOrEqual(r, r.calls()-before, 60*6, "it backs off")
		r.heal()
		r.sleep(time.Second + 100*time.Millisecond)
		assert.Equal(r, []string{"J in/x"}, r.said())
		r.drain()
	})
}

// The store gives up on a call before the last limit of a batch: that was
// waiting enough, and the next attempt follows at once, however many fail.
func TestNoPauseAfterWaiting(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		const storeGivesUp = 1800 * time.Millisecond
		began := time.Now()
		var at []time.Duration
		r.plan(func(int, []store.Op) fault {
			at = append(at, time.Since(began))
			return fault{before: storeGivesUp, never: true, err: context.DeadlineExceeded}
		})
		c.SetMeta(2, []byte("m"))
		const first = 600 * time.Millisecond
		r.sleep(3*first + 4*storeGivesUp)
		r.redis.do(func() {
			want := []time.Duration{0, first}
			for i := range 5 {
				want = append(want, 3*first+time.Duration(i)*storeGivesUp)
			}
			assert.Equal(r, want, at)
		})
		r.heal()
		r.sleep(storeGivesUp)
		r.atRest()
	})
}
