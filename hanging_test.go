package mesh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// hangs asks the guard of a room that hangs for so many connections, and waits
// until each has been refused.
func (j *judge) hangs(room string, conns int) {
	var all sync.WaitGroup
	for i := range conns {
		id := fmt.Sprint(room, i)
		j.remember(id)
		all.Go(func() {
			_, err := j.allowed(j.t.Context(), id, func() (Member, uint64) { return Member{ID: id}, 1 }, room)
			assert.ErrorIs(j.t, err, context.DeadlineExceeded)
		})
	}
	all.Wait()
	synctest.Wait()
}

// TestOneRuleHangs: its budget is its own. Connections that had a yes keep it, as
// long as it is used up.
func TestOneRuleHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJudge(t)
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
		require.NoError(t, j.rules.add(Exact("join"), PresenceOptions{JoinGuard: fine}))
		require.NoError(t, j.rules.add(Regexp(mustCompile("^(hung|both)$")), PresenceOptions{Guard: fine}))
		ask := func(conn, room string) (bool, error) {
			return j.allowed(t.Context(), conn, j.member, room)
		}
		ok, err := ask("c", "hung")
		require.NoError(t, err)
		require.True(t, ok)

		j.hangs("hung", straysAll)
		for _, room := range []string{"fine", "both"} {
			ok, err = ask("c", room)
			require.NoError(t, err, room)
			assert.True(t, ok, "guards of other rules are asked: %s", room)
		}
		ok, err = j.joinAllowed(t.Context(), "c", j.member, "join")
		require.NoError(t, err)
		assert.True(t, ok)

		how.Store("no")
		for _, change := range []func(){func() { j.setMeta(`{"x":1}`) }, func() { j.invalidate("c") }, func() { j.guard("other", nil) }} {
			change()
			ok, err = ask("c", "hung")
			require.NoError(t, err)
			assert.True(t, ok, "a yes stands")
		}
		j.remember("d")
		_, err = ask("d", "hung")
		assert.ErrorIs(t, err, ErrBusy, "there was none")
		assert.Equal(t, 1, strings.Count(j.log.String(), `rule="\"hung\""`), "logged once: %s", j.log)

		close(release)
		synctest.Wait()
		ok, err = ask("c", "hung")
		require.NoError(t, err)
		assert.False(t, ok, "it is asked as soon as that is possible")
		j.end()
	})
}

// A failure is a no, which does not become a yes by the budget.
func TestAFailureIsNoEarlierYes(t *testing.T) {
	t.Parallel()
	for _, failure := range []string{"error", "panic", "no", "hang"} {
		t.Run(failure, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				j := newJudge(t)
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
				j.hangs("hung", straysAll)
				j.setMeta(`{"x":2}`)
				ok, err = j.ask("hung")
				assert.False(t, ok)
				assert.ErrorIs(t, err, ErrBusy)
				close(release)
				j.end()
			})
		})
	}
}

// The budget of one connection is one for each rule, too.
func TestOneRuleHangsForAConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		j := newJudge(t)
		release := make(chan struct{})
		require.NoError(t, j.rules.add(Regexp(mustCompile("^hung")), PresenceOptions{
			Guard: func(context.Context, Member, string) (bool, error) { <-release; return true, nil },
		}))
		fine, _ := says(true, nil)
		j.guard("fine", fine)
		var all sync.WaitGroup
		for i := range straysPerConn {
			all.Go(func() { _, _ = j.ask(fmt.Sprint("hung", i)) })
		}
		all.Wait()
		synctest.Wait()
		_, err := j.ask("hung more")
		assert.ErrorIs(t, err, ErrBusy)
		ok, err := j.ask("fine")
		require.NoError(t, err)
		assert.True(t, ok)
		close(release)
		j.end()
	})
}

// Through the server: subscriptions and members stay while their guards cannot be
// asked, and are asked about when they can.
func TestWhileABudgetIsUsedUp(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		log := &textLog{}
		p := w.manager(func(o *Options) { o.Logger, o.GuardTimeout, o.HookTimeout = log.logger(), time.Second, time.Second })
		release := make(chan struct{})
		var no, hang sync.Map
		guard := func(_ context.Context, m Member, _ string) (bool, error) {
			if _, ok := hang.Load(m.ID); ok {
				<-release
			}
			_, out := no.Load(m.ID)
			return !out, nil
		}
		require.NoError(t, p.TrackPresence(Exact("doc"), PresenceOptions{Guard: guard, JoinGuard: guard}))
		require.NoError(t, p.TrackPresence(Exact("other"), PresenceOptions{Guard: func(_ context.Context, m Member, _ string) (bool, error) {
			return m.ID == "new", nil
		}}))
		for _, id := range []string{"good", "bad", "new", "busy"} {
			require.NoError(t, p.Connect(ctx, id, nil))
		}
		for _, id := range []string{"good", "bad"} {
			require.NoError(t, p.Join(ctx, "doc", id))
		}
		good, bad := w.tap(p, "doc", SubscribeOptions{Viewer: "good"}), w.tap(p, "doc", SubscribeOptions{Viewer: "bad"})
		good.wait(w, 1)
		bad.wait(w, 1)

		var all sync.WaitGroup
		for i := range straysAll {
			id := fmt.Sprint("h", i)
			hang.Store(id, true)
			require.NoError(t, p.Connect(ctx, id, nil))
			all.Go(func() { assert.ErrorIs(t, p.Join(ctx, "doc", id), ErrRefused) })
		}
		all.Wait()
		w.sleep(time.Second)
		require.EqualValues(t, straysAll, p.Stats().GuardsHanging)

		no.Store("bad", true)
		require.NoError(t, p.Connections().SetMetadata(ctx, "bad", "changed", MetadataOptions{}))
		require.NoError(t, p.Rooms().Recheck(ctx, "doc"))
		require.NoError(t, p.Join(ctx, "doc", "good"), "it is in")
		require.ErrorIs(t, p.Join(ctx, "doc", "new"), ErrRefused)
		for _, err := range w.tap(p, "other", SubscribeOptions{Viewer: "new"}).wait(w, 1) {
			require.NotNil(t, err)
		}
		w.sleep(time.Minute)
		n, err := p.Count(ctx, "doc")
		require.NoError(t, err)
		require.Equal(t, 2, n)
		require.NoError(t, p.PublishState(ctx, "doc", "good", map[string]int{"n": 1}, StateOptions{}))
		w.sleep(2 * time.Second)
		require.Equal(t, EventState, good.got()[len(good.got())-1].Type)
		require.Contains(t, log.String(), "too many calls of the rule's guards hang")

		close(release)
		w.sleep(2 * time.Second)
		require.ErrorIs(t, bad.end(w), ErrRefused)
		ids, err := p.PresentConnections(ctx, "doc")
		require.NoError(t, err)
		require.Equal(t, []string{"good"}, ids)
	})
}
