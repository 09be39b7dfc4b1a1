package guards

import (
	"context"
	"encoding/json"
	"errors"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/errs"
)

// cacheRig is a cache under test, with one connection "c" whose metadata the test changes.
type cacheRig struct {
	*Cache
	t   *testing.T
	log *testlog.Output

	mu      sync.Mutex // guards meta, version
	meta    string
	version uint64
}

func newCacheRig(t *testing.T) *cacheRig {
	t.Helper()
	j := &cacheRig{t: t, log: &testlog.Output{}, meta: `{}`, version: 1}
	calls := callbacks.New(t.Context(), callbacks.Config{Logger: j.log.Logger()})
	j.Cache = NewCache(Config{Rules: &RuleSet{}, Calls: calls, GuardTimeout: 5 * time.Second, JoinTimeout: 3 * time.Second, Keep: 20})
	j.AddConn("c")
	return j
}

func (j *cacheRig) member() (Member, uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return Member{ID: "c", Metadata: json.RawMessage(j.meta)}, j.version
}

func (j *cacheRig) setMeta(meta string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.meta, j.version = meta, j.version+1
}

func (j *cacheRig) guard(room string, g Func) {
	j.t.Helper()
	j.rules.Add(Pattern{Exact: room}, Options{Guard: g})
}

func (j *cacheRig) ask(room string) (bool, error) {
	return j.allowed(j.t.Context(), "c", j.member, room)
}

// end waits for every goroutine.
func (j *cacheRig) end() {
	j.t.Helper()
	require.NoError(j.t, j.calls.Close(j.t.Context()))
	synctest.Wait()
	assert.Zero(j.t, j.Cache.Stats().Hanging)
}

// says returns a guard with a fixed answer, and the number of its calls.
func says(ok bool, err error) (Func, *atomic.Int64) {
	var asked atomic.Int64
	return func(context.Context, Member, string) (bool, error) {
		asked.Add(1)
		return ok, err
	}, &asked
}

func TestAllowedOutcomes(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	for name, tc := range map[string]struct {
		guard Func
		ok    bool
		is    []error
		isNot []error
	}{
		"yes":                       {guard: func(context.Context, Member, string) (bool, error) { return true, nil }, ok: true},
		"no":                        {guard: func(context.Context, Member, string) (bool, error) { return false, nil }},
		"error":                     {guard: func(context.Context, Member, string) (bool, error) { return true, boom }, is: []error{errs.Refused}},
		"an error of ours":          {guard: func(context.Context, Member, string) (bool, error) { return true, errs.NotTracked }, is: []error{errs.Refused}, isNot: []error{errs.NotTracked}},
		"redis away":                {guard: func(context.Context, Member, string) (bool, error) { return true, errs.Unavailable }, is: []error{errs.Refused, errs.Unavailable}},
		"panic":                     {guard: func(context.Context, Member, string) (bool, error) { panic("ouch") }, is: []error{errs.Refused}},
		"hangs":                     {guard: func(context.Context, Member, string) (bool, error) { time.Sleep(time.Minute); return true, nil }, is: []error{errs.Refused, context.DeadlineExceeded}},
		"gives up with its context": {guard: func(ctx context.Context, _ Member, _ string) (bool, error) { <-ctx.Done(); return true, ctx.Err() }, is: []error{errs.Refused, context.DeadlineExceeded}},
		"says yes too late": {guard: func(ctx context.Context, _ Member, _ string) (bool, error) {
			<-ctx.Done()
			time.Sleep(time.Nanosecond)
			return true, nil
		}, is: []error{errs.Refused, context.DeadlineExceeded}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				j := newCacheRig(t)
				j.setMeta(`{"secret":1}`)
				j.guard("r", tc.guard)
				j.rules.Add(Pattern{Exact: "j"}, Options{JoinGuard: tc.guard})
				for what, ask := range map[string]func() (bool, error){
					"see":  func() (bool, error) { return j.ask("r") },
					"join": func() (bool, error) { return j.joinAllowed(t.Context(), "c", j.member, "j") },
				} {
					started := time.Now()
					ok, err := ask()
					assert.Equal(t, tc.ok, ok, what)
					assert.LessOrEqual(t, time.Since(started), 5*time.Second, what)
					if tc.is == nil {
						assert.NoError(t, err, what)
					}
					for _, is := range tc.is {
						assert.ErrorIs(t, err, is, what)
					}
					for _, is := range tc.isNot {
						assert.NotErrorIs(t, err, is, what)
					}
				}
				j.end()
				assert.NotContains(t, j.log.String(), "secret")
			})
		})
	}
}

func TestAllowedWithoutGuards(t *testing.T) {
	t.Parallel()
	j := newCacheRig(t)
	_, err := j.ask("r")
	assert.ErrorIs(t, err, errs.NotTracked)
	ok, err := j.joinAllowed(t.Context(), "c", j.member, "r")
	assert.True(t, ok, "an untracked room can be joined")
	assert.NoError(t, err)
	allowed, known := j.known("c", j.member, "r")
	assert.Equal(t, []bool{false, true}, []bool{allowed, known})

	j.guard("r", nil)
	ok, err = j.ask("r")
	assert.True(t, ok)
	assert.NoError(t, err)
	allowed, known = j.known("c", j.member, "r")
	assert.Equal(t, []bool{true, true}, []bool{allowed, known})
	assert.Zero(t, j.Cache.keptInAll())
}

func TestAllowedIsKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		g, asked := says(true, nil)
		j.guard("r", g)
		expect := func(times int64, why string) {
			t.Helper()
			for range 3 {
				ok, err := j.ask("r")
				require.NoError(t, err)
				require.True(t, ok)
			}
			require.Equal(t, times, asked.Load(), why)
			allowed, known := j.known("c", j.member, "r")
			require.Equal(t, []bool{true, true}, []bool{allowed, known})
		}
		expect(1, "kept")
		time.Sleep(time.Hour)
		expect(1, "for as long as nothing changes")
		j.setMeta(`{"x":1}`)
		_, known := j.known("c", j.member, "r")
		assert.False(t, known)
		expect(2, "other metadata")
		j.guard("other", nil)
		expect(2, "rules about another room change nothing")
		j.rules.Add(Pattern{Regexp: regexp.MustCompile("^r")}, Options{})
		expect(3, "other rules")
		j.Invalidate("c")
		expect(4, "on request")
		j.Invalidate("nobody")
		j.RemoveConn("nobody")
		j.AddConn("c")
		expect(5, "another connection of that id: nothing of the earlier one's")
		j.end()
	})
}

func TestAllowedKeepsNo(t *testing.T) {
	t.Parallel()
	j := newCacheRig(t)
	g, asked := says(false, nil)
	j.guard("r", g)
	for range 3 {
		ok, err := j.ask("r")
		require.NoError(t, err)
		require.False(t, ok)
	}
	assert.EqualValues(t, 1, asked.Load())
	assert.EqualValues(t, 1, j.Cache.Stats().Refused)
	allowed, known := j.known("c", j.member, "r")
	assert.Equal(t, []bool{false, true}, []bool{allowed, known})
}

func TestAllowedFailureIsBrief(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		var asked atomic.Int64
		j.guard("r", func(context.Context, Member, string) (bool, error) {
			if asked.Add(1) == 1 {
				return false, errors.New("database away")
			}
			return true, nil
		})
		for range 3 {
			ok, err := j.ask("r")
			require.ErrorIs(t, err, errs.Refused)
			require.False(t, ok)
		}
		assert.EqualValues(t, 1, asked.Load())
		allowed, known := j.known("c", j.member, "r")
		assert.Equal(t, []bool{false, true}, []bool{allowed, known})
		time.Sleep(FailedFor)
		_, known = j.known("c", j.member, "r")
		assert.False(t, known)
		ok, err := j.ask("r")
		require.NoError(t, err)
		assert.True(t, ok)
		j.end()
	})
}

func TestAllowedIsShared(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		var asked atomic.Int64
		j.guard("r", func(context.Context, Member, string) (bool, error) {
			asked.Add(1)
			time.Sleep(time.Second)
			return true, nil
		})
		// The first caller gives up. The others still wait for the same answer.
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := j.allowed(ctx, "c", j.member, "r")
			assert.ErrorIs(t, err, context.Canceled)
		})
		synctest.Wait()
		for range 50 {
			wg.Go(func() {
				ok, err := j.ask("r")
				assert.NoError(t, err)
				assert.True(t, ok)
			})
		}
		synctest.Wait()
		_, known := j.known("c", j.member, "r")
		assert.False(t, known, "under way")
		cancel()
		wg.Wait()
		assert.EqualValues(t, 1, asked.Load())
		j.end()
	})
}

func TestAllowedMetadataChangesMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		j.setMeta(`admin`)
		var asked atomic.Int64
		j.guard("r", func(_ context.Context, m Member, _ string) (bool, error) {
			asked.Add(1)
			time.Sleep(time.Second)
			return string(m.Metadata) == "admin", nil
		})
		time.AfterFunc(500*time.Millisecond, func() { j.setMeta(`nobody`) })
		started := time.Now()
		ok, err := j.ask("r")
		require.NoError(t, err)
		assert.False(t, ok, "the answer is about what it is now")
		assert.EqualValues(t, 2, asked.Load())
		assert.Equal(t, 2*time.Second, time.Since(started))

		// The metadata changes for ever. The time limit still holds.
		j.Invalidate("c")
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			for ctx.Err() == nil {
				time.Sleep(900 * time.Millisecond)
				j.setMeta(`admin`)
			}
		})
		started = time.Now()
		_, err = j.ask("r")
		require.ErrorIs(t, err, errs.Refused)
		assert.Equal(t, 5*time.Second, time.Since(started))
		cancel()
		wg.Wait()
		j.end()
	})
}

func TestAllowedOldQuestionKeepsNewAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		var asked atomic.Int64
		j.guard("r", func(context.Context, Member, string) (bool, error) { asked.Add(1); return true, nil })
		j.setMeta(`new`)
		_, err := j.ask("r")
		require.NoError(t, err)
		// A caller that read the version before the change finds the newer answer and
		// reads again.
		reads := 0
		ok, err := j.allowed(t.Context(), "c", func() (Member, uint64) {
			if reads++; reads == 1 {
				return Member{ID: "c"}, 1
			}
			return j.member()
		}, "r")
		require.NoError(t, err)
		assert.True(t, ok)
		assert.EqualValues(t, 1, asked.Load())
		// A version that went back is a change like any other.
		ok, err = j.allowed(t.Context(), "c", func() (Member, uint64) { return Member{ID: "c"}, 1 }, "r")
		require.NoError(t, err)
		assert.True(t, ok)
		assert.EqualValues(t, 2, asked.Load())
		j.end()
	})
}

func TestInvalidateMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		var asked atomic.Int64
		var banned atomic.Bool
		j.guard("r", func(context.Context, Member, string) (bool, error) {
			asked.Add(1)
			was := banned.Load()
			time.Sleep(time.Second) // ignores its context
			return !was, nil
		})
		time.AfterFunc(500*time.Millisecond, func() { banned.Store(true); j.Invalidate("c") })
		ok, err := j.ask("r")
		require.NoError(t, err)
		assert.False(t, ok)
		assert.EqualValues(t, 2, asked.Load())
		j.end()
	})
}

func TestForget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		g, _ := says(true, nil)
		j.guard("r", g)
		j.guard("slow", func(ctx context.Context, _ Member, _ string) (bool, error) { <-ctx.Done(); return true, nil })
		_, err := j.ask("r")
		require.NoError(t, err)
		assert.Equal(t, 1, j.Cache.keptInAll())

		time.AfterFunc(time.Second, func() { j.RemoveConn("c") })
		started := time.Now()
		_, err = j.ask("slow")
		assert.ErrorIs(t, err, errs.UnknownConnection)
		assert.Equal(t, time.Second, time.Since(started), "the waiting caller returns at once")
		_, err = j.ask("r")
		assert.ErrorIs(t, err, errs.UnknownConnection)
		allowed, known := j.known("c", j.member, "r")
		assert.Equal(t, []bool{false, true}, []bool{allowed, known})
		assert.Zero(t, j.Cache.keptInAll())
		assert.Empty(t, j.conns)

		j.AddConn("c")
		ok, err := j.ask("r")
		require.NoError(t, err)
		assert.True(t, ok)
		j.end()
	})
}
