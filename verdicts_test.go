package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// judge is a verdicts under test, with one connection "c" whose metadata the
// test changes.
type judge struct {
	*verdicts
	t   *testing.T
	log *textLog

	mu      sync.Mutex // guards meta, version
	meta    string
	version uint64
}

func newJudge(t *testing.T) *judge {
	t.Helper()
	j := &judge{t: t, log: &textLog{}, meta: `{}`, version: 1}
	calls := newCallbacks(t.Context(), j.log.logger())
	o := Options{GuardTimeout: 5 * time.Second, HookTimeout: 3 * time.Second,
		Limits: Limits{RoomsPerConnection: 10, SubscriptionsPerConnection: 10}}
	j.verdicts = newVerdicts(&ruleSet{}, calls, o)
	j.remember("c")
	return j
}

func (j *judge) member() (Member, uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return Member{ID: "c", Metadata: json.RawMessage(j.meta)}, j.version
}

func (j *judge) setMeta(meta string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.meta, j.version = meta, j.version+1
}

func (j *judge) guard(room string, g Guard) {
	j.t.Helper()
	require.NoError(j.t, j.rules.add(Exact(room), PresenceOptions{Guard: g}))
}

func (j *judge) ask(room string) (bool, error) {
	return j.allowed(j.t.Context(), "c", j.member, room)
}

// end waits for every goroutine.
func (j *judge) end() {
	j.t.Helper()
	require.NoError(j.t, j.calls.close(j.t.Context()))
	synctest.Wait()
	assert.Zero(j.t, j.verdicts.stats().Strays)
}

// says returns a guard with a fixed answer, and how often it was asked.
func says(ok bool, err error) (Guard, *atomic.Int64) {
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
		guard Guard
		ok    bool
		is    []error
		isNot []error
	}{
		"yes":                       {guard: func(context.Context, Member, string) (bool, error) { return true, nil }, ok: true},
		"no":                        {guard: func(context.Context, Member, string) (bool, error) { return false, nil }},
		"error":                     {guard: func(context.Context, Member, string) (bool, error) { return true, boom }, is: []error{ErrRefused}},
		"an error of ours":          {guard: func(context.Context, Member, string) (bool, error) { return true, ErrNotTracked }, is: []error{ErrRefused}, isNot: []error{ErrNotTracked}},
		"redis away":                {guard: func(context.Context, Member, string) (bool, error) { return true, ErrUnavailable }, is: []error{ErrRefused, ErrUnavailable}},
		"panic":                     {guard: func(context.Context, Member, string) (bool, error) { panic("ouch") }, is: []error{ErrRefused}},
		"hangs":                     {guard: func(context.Context, Member, string) (bool, error) { time.Sleep(time.Minute); return true, nil }, is: []error{ErrRefused, context.DeadlineExceeded}},
		"gives up with its context": {guard: func(ctx context.Context, _ Member, _ string) (bool, error) { <-ctx.Done(); return true, ctx.Err() }, is: []error{ErrRefused, context.DeadlineExceeded}},
		"says yes too late": {guard: func(ctx context.Context, _ Member, _ string) (bool, error) {
			<-ctx.Done()
			time.Sleep(time.Nanosecond)
			return true, nil
		}, is: []error{ErrRefused, context.DeadlineExceeded}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				j := newJudge(t)
				j.setMeta(`{"secret":1}`)
				j.guard("r", tc.guard)
				require.NoError(t, j.rules.add(Exact("j"), PresenceOptions{JoinGuard: tc.guard}))
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
	j := newJudge(t)
	_, err := j.ask("r")
	assert.ErrorIs(t, err, ErrNotTracked)
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
	assert.Zero(t, j.verdicts.stats().Kept)
}

func TestAllowedIsKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJudge(t)
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
		require.NoError(t, j.rules.add(Regexp(mustCompile("^r")), PresenceOptions{}))
		expect(3, "other rules")
		j.invalidate("c")
		expect(4, "on request")
		j.invalidate("nobody")
		j.forget("nobody")
		j.remember("c")
		expect(5, "another connection of that id: nothing of the earlier one's")
		j.end()
	})
}

func TestAllowedKeepsNo(t *testing.T) {
	t.Parallel()
	j := newJudge(t)
	g, asked := says(false, nil)
	j.guard("r", g)
	for range 3 {
		ok, err := j.ask("r")
		require.NoError(t, err)
		require.False(t, ok)
	}
	assert.EqualValues(t, 1, asked.Load())
	assert.EqualValues(t, 1, j.verdicts.stats().Refused)
	allowed, known := j.known("c", j.member, "r")
	assert.Equal(t, []bool{false, true}, []bool{allowed, known})
}

func TestAllowedFailureIsBrief(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJudge(t)
		var asked atomic.Int64
		j.guard("r", func(context.Context, Member, string) (bool, error) {
			if asked.Add(1) == 1 {
				return false, errors.New("database away")
			}
			return true, nil
		})
		for range 3 {
			ok, err := j.ask("r")
			require.ErrorIs(t, err, ErrRefused)
			require.False(t, ok)
		}
		assert.EqualValues(t, 1, asked.Load())
		allowed, known := j.known("c", j.member, "r")
		assert.Equal(t, []bool{false, true}, []bool{allowed, known})
		time.Sleep(failedFor)
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
		j := newJudge(t)
		var asked atomic.Int64
		j.guard("r", func(context.Context, Member, string) (bool, error) {
			asked.Add(1)
			time.Sleep(time.Second)
			return true, nil
		})
		// The first asker leaves; those who came to its question stay.
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
		j := newJudge(t)
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

		// It changes for ever: the time limit holds all the same.
		j.invalidate("c")
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
		require.ErrorIs(t, err, ErrRefused)
		assert.Equal(t, 5*time.Second, time.Since(started))
		cancel()
		wg.Wait()
		j.end()
	})
}

func TestAllowedOldQuestionKeepsNewVerdict(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJudge(t)
		var asked atomic.Int64
		j.guard("r", func(context.Context, Member, string) (bool, error) { asked.Add(1); return true, nil })
		j.setMeta(`new`)
		_, err := j.ask("r")
		require.NoError(t, err)
		// An asker that read the version before the change finds the newer
		// verdict and reads again.
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
		// A version that did go back is a change like any other.
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
		j := newJudge(t)
		var asked atomic.Int64
		var banned atomic.Bool
		j.guard("r", func(context.Context, Member, string) (bool, error) {
			asked.Add(1)
			was := banned.Load()
			time.Sleep(time.Second) // ignores its context
			return !was, nil
		})
		time.AfterFunc(500*time.Millisecond, func() { banned.Store(true); j.invalidate("c") })
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
		j := newJudge(t)
		g, _ := says(true, nil)
		j.guard("r", g)
		j.guard("slow", func(ctx context.Context, _ Member, _ string) (bool, error) { <-ctx.Done(); return true, nil })
		_, err := j.ask("r")
		require.NoError(t, err)
		assert.Equal(t, 1, j.verdicts.stats().Kept)

		time.AfterFunc(time.Second, func() { j.forget("c") })
		started := time.Now()
		_, err = j.ask("slow")
		assert.ErrorIs(t, err, ErrUnknownConnection)
		assert.Equal(t, time.Second, time.Since(started), "who waited is told at once")
		_, err = j.ask("r")
		assert.ErrorIs(t, err, ErrUnknownConnection)
		allowed, known := j.known("c", j.member, "r")
		assert.Equal(t, []bool{false, true}, []bool{allowed, known})
		assert.Zero(t, j.verdicts.stats().Kept)
		assert.Empty(t, j.conns)

		j.remember("c")
		ok, err := j.ask("r")
		require.NoError(t, err)
		assert.True(t, ok)
		j.end()
	})
}
