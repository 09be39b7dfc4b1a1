package guards

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/errs"
)

func TestHungGuards(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		release := make(chan struct{})
		var asked atomic.Int64
		hang := func(context.Context, Member, string) (bool, error) { asked.Add(1); <-release; return true, nil }
		j.guard("hung", hang)
		fine, _ := says(true, nil)
		j.guard("fine", fine)

		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := j.ask("hung")
			assert.ErrorIs(t, err, context.DeadlineExceeded)
		})
		synctest.Wait()
		started := time.Now()
		ok, err := j.ask("fine")
		require.NoError(t, err)
		assert.True(t, ok)
		assert.Zero(t, time.Since(started), "no other question waits")
		wg.Wait()
		synctest.Wait()
		assert.EqualValues(t, 1, j.Cache.Stats().Hanging)

		time.Sleep(time.Minute)
		started = time.Now()
		_, err = j.ask("hung")
		assert.ErrorIs(t, err, errs.Refused)
		assert.Zero(t, time.Since(started), "refused at once while it hangs")
		assert.EqualValues(t, 1, asked.Load(), "one goroutine per question")

		close(release)
		synctest.Wait()
		assert.Zero(t, j.Cache.Stats().Hanging)
		ok, err = j.ask("hung")
		require.NoError(t, err)
		assert.True(t, ok, "it recovers")
		j.end()
	})
}

func TestHungGuardsPerConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		release := make(chan struct{})
		j.guard("r", func(_ context.Context, m Member, _ string) (bool, error) {
			if m.ID == "c" {
				<-release
			}
			return true, nil
		})
		// Each change of the metadata leaves a call that hangs.
		var wg sync.WaitGroup
		for range maxHangingPerConn + 1 {
			wg.Go(func() { _, _ = j.ask("r") })
			synctest.Wait()
			j.setMeta(`{}`)
		}
		started := time.Now()
		_, err := j.ask("r")
		assert.ErrorIs(t, err, errs.Busy)
		assert.ErrorIs(t, err, errs.Refused)
		assert.Zero(t, time.Since(started))
		assert.EqualValues(t, maxHangingPerConn, j.Cache.Stats().Hanging)
		assert.NotZero(t, j.Cache.Stats().Busy)

		j.AddConn("d")
		ok, err := j.allowed(t.Context(), "d", func() (Member, uint64) { return Member{ID: "d"}, 1 }, "r")
		require.NoError(t, err)
		assert.True(t, ok, "others are still asked about")
		close(release)
		wg.Wait()
		j.end()
	})
}

func TestHungGuardsInAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		release := make(chan struct{})
		j.rules.Add(Pattern{Exact: "r"}, Options{
			Guard:     func(context.Context, Member, string) (bool, error) { <-release; return true, nil },
			JoinGuard: func(context.Context, Member, string) (bool, error) { return true, nil },
		})
		var wg sync.WaitGroup
		for i := range maxHangingPerRule {
			id := fmt.Sprint(i)
			j.AddConn(id)
			wg.Go(func() {
				_, err := j.allowed(t.Context(), id, func() (Member, uint64) { return Member{ID: id}, 1 }, "r")
				assert.ErrorIs(t, err, context.DeadlineExceeded)
			})
		}
		wg.Wait()
		synctest.Wait()
		assert.EqualValues(t, maxHangingPerRule, j.Cache.Stats().Hanging)
		_, err := j.ask("r")
		assert.ErrorIs(t, err, errs.Busy)
		_, err = j.joinAllowed(t.Context(), "c", j.member, "r")
		assert.ErrorIs(t, err, errs.Busy)
		for i := range maxHangingPerRule {
			j.RemoveConn(fmt.Sprint(i))
		}
		assert.EqualValues(t, maxHangingPerRule, j.Cache.Stats().Hanging, "counted until they return")
		close(release)
		synctest.Wait()
		ok, err := j.ask("r")
		require.NoError(t, err)
		assert.True(t, ok)
		j.end()
	})
}

func TestKeptAnswersAreBounded(t *testing.T) {
	t.Parallel()
	j := newCacheRig(t)
	g, _ := says(true, nil)
	for i := range 3 * j.keep {
		room := fmt.Sprint(i)
		j.guard(room, g)
	}
	for i := range 3 * j.keep {
		ok, err := j.ask(fmt.Sprint(i))
		require.NoError(t, err)
		require.True(t, ok)
		require.LessOrEqual(t, j.Cache.keptInAll(), j.keep)
	}
}

func TestGuardsGetACopy(t *testing.T) {
	t.Parallel()
	j := newCacheRig(t)
	shared := json.RawMessage(`{"a":1}`)
	j.guard("r", func(_ context.Context, m Member, room string) (bool, error) {
		m.Metadata[0] = 'x'
		return room == "r" && m.ID == "c", nil
	})
	ok, err := j.allowed(t.Context(), "c", func() (Member, uint64) { return Member{ID: "c", Metadata: shared}, 1 }, "r")
	require.NoError(t, err)
	assert.True(t, ok)
	assert.Equal(t, `{"a":1}`, string(shared))
}

func TestGuardsStopAtTheFirstNo(t *testing.T) {
	t.Parallel()
	j := newCacheRig(t)
	no, _ := says(false, nil)
	yes, asked := says(true, nil)
	j.guard("r", no)
	j.rules.Add(Pattern{Regexp: regexp.MustCompile("^r")}, Options{Guard: yes})
	ok, err := j.ask("r")
	require.NoError(t, err)
	assert.False(t, ok)
	assert.Zero(t, asked.Load())
}

func TestJoinAllowed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		yes, asked := says(true, nil)
		j.rules.Add(Pattern{Exact: "r"}, Options{JoinGuard: yes})
		j.rules.Add(Pattern{Exact: "slow"}, Options{
			JoinGuard: func(ctx context.Context, _ Member, _ string) (bool, error) { <-ctx.Done(); return true, ctx.Err() },
		})
		for range 3 {
			ok, err := j.joinAllowed(t.Context(), "c", j.member, "r")
			require.NoError(t, err)
			require.True(t, ok)
		}
		assert.EqualValues(t, 3, asked.Load(), "asked each time")
		started := time.Now()
		_, err := j.joinAllowed(t.Context(), "c", j.member, "slow")
		assert.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, 3*time.Second, time.Since(started), "HookTimeout")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, err = j.joinAllowed(ctx, "c", j.member, "slow")
		assert.Equal(t, context.Canceled, err)
		_, err = j.joinAllowed(t.Context(), "nobody", j.member, "r")
		assert.ErrorIs(t, err, errs.UnknownConnection)
		j.end()
		_, err = j.joinAllowed(t.Context(), "c", j.member, "r")
		assert.ErrorIs(t, err, errs.Closed)
	})
}

func TestCacheShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		j.guard("r", func(ctx context.Context, _ Member, _ string) (bool, error) { <-ctx.Done(); return true, ctx.Err() })
		time.AfterFunc(time.Second, func() { _ = j.calls.Close(t.Context()) })
		started := time.Now()
		ok, err := j.ask("r")
		assert.False(t, ok)
		assert.ErrorIs(t, err, errs.Closed)
		assert.Equal(t, time.Second, time.Since(started))
		j.end()
	})
}

func TestCacheConcurrent(t *testing.T) {
	t.Parallel()
	j := newCacheRig(t)
	j.calls = callbacks.New(t.Context(), callbacks.Config{})
	for i := range 8 {
		j.guard(fmt.Sprint(i), func(_ context.Context, m Member, _ string) (bool, error) {
			switch {
			case i == 7:
				panic("ouch")
			case i == 6:
				return false, errors.New("broken")
			}
			return string(m.Metadata) != "no", nil
		})
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for n := range 300 {
				switch room := fmt.Sprint(n % 8); {
				case g == 0 && n%10 == 0:
					j.setMeta([]string{"yes", "no"}[n/10%2])
				case g == 1 && n%20 == 0:
					j.Invalidate("c")
				case g == 2 && n%50 == 0:
					j.RemoveConn("c")
					j.AddConn("c")
				case g == 3:
					_, _ = j.known("c", j.member, room)
				case g == 4:
					_, _ = j.joinAllowed(t.Context(), "c", j.member, room)
				default:
					_, _ = j.ask(room)
				}
			}
		})
	}
	wg.Wait()
	j.setMeta("no")
	ok, err := j.ask("0")
	require.NoError(t, err)
	assert.False(t, ok)
	j.setMeta("yes")
	ok, err = j.ask("0")
	require.NoError(t, err)
	assert.True(t, ok)
	require.NoError(t, j.calls.Close(t.Context()))
	assert.Zero(t, j.Cache.Stats().Hanging)
}

func BenchmarkAllowedKept(b *testing.B) {
	rules := &RuleSet{}
	v := NewCache(Config{Rules: rules, Calls: callbacks.New(b.Context(), callbacks.Config{Logger: slog.New(slog.DiscardHandler)}), GuardTimeout: time.Second})
	g, _ := says(true, nil)
	rules.Add(Pattern{Exact: "r"}, Options{Guard: g})
	v.AddConn("c")
	member := func() (Member, uint64) { return Member{ID: "c"}, 1 }
	b.ReportAllocs()
	for b.Loop() {
		if ok, err := v.allowed(b.Context(), "c", member, "r"); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}
