package mesh

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func clearState(p *peer, room string) string {
	p.t.Helper()
	return string(p.call("mesh/clear-presence-state", map[string]any{"roomName": room}))
}

// statesOf returns the states of a connection that a peer was told.
func (p *peer) statesOf(conn string) []string {
	var list []string
	for _, u := range p.got() {
		if u.Type == "state" && u.ConnectionID == conn {
			list = append(list, string(u.State))
		}
	}
	return list
}

// expectStates waits until a peer was told exactly these states of a
// connection, in that order.
func (p *peer) expectStates(within time.Duration, conn string, want ...string) {
	p.t.Helper()
	p.w.eventually(within, func() bool { return len(p.statesOf(conn)) >= len(want) }, "states %v, got %v", want, p.statesOf(conn))
	require.Equal(p.t, want, p.statesOf(conn))
}

func TestStateIsToldReplacedAndCleared(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2, s3 := w.tracked(), w.tracked(), w.tracked()
		watchers, raw := subscribers("lobby", s1, s2, s3), w.client()
		a := s1.dial()
		require.Equal(t, "false", a.state("lobby", map[string]any{"n": 0}), "not in the room yet")
		require.Equal(t, "false", clearState(a, "lobby"))
		a.join("lobby")
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 1}))
		stored, err := raw.Get(t.Context(), w.stateKey("lobby", a.id)).Result()
		require.NoError(t, err)
		require.JSONEq(t, `{"n":1}`, stored)
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 2}))
		stored, err = raw.Get(t.Context(), w.stateKey("lobby", a.id)).Result()
		require.NoError(t, err)
		require.JSONEq(t, `{"n":2}`, stored)
		require.Zero(t, keyLife(t, raw, w.stateKey("lobby", a.id)), "it lives as long as the entry")
		require.Equal(t, "true", clearState(a, "lobby"))
		require.Equal(t, "true", clearState(a, "lobby"), "there is none any more: nobody is told")
		require.False(t, keyExists(t, raw, w.stateKey("lobby", a.id)))
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 3}))
		for _, p := range watchers {
			p.expectStates(2*time.Second, a.id, `{"n":1}`, `{"n":2}`, "null", `{"n":3}`)
		}
		late := s2.dial().subscribe("lobby")
		require.JSONEq(t, `{"n":3}`, string(late.States[a.id]))
	})
}

func TestStateExpiresOnceForEverySubscriber(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2, s3 := w.tracked(), w.tracked(), w.tracked()
		watchers, raw := subscribers("lobby", s1, s2, s3, s1), w.client()
		a := s1.dial()
		a.join("lobby")
		began := time.Now()
		require.Equal(t, "true", a.state("lobby", map[string]any{"typing": true}, map[string]any{"expireAfter": 600}))
		life := keyLife(t, raw, w.stateKey("lobby", a.id))
		require.Greater(t, life, 300*time.Millisecond)
		require.LessOrEqual(t, life, 600*time.Millisecond)
		for _, p := range watchers {
			p.expectStates(1600*time.Millisecond, a.id, `{"typing":true}`, "null")
		}
		require.GreaterOrEqual(t, time.Since(began), 600*time.Millisecond)
		w.sleep(700 * time.Millisecond) // expired events would have been acted on by now
		for _, p := range watchers {
			p.expectStates(0, a.id, `{"typing":true}`, "null")
			require.Equal(t, 0, p.count("leave", ""))
		}
		require.False(t, keyExists(t, raw, w.stateKey("lobby", a.id)))
		require.Empty(t, s2.dial().subscribe("lobby").States)
	})
}

func TestAnOlderStatesExpiryDoesNotEndANewerOne(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		watchers, raw := subscribers("lobby", s1, s2), w.client()
		a := s1.dial()
		a.join("lobby")
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 300}))
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 2}))
		w.sleep(time.Second)
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 3}, map[string]any{"expireAfter": 300}))
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 4}, map[string]any{"expireAfter": 60_000}))
		w.sleep(time.Second)
		for _, p := range watchers {
			p.expectStates(time.Second, a.id, `{"n":1}`, `{"n":2}`, `{"n":3}`, `{"n":4}`)
		}
		require.True(t, keyExists(t, raw, w.stateKey("lobby", a.id)))
		// A shorter life than before counts too.
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 5}, map[string]any{"expireAfter": 100}))
		for _, p := range watchers {
			p.expectStates(time.Second, a.id, `{"n":1}`, `{"n":2}`, `{"n":3}`, `{"n":4}`, `{"n":5}`, "null")
		}
	})
}

func TestSilentStateIsStoredAndToldNobody(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		watchers := subscribers("lobby", s1, s2)
		a := s1.dial()
		a.join("lobby")
		silent := map[string]any{"silent": true}
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 1}, silent))
		for _, s := range []*testServer{s1, s2} {
			w.eventually(2*time.Second, func() bool {
				return string(s.dial().subscribe("lobby").States[a.id]) == `{"n":1}`
			}, "snapshots show it")
			require.JSONEq(t, `{"n":1}`, string(s.dial().room("mesh/get-presence-state", "lobby").States[a.id]))
		}
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 2}))
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 3}, silent))
		a.leave("lobby")
		for _, p := range watchers {
			p.expect(2*time.Second, "leave", a.id)
			p.expectStates(0, a.id, `{"n":2}`)
		}
	})
}

// A state ends with its entry: the leave says so, and no state null follows.
func TestStateEndsWithItsEntry(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.server(), w.server()
		for _, s := range []*testServer{s1, s2} {
			s.track(".*", PresenceOptions{TTL: time.Second})
		}
		watchers, raw := subscribers("lobby", s1, s2), w.client()
		leaver, closer, silent := s1.dial(), s1.dial(), s1.dial()
		for _, p := range []*peer{leaver, closer, silent} {
			p.join("lobby")
			require.Equal(t, "true", p.state("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 2500}))
		}
		leaver.leave("lobby")
		require.False(t, keyExists(t, raw, w.stateKey("lobby", leaver.id)))
		closer.close()
		silent.mute()
		for _, p := range watchers {
			for _, who := range []*peer{leaver, closer, silent} {
				p.expect(3*time.Second, "leave", who.id)
			}
		}
		for _, who := range []*peer{closer, silent} {
			require.False(t, keyExists(t, raw, w.stateKey("lobby", who.id)))
		}
		// Coming back does not bring it back.
		require.Empty(t, leaver.room("mesh/get-presence-state", "lobby").States)
		leaver.join("lobby")
		silent.call("mesh/noop", nil)
		for _, p := range watchers {
			w.eventually(2*time.Second, func() bool { return p.count("join", silent.id) == 2 && p.count("join", leaver.id) == 2 }, "both are back")
		}
		w.sleep(1200 * time.Millisecond) // the states' time would be up now
		for _, p := range watchers {
			for _, who := range []*peer{leaver, closer, silent} {
				p.expectStates(0, who.id, `{"n":1}`)
			}
		}
		require.Empty(t, s2.dial().subscribe("lobby").States)
	})
}

func TestManagerPublishesStates(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s1, s2 := w.server(), w.server()
		for _, s := range []*testServer{s1, s2} {
			require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{}))
		}
		watcher, a := s2.dial(), s1.dial()
		watcher.subscribe("lobby")
		a.join("lobby")
		a.join("untracked")
		p := s1.Presence()
		for i, bad := range []any{nil, 1, "x", []int{1}, true, func() {}} {
			require.ErrorIs(t, p.PublishState(ctx, "lobby", a.id, bad, StateOptions{}), ErrInvalidState, fmt.Sprint(i))
		}
		ok := map[string]int{"n": 1}
		require.ErrorIs(t, p.PublishState(ctx, "lobby", a.id, ok, StateOptions{ExpireAfter: -1}), ErrInvalidState)
		require.ErrorIs(t, p.PublishState(ctx, "untracked", a.id, ok, StateOptions{}), ErrNotTracked)
		require.ErrorIs(t, p.ClearState(ctx, "untracked", a.id), ErrNotTracked)
		require.ErrorIs(t, p.PublishState(ctx, "lobby", watcher.id, ok, StateOptions{}), ErrUnknownConnection, "it is another server's")
		big := map[string]string{"x": string(make([]byte, 9<<10))}
		require.ErrorIs(t, p.PublishState(ctx, "lobby", a.id, big, StateOptions{}), ErrTooLarge)

		require.NoError(t, p.PublishState(ctx, "lobby", a.id, ok, StateOptions{}))
		require.NoError(t, p.ClearState(ctx, "lobby", a.id))
		require.NoError(t, p.ClearState(ctx, "lobby", a.id))
		require.NoError(t, p.PublishState(ctx, "lobby", a.id, map[string]int{"n": 2}, StateOptions{Silent: true}))
		require.NoError(t, p.PublishState(ctx, "lobby", a.id, map[string]int{"n": 3}, StateOptions{ExpireAfter: 50 * time.Millisecond}))
		watcher.expectStates(2*time.Second, a.id, `{"n":1}`, "null", `{"n":3}`, "null")
		a.leave("lobby")
		require.ErrorIs(t, p.PublishState(ctx, "lobby", a.id, ok, StateOptions{}), ErrNotPresent)
		require.ErrorIs(t, p.ClearState(ctx, "lobby", a.id), ErrNotPresent)
	})
}

// States that a client publishes without waiting for the answers are told one
// by one, in order, also where it leaves right behind them.
func TestStatesOfOneClientOverlap(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const states = 48
		s1, s2 := w.tracked(), w.tracked()
		watchers := subscribers("lobby", s1, s2)
		a := s1.dial()
		a.join("lobby")
		id := 1000
		send := func(command string, payload map[string]any) {
			id++
			payload["roomName"] = "lobby"
			require.NoError(t, a.send(map[string]any{"id": id, "command": command, "payload": payload}))
		}
		var want []string
		for n := range states {
			send("mesh/publish-presence-state", map[string]any{"state": map[string]any{"n": n}})
			want = append(want, fmt.Sprintf(`{"n":%d}`, n))
		}
		send("mesh/clear-presence-state", map[string]any{})
		send("mesh/leave-room", map[string]any{})
		send("mesh/publish-presence-state", map[string]any{"state": map[string]any{"n": "out"}})
		for _, p := range watchers {
			p.expectStates(5*time.Second, a.id, append(want, "null")...)
			p.expect(5*time.Second, "leave", a.id)
			require.Equal(t, append(want, "null"), p.statesOf(a.id), "nothing after the leave")
		}
		answers := func() (list []string) {
			a.mu.Lock()
			defer a.mu.Unlock()
			for _, f := range a.frames {
				if f.ID != nil && *f.ID > 1000 {
					list = append(list, fmt.Sprint(*f.ID, string(f.Payload)))
				}
			}
			return list
		}
		w.eventually(5*time.Second, func() bool { return len(answers()) == states+3 }, "answers to everything")
		for i, got := range answers() {
			result := "true"
			switch i {
			case states + 1:
				result = `{"success":true}`
			case states + 2:
				result = "false"
			}
			require.Equal(t, fmt.Sprint(1001+i, result), got)
		}
	})
}

// With an interval between states every subscriber is told at most one of each
// member in that time, and the last one; a new rule takes hold at once.
func TestStateInterval(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const interval = 200 * time.Millisecond
		s1, s2 := w.server(), w.server()
		for _, s := range []*testServer{s1, s2} {
			s.track(".*", PresenceOptions{StateInterval: interval})
		}
		watchers := subscribers("lobby", s1, s2)
		members := []*peer{s1.dial(), s2.dial()}
		for _, a := range members {
			a.join("lobby")
		}
		const last = 60
		began := time.Now()
		for n := 1; n <= last; n++ {
			for _, a := range members {
				require.Equal(t, "true", a.state("lobby", map[string]any{"n": n}))
			}
			w.sleep(time.Second / 30)
		}
		for _, p := range watchers {
			for _, a := range members {
				end := fmt.Sprintf(`{"n":%d}`, last)
				w.eventually(2*time.Second, func() bool { return slices.Contains(p.statesOf(a.id), end) }, "the last state")
				took, got := time.Since(began), p.statesOf(a.id)
				require.Equal(t, `{"n":1}`, got[0])
				require.Equal(t, end, got[len(got)-1])
				require.LessOrEqual(t, len(got), int(took/interval)+2)
			}
		}
		require.Positive(t, s1.Stats().StatesSuperseded)

		// What waits ends with its entry.
		s1.track(".*", PresenceOptions{StateInterval: time.Minute})
		a := members[0]
		a.state("lobby", map[string]any{"n": "first"})
		a.state("lobby", map[string]any{"n": "waits"})
		a.leave("lobby")
		for _, p := range watchers {
			p.expect(2*time.Second, "leave", a.id)
		}
		w.sleep(2 * interval)
		require.NotContains(t, watchers[0].statesOf(a.id), `{"n":"waits"}`)

		s2.track(".*", PresenceOptions{})
		b := members[1]
		before := len(watchers[0].statesOf(b.id))
		var want []string
		for n := range 5 {
			require.Equal(t, "true", b.state("lobby", map[string]any{"free": n}))
			want = append(want, fmt.Sprintf(`{"free":%d}`, n))
		}
		w.eventually(2*time.Second, func() bool { return len(watchers[0].statesOf(b.id)) >= before+5 }, "each of them")
		require.Equal(t, want, watchers[0].statesOf(b.id)[before:])
	})
}
