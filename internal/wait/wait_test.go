package wait

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		assert.NoError(t, For(t.Context(), time.Minute))
		assert.Equal(t, time.Minute, time.Since(begin))
		assert.NoError(t, For(t.Context(), -time.Minute))
		assert.Equal(t, time.Minute, time.Since(begin))

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin = time.Now()
		assert.ErrorIs(t, For(ctx, time.Hour), context.DeadlineExceeded)
		assert.Equal(t, time.Second, time.Since(begin))
		assert.ErrorIs(t, For(ctx, 0), context.DeadlineExceeded)
	})
}

func TestSignal(t *testing.T) {
	t.Parallel()
	s := NewSignal()
	s.Set()
	s.Set()
	<-s
	select {
	case <-s:
		assert.Fail(t, "two signals that nobody received are one")
	default:
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	b := Backoff{First: 50 * time.Millisecond, Last: time.Second}
	for failures, want := range map[int]time.Duration{
		-1: 0, 0: 0, 1: 50 * time.Millisecond, 2: 100 * time.Millisecond, 5: 800 * time.Millisecond,
		6: time.Second, 7: time.Second, 1 << 30: time.Second,
	} {
		assert.Equal(t, want, b.After(failures), failures)
	}
	assert.Equal(t, time.Second, Backoff{First: time.Minute, Last: time.Second}.After(1))
}

func TestJitter(t *testing.T) {
	t.Parallel()
	for range 1000 {
		d := Jitter(time.Second, 0.5)
		assert.True(t, d > time.Second/2 && d <= time.Second, d)
	}
	assert.Zero(t, Jitter(0, 0.5))
	assert.Equal(t, time.Duration(1), Jitter(1, 0.5))
}

func TestEach(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls, now, most atomic.Int32
		seen := make([]atomic.Bool, 100)
		assert.NoError(t, Each(t.Context(), len(seen), 7, func(i int) error {
			assert.False(t, seen[i].Swap(true))
			calls.Add(1)
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
			}
			time.Sleep(time.Second)
			now.Add(-1)
			return nil
		}))
		assert.EqualValues(t, 100, calls.Load())
		assert.EqualValues(t, 7, most.Load())
		assert.NoError(t, Each(t.Context(), 0, 7, func(int) error { return errors.New("called") }))
	})
}

// The calls that have begun go on after the first error, and no other begins.
func TestEachStops(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		bad := errors.New("bad")
		var ended atomic.Int32
		assert.Equal(t, bad, Each(t.Context(), 100, 4, func(i int) error {
			time.Sleep(time.Duration(i+1) * time.Second)
			ended.Add(1)
			if i == 1 {
				return bad
			}
			return nil
		}))
		// 0 ends after a second and makes room for 4; 1 fails after two.
		assert.EqualValues(t, 5, ended.Load())

		ctx, cancel := context.WithCancel(t.Context())
		var begun atomic.Int32
		err := Each(ctx, 100, 2, func(int) error {
			if begun.Add(1) == 2 {
				cancel()
			}
			return nil
		})
		assert.ErrorIs(t, err, context.Canceled)
		assert.LessOrEqual(t, begun.Load(), int32(3))
	})
}
