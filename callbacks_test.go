package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/limit"
)

// textLog is a logger whose lines a test can read while others write.
type textLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *textLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *textLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *textLog) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func TestCallbacksRun(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	for name, tc := range map[string]struct {
		fn    func(context.Context) error
		check func(*testing.T, error)
		stats callbackStats
	}{
		"returns nil": {
			fn:    func(context.Context) error { return nil },
			check: func(t *testing.T, err error) { assert.NoError(t, err) },
			stats: callbackStats{Calls: 1},
		},
		"returns its error": {
			fn:    func(context.Context) error { return boom },
			check: func(t *testing.T, err error) { assert.Equal(t, boom, err) },
			stats: callbackStats{Calls: 1, Errors: 1},
		},
		"an answer for the client is no failure": {
			fn: func(context.Context) error { return &CommandError{Message: "no"} },
			check: func(t *testing.T, err error) {
				_, ok := errors.AsType[*CommandError](err)
				assert.True(t, ok)
			},
			stats: callbackStats{Calls: 1},
		},
		"neither is a refusal": {
			fn:    func(context.Context) error { return Refuse(403, "no") },
			check: func(t *testing.T, err error) { assert.ErrorIs(t, err, ErrRefused) },
			stats: callbackStats{Calls: 1},
		},
		"panics": {
			fn: func(context.Context) error { panic("ouch") },
			check: func(t *testing.T, err error) {
				p, ok := errors.AsType[*panicError](err)
				require.True(t, ok)
				assert.Equal(t, "ouch", p.value)
				assert.Contains(t, string(p.stack), "callbacks_test.go")
			},
			stats: callbackStats{Calls: 1, Panics: 1},
		},
		"ends its goroutine": {
			fn: func(context.Context) error { runtime.Goexit(); return nil },
			check: func(t *testing.T, err error) {
				p, ok := errors.AsType[*panicError](err)
				require.True(t, ok)
				assert.Equal(t, errGoexit, p.value)
			},
			stats: callbackStats{Calls: 1, Panics: 1},
		},
		"gives up with its context": {
			fn: func(ctx context.Context) error {
				_, ok := ctx.Deadline()
				if !ok {
					return errors.New("no deadline")
				}
				<-ctx.Done()
				return fmt.Errorf("query: %w", ctx.Err())
			},
			check: isTimeout,
			stats: callbackStats{Calls: 1, Timeouts: 1},
		},
		"is late": {
			fn:    func(context.Context) error { time.Sleep(time.Minute); return nil },
			check: isTimeout,
			stats: callbackStats{Calls: 1, Timeouts: 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newCallbacks(t.Context(), slog.New(slog.DiscardHandler))
				started := time.Now()
				tc.check(t, c.run(t.Context(), "hook", 2*time.Second, tc.fn))
				assert.LessOrEqual(t, time.Since(started), 2*time.Second)
				require.NoError(t, c.wait(t.Context()))
				synctest.Wait()
				assert.Equal(t, tc.stats, c.stats()["hook"])
				assert.Zero(t, c.left())
			})
		})
	}
}

func isTimeout(t *testing.T, err error) {
	late, ok := errors.AsType[*timeoutError](err)
	require.True(t, ok, "%v", err)
	assert.Equal(t, 2*time.Second, late.after)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestCallbacksCallerGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCallbacks(t.Context(), slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("connection gone")
		time.AfterFunc(time.Second, func() { cancel(gone) })
		release := make(chan struct{})
		err := c.run(ctx, "hook", time.Minute, func(context.Context) error { <-release; return nil })
		assert.Equal(t, gone, err)
		assert.Equal(t, 1, c.left(), "it goes on without its caller")
		assert.Equal(t, gone, c.run(ctx, "hook", time.Minute, func(context.Context) error {
			t.Error("called although its context was over")
			return nil
		}))
		close(release)
		require.NoError(t, c.wait(t.Context()))
		assert.Equal(t, callbackStats{Calls: 1}, c.stats()["hook"], "no failure of the callback")
	})
}

func TestCallbacksWithoutLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCallbacks(t.Context(), slog.New(slog.DiscardHandler))
		assert.NoError(t, c.run(t.Context(), "hook", 0, func(context.Context) error { time.Sleep(time.Hour); return nil }))
	})
}

func TestCallbacksClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCallbacks(t.Context(), slog.New(slog.DiscardHandler))
		release := make(chan struct{})
		hung := c.start(t.Context(), "hook", time.Hour, func(context.Context) error { <-release; return nil }, watch{})
		kind := c.start(t.Context(), "hook", time.Hour, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, watch{})
		synctest.Wait()

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		assert.ErrorIs(t, c.wait(ctx), context.DeadlineExceeded)
		assert.False(t, kind.done(), "wait stops nothing")

		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		assert.ErrorIs(t, c.close(ctx), context.DeadlineExceeded, "close is bounded")
		for _, k := range []*call{hung, kind} {
			<-k.settled
			assert.ErrorIs(t, k.err, ErrClosed)
		}
		assert.Equal(t, 1, c.left())
		assert.ErrorIs(t, c.run(t.Context(), "hook", time.Second, func(context.Context) error { return nil }), ErrClosed)

		close(release)
		require.NoError(t, c.close(t.Context()), "again")
		assert.Equal(t, callbackStats{Calls: 2}, c.stats()["hook"])
	})
}

func TestCallbacksWatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newCallbacks(t.Context(), slog.New(slog.DiscardHandler))
		var ended, late int
		var mu sync.Mutex // guards ended, late
		count := func(n *int) func() {
			return func() { mu.Lock(); defer mu.Unlock(); *n++ }
		}
		w := watch{ended: count(&ended), late: count(&late)}
		expect := func(wantEnded, wantLate int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			assert.Equal(t, []int{wantEnded, wantLate}, []int{ended, late})
		}
		c.start(t.Context(), "hook", time.Second, func(context.Context) error { return nil }, w)
		expect(1, 0)
		c.start(t.Context(), "hook", time.Second, func(context.Context) error { time.Sleep(3 * time.Second); return nil }, w)
		expect(1, 0)
		time.Sleep(2 * time.Second)
		expect(1, 1)
		time.Sleep(2 * time.Second)
		expect(2, 1)
	})
}

func TestCallbacksLogs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out textLog
		c := newCallbacks(t.Context(), out.logger())
		fail := func() {
			_ = c.run(t.Context(), "hook", time.Second, func(context.Context) error {
				return errors.New("broken " + strings.Repeat("x", 1000))
			})
			synctest.Wait()
		}
		for range 5 {
			fail()
		}
		assert.Equal(t, 1, strings.Count(out.String(), "callback failed"))
		assert.NotContains(t, out.String(), "suppressed")
		assert.Less(t, len(out.String()), 500, "long texts are cut")

		// A panic is another kind of line, and is told even where nobody waits.
		_ = c.run(t.Context(), "hook", time.Second, func(context.Context) error {
			time.Sleep(2 * time.Second)
			panic("ouch")
		})
		require.NoError(t, c.wait(t.Context()))
		assert.Equal(t, 1, strings.Count(out.String(), "callback timed out"))
		assert.Equal(t, 1, strings.Count(out.String(), "panic=ouch"))
		assert.Equal(t, callbackStats{Calls: 6, Errors: 5, Panics: 1, Timeouts: 1}, c.stats()["hook"])

		time.Sleep(limit.LogEvery)
		fail()
		assert.Equal(t, 2, strings.Count(out.String(), "callback failed"))
		assert.Contains(t, out.String(), "suppressed=4")
	})
}

func TestCallbacksConcurrent(t *testing.T) {
	t.Parallel()
	c := newCallbacks(t.Context(), slog.New(slog.DiscardHandler))
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			if i%3 == 0 {
				cancel()
			}
			defer cancel()
			_ = c.run(ctx, "hook", time.Duration(i%5)*time.Microsecond, func(context.Context) error {
				if i%7 == 0 {
					panic(i)
				}
				return nil
			})
		})
		if i == 150 {
			wg.Go(func() { _ = c.close(t.Context()) })
		}
	}
	wg.Wait()
	require.NoError(t, c.close(t.Context()))
	assert.Zero(t, c.left())
}
