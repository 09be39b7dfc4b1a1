package guards

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
)

// hangs asks the guard of a room, which hangs, about a number of connections, and waits
// until each has been refused.
func (j *cacheRig) hangs(room string, conns int) {
	var all sync.WaitGroup
	for i := range conns {
		id := fmt.Sprint(room, i)
		j.AddConn(id)
		all.Go(func() {
			_, err := j.allowed(j.t.Context(), id, func() (Member, uint64) { return Member{ID: id}, 1 }, room)
			assert.ErrorIs(j.t, err, context.DeadlineExceeded)
		})
	}
	all.Wait()
	synctest.Wait()
}

// A rule whose guards hang has its own budget. While it is used up, connections that had a
// yes keep it.
func TestOneRuleHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		release := make(chan struct{})
		var how atomic.Value // the guard's behaviour for connection c
		how.Store("yes")
		j.guard("hung", func(_ context.Context, m Member, _ string) (bool, error) {
			if m.ID != "c" && m.ID != "d" {
				<-release
			}
			switch how.Load() {
			case "error":
				return true, errors.New("broken")
			case "panic":
				panic("ouch")
			}
			return how.Load() == "yes", nil
		})
		fine, _ := says(true, nil)
		j.guard("fine", fine)
		j.rules.Add(Pattern{Exact: "join"}, Options{JoinGuard: fine})
		j.rules.Add(Pattern{Regexp: regexp.MustCompile("^(hung|both)$")}, Options{Guard: fine})
		ask := func(conn, room string) (bool, error) {
			return j.allowed(t.Context(), conn, j.member, room)
		}
		ok, err := ask("c", "hung")
		require.NoError(t, err)
		require.True(t, ok)

		j.hangs("hung", maxHangingPerRule)
		for _, room := range []string{"fine", "both"} {
			ok, err = ask("c", room)
			require.NoError(t, err, room)
			assert.True(t, ok, "guards of other rules are asked: %s", room)
		}
		ok, err = j.joinAllowed(t.Context(), "c", j.member, "join")
		require.NoError(t, err)
		assert.True(t, ok)

		how.Store("no")
		for _, change := range []func(){func() { j.setMeta(`{"x":1}`) }, func() { j.Invalidate("c") }, func() { j.guard("other", nil) }} {
			change()
			ok, err = ask("c", "hung")
			require.NoError(t, err)
			assert.True(t, ok, "a yes stands")
		}
		j.AddConn("d")
		_, err = ask("d", "hung")
		assert.ErrorIs(t, err, errs.Busy, "there was none")
		assert.Equal(t, 1, strings.Count(j.log.String(), `rule="\"hung\""`), "logged once: %s", j.log)

		close(release)
		synctest.Wait()
		ok, err = ask("c", "hung")
		require.NoError(t, err)
		assert.False(t, ok, "it is asked as soon as that is possible")
		j.end()
	})
}

// A failure is a no. It does not become a yes because the budget is used up.
func TestAFailureIsNoEarlierYes(t *testing.T) {
	t.Parallel()
	for _, failure := range []string{"error", "panic", "no", "hang"} {
		t.Run(failure, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				j := newCacheRig(t)
				release := make(chan struct{})
				var fails atomic.Bool
				j.guard("hung", func(_ context.Context, m Member, _ string) (bool, error) {
					switch {
					case m.ID != "c" || fails.Load() && failure == "hang":
						<-release
					case fails.Load() && failure == "error":
						return true, errors.New("broken")
					case fails.Load() && failure == "panic":
						panic("ouch")
					}
					return !fails.Load(), nil
				})
				ok, err := j.ask("hung")
				require.NoError(t, err)
				require.True(t, ok)
				fails.Store(true)
				j.setMeta(`{"x":1}`)
				ok, _ = j.ask("hung")
				require.False(t, ok)
				j.hangs("hung", maxHangingPerRule)
				j.setMeta(`{"x":2}`)
				ok, err = j.ask("hung")
				assert.False(t, ok)
				assert.ErrorIs(t, err, errs.Busy)
				close(release)
				j.end()
			})
		})
	}
}

// A connection has a budget for each rule.
func TestOneRuleHangsForAConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newCacheRig(t)
		release := make(chan struct{})
		j.rules.Add(Pattern{Regexp: regexp.MustCompile("^hung")}, Options{
			Guard: func(context.Context, Member, string) (bool, error) { <-release; return true, nil },
		})
		fine, _ := says(true, nil)
		j.guard("fine", fine)
		var all sync.WaitGroup
		for i := range maxHangingPerConn {
			all.Go(func() { _, _ = j.ask(fmt.Sprint("hung", i)) })
		}
		all.Wait()
		synctest.Wait()
		_, err := j.ask("hung more")
		assert.ErrorIs(t, err, errs.Busy)
		ok, err := j.ask("fine")
		require.NoError(t, err)
		assert.True(t, ok)
		close(release)
		j.end()
	})
}
