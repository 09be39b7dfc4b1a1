package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

func TestDrainRefusesWhatMakesNoSense(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		fresh, err := mesh.NewServer(mesh.Options{Redis: w.Client()})
		require.NoError(t, err)
		require.ErrorIs(t, fresh.Drain(ctx, 0), mesh.ErrNotStarted)
		require.ErrorIs(t, fresh.Ready(ctx), mesh.ErrNotStarted)
		require.NoError(t, fresh.Start(ctx), "nothing has changed")
		require.ErrorIs(t, fresh.Drain(ctx, -1), mesh.ErrInvalidOptions)
		require.NoError(t, fresh.Ready(ctx), "nothing has changed")
		require.NoError(t, fresh.Drain(ctx, time.Hour), "there is no socket to wait for")
		require.NoError(t, fresh.Drain(ctx, time.Hour), "once more")
		require.ErrorIs(t, fresh.Ready(ctx), mesh.ErrClosed)
		require.NoError(t, fresh.Shutdown(ctx))
		require.ErrorIs(t, fresh.Drain(ctx, 0), mesh.ErrClosed)

		unborn, err := mesh.NewServer(mesh.Options{Redis: w.Client()})
		require.NoError(t, err)
		require.NoError(t, unborn.Shutdown(ctx))
		require.ErrorIs(t, unborn.Drain(ctx, 0), mesh.ErrClosed)
		require.ErrorIs(t, unborn.Ready(ctx), mesh.ErrClosed)
	})
}

// When its context ends the rest stays open, until Drain is called again.
func TestDrainGivesUp(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		peers := s.DialAll(10)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		err := s.Drain(ctx, 10*time.Second)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.ErrorContains(t, err, "5 connections")
		w.Sleep(time.Minute)
		assert.Equal(t, 5, s.Stats().Connections)
		require.ErrorIs(t, s.Drain(ctx, 0), context.DeadlineExceeded, "it has ended already")
		for _, p := range peers {
			select {
			case <-p.Ended:
			default:
				assert.Equal(t, "true", string(p.Call("mesh/noop", nil)))
			}
		}
		assert.Equal(t, 5, s.Stats().Connections)
		require.ErrorIs(t, s.Ready(t.Context()), mesh.ErrClosed, "no way back")
		ends := peerEnds(peers)
		begun := time.Now()
		require.NoError(t, s.Drain(t.Context(), 10*time.Second))
		assert.InDelta(t, 8300*time.Millisecond, time.Since(begun), float64(100*time.Millisecond))
		assert.LessOrEqual(t, mostWithin(ends()[5:], 1600*time.Millisecond), 1, "evenly again")
	})
}

func TestDrainSeveralTimes(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		ends := peerEnds(s.DialAll(100))
		begun := time.Now()
		var all sync.WaitGroup
		for i := range 5 { // the same pace
			all.Go(func() {
				w.Sleep(time.Duration(i) * 13 * time.Millisecond)
				assert.NoError(t, s.Drain(t.Context(), 10*time.Second))
			})
		}
		short, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		all.Go(func() { assert.ErrorIs(t, s.Drain(short, 9*time.Second), context.DeadlineExceeded) })
		w.Sleep(5 * time.Second)
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
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		peers := s.DialAll(20, "lobby")
		drained := make(chan error, 2)
		for range 2 {
			go func() { drained <- s.Drain(t.Context(), time.Hour) }()
		}
		w.Eventually(time.Second, func() bool { return s.Ready(t.Context()) != nil }, "it drains")
		begun := time.Now()
		s.End()
		for range 2 {
			require.ErrorIs(t, <-drained, mesh.ErrClosed)
		}
		for _, p := range peers {
			p.Told(t)
		}
		assert.Less(t, time.Since(begun), w.Unhurried(10*time.Second), "it does not wait for the drain's hour")
	})
}

// Drain does not wait for what Shutdown waits for.
func TestShutdownEndsDrainPromptly(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		s.Raw() // does not answer the close frame
		drained := make(chan time.Time, 1)
		go func() {
			assert.ErrorIs(t, s.Drain(t.Context(), time.Hour), mesh.ErrClosed)
			drained <- time.Now()
		}()
		w.Sleep(5 * time.Second)
		begun := time.Now()
		s.End()
		assert.Greater(t, time.Since(begun), 900*time.Millisecond)
		assert.Zero(t, (<-drained).Sub(begun))
	})
}

// A connection that is being upgraded when the drain begins is refused, too.
func TestDrainWhileUpgrading(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		asked, answer := make(chan struct{}), make(chan struct{})
		s := w.Tracked(func(o *mesh.Options) {
			o.Authenticate = func(context.Context, *http.Request) (any, error) {
				close(asked)
				<-answer
				return nil, nil
			}
		})
		refused := make(chan *http.Response, 1)
		go func() {
			_, resp, err := s.TryDial()
			assert.Error(t, err)
			refused <- resp
		}()
		<-asked
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(t.Context(), 0) }()
		w.Sleep(time.Second)
		require.Empty(t, drained, "it may still become a socket")
		close(answer)
		assert.Equal(t, http.StatusServiceUnavailable, (<-refused).StatusCode)
		require.NoError(t, <-drained)
	})
}

// As many go as before when some end by themselves, or fewer, and evenly.
func TestDrainWhileSocketsEndByThemselves(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		peers := s.DialAll(100)
		drained := make(chan error, 1)
		begun := time.Now()
		go func() { drained <- s.Drain(t.Context(), 10*time.Second) }()
		w.Sleep(2 * time.Second)
		var open []*harness.Peer
		for _, p := range peers {
			select {
			case <-p.Ended:
			default:
				open = append(open, p)
			}
		}
		for _, p := range open[:len(open)/2] {
			p.Close()
		}
		ends := peerEnds(open[len(open)/2:])
		require.NoError(t, <-drained)
		assert.InDelta(t, 10*time.Second, time.Since(begun), float64(300*time.Millisecond))
		at := ends()
		assert.LessOrEqual(t, mostWithin(at, time.Second), 6, "about 40 in 8 s")
		assert.LessOrEqual(t, mostWithin(at, 190*time.Millisecond), 1)
	})
}

// A handler that is at work when its connection's turn comes is told so by its
// context; others go on.
func TestDrainAndCommandsUnderWay(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		var mu sync.Mutex
		ended := map[string]error{}
		require.NoError(t, s.HandleCommand("work", func(ctx context.Context, c *mesh.Connection, _ json.RawMessage) (any, error) {
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
		peers := s.DialAll(10)
		var answered sync.WaitGroup
		done := map[string]bool{}
		for _, p := range peers {
			answered.Go(func() {
				answer, err := p.TryCall("work", nil)
				mu.Lock()
				defer mu.Unlock()
				done[p.ID] = err == nil && string(answer) == `"done"`
			})
		}
		require.NoError(t, s.Drain(t.Context(), 10*time.Second))
		answered.Wait()
		n := 0
		mu.Lock()
		defer mu.Unlock()
		for _, p := range peers {
			if done[p.ID] {
				n++
				assert.NoError(t, ended[p.ID])
			} else {
				assert.ErrorIs(t, ended[p.ID], context.Canceled)
			}
		}
		assert.InDelta(t, 4, n, 1)
	})
}
