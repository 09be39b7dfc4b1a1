package callbacks

import (
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

	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/limit"
)

// chosen is an error by which the app chooses the answer to the client.
type chosen struct{ text string }

func (e *chosen) Error() string { return e.text }

var testConfig = Config{
	Logger:   slog.New(slog.DiscardHandler),
	IsAnswer: errs.Has[*chosen],
	Typed: func(err error) (all []error) {
		if c, ok := errors.AsType[*chosen](err); ok {
			all = append(all, &chosen{c.text})
		}
		return all
	},
}

// left returns the number of callbacks that are running.
func (r *Runner) left() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running
}

func TestRun(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	for name, tc := range map[string]struct {
		fn    func(context.Context) error
		check func(*testing.T, error)
		stats Counts
	}{
		"returns nil": {
			fn:    func(context.Context) error { return nil },
			check: func(t *testing.T, err error) { assert.NoError(t, err) },
			stats: Counts{Calls: 1},
		},
		"returns its error": {
			fn:    func(context.Context) error { return boom },
			check: func(t *testing.T, err error) { assert.Equal(t, boom, err) },
			stats: Counts{Calls: 1, Errors: 1},
		},
		"an answer for the client is no failure": {
			fn: func(context.Context) error { return &chosen{"no"} },
			check: func(t *testing.T, err error) {
				_, ok := errors.AsType[*chosen](err)
				assert.True(t, ok)
			},
			stats: Counts{Calls: 1},
		},
		"neither is a refusal": {
			fn:    func(context.Context) error { return fmt.Errorf("members only: %w", errs.Refused) },
			check: func(t *testing.T, err error) { assert.ErrorIs(t, err, errs.Refused) },
			stats: Counts{Calls: 1},
		},
		"panics": {
			fn: func(context.Context) error { panic("ouch") },
			check: func(t *testing.T, err error) {
				p, ok := errors.AsType[*PanicError](err)
				require.True(t, ok)
				assert.Equal(t, "ouch", p.Value)
				assert.Contains(t, string(p.Stack), "runner_test.go")
			},
			stats: Counts{Calls: 1, Panics: 1},
		},
		"ends its goroutine": {
			fn: func(context.Context) error { runtime.Goexit(); return nil },
			check: func(t *testing.T, err error) {
				p, ok := errors.AsType[*PanicError](err)
				require.True(t, ok)
				assert.Equal(t, errGoexit, p.Value)
			},
			stats: Counts{Calls: 1, Panics: 1},
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
			stats: Counts{Calls: 1, Timeouts: 1},
		},
		"is late": {
			fn:    func(context.Context) error { time.Sleep(time.Minute); return nil },
			check: isTimeout,
			stats: Counts{Calls: 1, Timeouts: 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := New(t.Context(), testConfig)
				started := time.Now()
				tc.check(t, c.Run(t.Context(), "hook", 2*time.Second, tc.fn))
				assert.LessOrEqual(t, time.Since(started), 2*time.Second)
				require.NoError(t, c.Wait(t.Context()))
				synctest.Wait()
				assert.Equal(t, tc.stats, c.Stats()["hook"])
				assert.Zero(t, c.left())
			})
		})
	}
}

func isTimeout(t *testing.T, err error) {
	late, ok := errors.AsType[*TimeoutError](err)
	require.True(t, ok, "%v", err)
	assert.Equal(t, 2*time.Second, late.After)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestCallerGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := New(t.Context(), testConfig)
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("connection gone")
		time.AfterFunc(time.Second, func() { cancel(gone) })
		release := make(chan struct{})
		err := c.Run(ctx, "hook", time.Minute, func(context.Context) error { <-release; return nil })
		assert.Equal(t, gone, err)
		assert.Equal(t, 1, c.left(), "it goes on without its caller")
		assert.Equal(t, gone, c.Run(ctx, "hook", time.Minute, func(context.Context) error {
			t.Error("called although its context was over")
			return nil
		}))
		close(release)
		require.NoError(t, c.Wait(t.Context()))
		assert.Equal(t, Counts{Calls: 1}, c.Stats()["hook"], "no failure of the callback")
	})
}

func TestWithoutLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := New(t.Context(), testConfig)
		assert.NoError(t, c.Run(t.Context(), "hook", 0, func(context.Context) error { time.Sleep(time.Hour); return nil }))
	})
}

func TestClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := New(t.Context(), testConfig)
		release := make(chan struct{})
		hung := c.Start(t.Context(), "hook", time.Hour, func(context.Context) error { <-release; return nil }, Events{})
		kind := c.Start(t.Context(), "hook", time.Hour, func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, Events{})
		synctest.Wait()

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		assert.ErrorIs(t, c.Wait(ctx), context.DeadlineExceeded)
		assert.False(t, kind.Done(), "wait stops nothing")

		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		assert.ErrorIs(t, c.Close(ctx), context.DeadlineExceeded, "close is bounded")
		for _, k := range []*Call{hung, kind} {
			<-k.settled
			assert.ErrorIs(t, k.err, errs.Closed)
		}
		assert.Equal(t, 1, c.left())
		assert.ErrorIs(t, c.Run(t.Context(), "hook", time.Second, func(context.Context) error { return nil }), errs.Closed)

		close(release)
		require.NoError(t, c.Close(t.Context()), "again")
		assert.Equal(t, Counts{Calls: 2}, c.Stats()["hook"])
	})
}

func TestEvents(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := New(t.Context(), testConfig)
		var ended, late int
		var mu sync.Mutex // guards ended, late
		count := func(n *int) func() {
			return func() { mu.Lock(); defer mu.Unlock(); *n++ }
		}
		w := Events{Ended: count(&ended), Late: count(&late)}
		expect := func(wantEnded, wantLate int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			assert.Equal(t, []int{wantEnded, wantLate}, []int{ended, late})
		}
		c.Start(t.Context(), "hook", time.Second, func(context.Context) error { return nil }, w)
		expect(1, 0)
		c.Start(t.Context(), "hook", time.Second, func(context.Context) error { time.Sleep(3 * time.Second); return nil }, w)
		expect(1, 0)
		time.Sleep(2 * time.Second)
		expect(1, 1)
		time.Sleep(2 * time.Second)
		expect(2, 1)
	})
}

func TestLogs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out testlog.Output
		c := New(t.Context(), Config{Logger: out.Logger()})
		fail := func() {
			_ = c.Run(t.Context(), "hook", time.Second, func(context.Context) error {
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

		// A panic is another kind of line. It is logged even if no caller waits.
		_ = c.Run(t.Context(), "hook", time.Second, func(context.Context) error {
			time.Sleep(2 * time.Second)
			panic("ouch")
		})
		require.NoError(t, c.Wait(t.Context()))
		assert.Equal(t, 1, strings.Count(out.String(), "callback timed out"))
		assert.Equal(t, 1, strings.Count(out.String(), "panic=ouch"))
		assert.Equal(t, Counts{Calls: 6, Errors: 5, Panics: 1, Timeouts: 1}, c.Stats()["hook"])

		time.Sleep(limit.LogEvery)
		fail()
		assert.Equal(t, 2, strings.Count(out.String(), "callback failed"))
		assert.Contains(t, out.String(), "suppressed=4")
	})
}

func TestRunnerIsSafeForConcurrentUse(t *testing.T) {
	t.Parallel()
	c := New(t.Context(), testConfig)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			if i%3 == 0 {
				cancel()
			}
			defer cancel()
			_ = c.Run(ctx, "hook", time.Duration(i%5)*time.Microsecond, func(context.Context) error {
				if i%7 == 0 {
					panic(i)
				}
				return nil
			})
		})
		if i == 150 {
			wg.Go(func() { _ = c.Close(t.Context()) })
		}
	}
	wg.Wait()
	require.NoError(t, c.Close(t.Context()))
	assert.Zero(t, c.left())
}

// A failure is counted before anything that waits for the call goes on.
func TestAFailureIsCountedBeforeTheCallSettles(t *testing.T) {
	t.Parallel()
	for name, fn := range map[string]func(ctx context.Context) error{
		"error": func(context.Context) error { return errors.New("no") },
		"panic": func(context.Context) error { panic("no") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := New(t.Context(), Config{})
			begun, release := make(chan struct{}), make(chan struct{})
			k := c.Start(t.Context(), Guard, 0, func(ctx context.Context) error {
				close(begun)
				<-release
				return fn(ctx)
			}, Events{})
			<-begun
			c.mu.Lock() // nothing can be counted
			close(release)
			for range 1000 {
				runtime.Gosched()
				if k.Done() {
					c.mu.Unlock()
					t.Fatal("it is settled, and not counted")
				}
			}
			c.mu.Unlock()
			<-k.settled
			got := c.Stats()[Guard]
			assert.EqualValues(t, 1, got.Errors+got.Panics+got.Timeouts)
			require.NoError(t, c.Close(t.Context()))
		})
	}
}
