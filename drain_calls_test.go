package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestDrainRefusesWhatMakesNoSense(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		fresh, err := NewServer(Options{Redis: w.client()})
		require.NoError(t, err)
		require.ErrorIs(t, fresh.Drain(ctx, 0), ErrNotStarted)
		require.ErrorIs(t, fresh.Ready(ctx), ErrNotStarted)
		require.NoError(t, fresh.Start(ctx), "nothing has changed")
		require.ErrorIs(t, fresh.Drain(ctx, -1), ErrInvalidOptions)
		require.NoError(t, fresh.Ready(ctx), "nothing has changed")
		require.NoError(t, fresh.Drain(ctx, time.Hour), "there is no socket to wait for")
		require.NoError(t, fresh.Drain(ctx, time.Hour), "once more")
		require.ErrorIs(t, fresh.Ready(ctx), ErrClosed)
		require.NoError(t, fresh.Shutdown(ctx))
		require.ErrorIs(t, fresh.Drain(ctx, 0), ErrClosed)

		unborn, err := NewServer(Options{Redis: w.client()})
		require.NoError(t, err)
		require.NoError(t, unborn.Shutdown(ctx))
		require.ErrorIs(t, unborn.Drain(ctx, 0), ErrClosed)
		require.ErrorIs(t, unborn.Ready(ctx), ErrClosed)
	})
}

// When its context ends the rest stays open, until Drain is called again.
func TestDrainGivesUp(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		peers := s.dialAll(10)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		err := s.Drain(ctx, 10*time.Second)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.ErrorContains(t, err, "5 connections")
		w.sleep(time.Minute)
		assert.Equal(t, 5, s.Stats().Connections)
		require.ErrorIs(t, s.Drain(ctx, 0), context.DeadlineExceeded, "it has ended already")
		for _, p := range peers {
			select {
			case <-p.ended:
			default:
				assert.Equal(t, "true", string(p.call("mesh/noop", nil)))
			}
		}
		assert.Equal(t, 5, s.Stats().Connections)
		require.ErrorIs(t, s.Ready(t.Context()), ErrClosed, "no way back")
		ends := peerEnds(peers)
		begun := time.Now()
		require.NoError(t, s.Drain(t.Context(), 10*time.Second))
		assert.InDelta(t, 8300*time.Millisecond, time.Since(begun), float64(100*time.Millisecond))
		assert.LessOrEqual(t, mostWithin(ends()[5:], 1600*time.Millisecond), 1, "evenly again")
	})
}

func TestDrainSeveralTimes(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		ends := peerEnds(s.dialAll(100))
		begun := time.Now()
		var all sync.WaitGroup
		for i := range 5 { // the same pace
			all.Go(func() {
				w.sleep(time.Duration(i) * 13 * time.Millisecond)
				assert.NoError(t, s.Drain(t.Context(), 10*time.Second))
			})
		}
		short, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		all.Go(func() { assert.ErrorIs(t, s.Drain(short, 9*time.Second), context.DeadlineExceeded) })
		w.sleep(5 * time.Second)
		left := s.Stats().Connections
		assert.InDelta(t, 49, left, 3)
		require.NoError(t, s.Drain(t.Context(), time.Second), "it hurries")
		assert.LessOrEqual(t, time.Since(begun), 6*time.Second)
		all.Wait()
		at := ends()
		assert.LessOrEqual(t, time.Since(begun), 6*time.Second, "the others are through as well")
		assert.LessOrEqual(t, mostWithin(at[:100-left], time.Second), 13, "they do not add up")
		assert.LessOrEqual(t, mostWithin(at[100-left:], 100*time.Millisecond), left/10+2)
	})
}

func TestDrainThenShutdown(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked()
		peers := s.dialAll(20, "lobby")
		drained := make(chan error, 2)
		for range 2 {
			go func() { drained <- s.Drain(t.Context(), time.Hour) }()
		}
		w.eventually(time.Second, func() bool { return s.Ready(t.Context()) != nil }, "it drains")
		begun := time.Now()
		s.shutdown()
		for range 2 {
			require.ErrorIs(t, <-drained, ErrClosed)
		}
		for _, p := range peers {
			p.told(t)
		}
		assert.Less(t, time.Since(begun), 10*time.Second, "it does not wait for the drain's hour")
	})
}

// Drain does not wait for what Shutdown waits for.
func TestShutdownEndsDrainPromptly(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		s.raw() // does not answer the close frame
		drained := make(chan time.Time, 1)
		go func() {
			assert.ErrorIs(t, s.Drain(t.Context(), time.Hour), ErrClosed)
			drained <- time.Now()
		}()
		w.sleep(5 * time.Second)
		begun := time.Now()
		s.shutdown()
		assert.Greater(t, time.Since(begun), 900*time.Millisecond)
		assert.Zero(t, (<-drained).Sub(begun))
	})
}

// A connection that is being upgraded when the drain begins is refused, too.
func TestDrainWhileUpgrading(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		asked, answer := make(chan struct{}), make(chan struct{})
		s := w.tracked(func(o *Options) {
			o.Authenticate = func(context.Context, *http.Request) (any, error) {
				close(asked)
				<-answer
				return nil, nil
			}
		})
		refused := make(chan *http.Response, 1)
		go func() {
			_, resp, err := s.tryDial()
			assert.Error(t, err)
			refused <- resp
		}()
		<-asked
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(t.Context(), 0) }()
		w.sleep(time.Second)
		require.Empty(t, drained, "it may still become a socket")
		close(answer)
		assert.Equal(t, http.StatusServiceUnavailable, (<-refused).StatusCode)
		require.NoError(t, <-drained)
	})
}

// As many go as before when some end by themselves, or fewer, and evenly.
func TestDrainWhileSocketsEndByThemselves(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		peers := s.dialAll(100)
		drained := make(chan error, 1)
		begun := time.Now()
		go func() { drained <- s.Drain(t.Context(), 10*time.Second) }()
		w.sleep(2 * time.Second)
		var open []*peer
		for _, p := range peers {
			select {
			case <-p.ended:
			default:
				open = append(open, p)
			}
		}
		for _, p := range open[:len(open)/2] {
			p.close()
		}
		ends := peerEnds(open[len(open)/2:])
		require.NoError(t, <-drained)
		assert.InDelta(t, 10*time.Second, time.Since(begun), float64(300*time.Millisecond))
		at := ends()
		assert.LessOrEqual(t, mostWithin(at, time.Second), 6, "about 40 in 8 s")
		assert.LessOrEqual(t, mostWithin(at, 190*time.Millisecond), 1)
	})
}

// takeDue with a clock that jumps: what a process that stood still owes is not
// paid all at once, and yet in time.
func TestDrainAfterAStandstill(t *testing.T) {
	t.Parallel()
	for _, sockets := range []int{1, 2, 7, 1000, 20_000} {
		for _, still := range []time.Duration{0, 3 * time.Second, 9900 * time.Millisecond, 11 * time.Second} {
			s := &Server{n: &node{}, conns: map[string]*Connection{}, gone: make(chan struct{})}
			for i := range sockets {
				id := fmt.Sprint(i)
				s.conns[id] = &Connection{id: id}
			}
			assert.Equal(t, sockets, s.refuseMore())
			begun := time.Now()
			now, woken, until := begun, begun, begun.Add(10*time.Second)
			told, rounds := map[string]bool{}, 0
			for wait := time.Duration(0); wait >= 0; rounds++ {
				now = now.Add(wait)
				if rounds == 1 {
					now = now.Add(still)
					woken = now
				}
				var due []*Connection
				due, wait = s.takeDue(now, begun, until)
				for _, c := range due {
					require.False(t, told[c.id])
					told[c.id] = true
				}
				fair := sockets
				if now.Before(until) {
					left := until.Sub(woken) // what remains to spread them over
					fair = 1 + int(float64(sockets)*float64(drainLate+drainStep)/float64(left))
					if still == 0 {
						fair = 1 + int(float64(sockets)*float64(2*drainStep)/float64(10*time.Second))
					}
				}
				require.LessOrEqual(t, len(due), fair, "%d sockets, %v: %v after", sockets, still, now.Sub(begun))
			}
			require.Len(t, told, sockets)
			if woken.Before(until) {
				require.LessOrEqual(t, now, until)
			}
			require.LessOrEqual(t, rounds, 10_000/50+sockets)
		}
	}
}

// A handler that is at work when its connection's turn comes is told so by its
// context; others go on.
func TestDrainAndCommandsUnderWay(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		var mu sync.Mutex
		ended := map[string]error{}
		require.NoError(t, s.HandleCommand("work", func(ctx context.Context, c *Connection, _ json.RawMessage) (any, error) {
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				ended[c.ID()] = ctx.Err()
			}()
			select {
			case <-time.After(5500 * time.Millisecond):
				return "done", nil
			case <-ctx.Done():
				return nil, errors.New("too late")
			}
		}))
		peers := s.dialAll(10)
		var answered sync.WaitGroup
		done := map[string]bool{}
		for _, p := range peers {
			answered.Go(func() {
				answer, err := p.tryCall("work", nil)
				mu.Lock()
				defer mu.Unlock()
				done[p.id] = err == nil && string(answer) == `"done"`
			})
		}
		require.NoError(t, s.Drain(t.Context(), 10*time.Second))
		answered.Wait()
		n := 0
		mu.Lock()
		defer mu.Unlock()
		for _, p := range peers {
			if done[p.id] {
				n++
				assert.NoError(t, ended[p.id])
			} else {
				assert.ErrorIs(t, ended[p.id], context.Canceled)
			}
		}
		assert.InDelta(t, 4, n, 1)
	})
}
