package mesh_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/meshtest"
)

func clearState(p *harness.Peer, room string) string {
	p.T.Helper()
	return string(p.Call("mesh/clear-presence-state", map[string]any{"roomName": room}))
}

func TestStateIsDeliveredReplacedAndCleared(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2, s3 := w.Tracked(), w.Tracked(), w.Tracked()
		watchers, raw := harness.Subscribers("lobby", s1, s2, s3), w.Client()
		a := s1.Dial()
		require.Equal(t, "false", a.State("lobby", map[string]any{"n": 0}), "not in the room yet")
		require.Equal(t, "false", clearState(a, "lobby"))
		a.Join("lobby")
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 1}))
		stored, err := raw.Get(t.Context(), w.StateKey("lobby", a.ID)).Result()
		require.NoError(t, err)
		require.JSONEq(t, `{"n":1}`, stored)
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 2}))
		stored, err = raw.Get(t.Context(), w.StateKey("lobby", a.ID)).Result()
		require.NoError(t, err)
		require.JSONEq(t, `{"n":2}`, stored)
		require.Zero(t, harness.KeyLife(t, raw, w.StateKey("lobby", a.ID)), "the state lives as long as the entry")
		require.Equal(t, "true", clearState(a, "lobby"))
		require.Equal(t, "true", clearState(a, "lobby"), "clearing again causes no update")
		require.False(t, harness.KeyExists(t, raw, w.StateKey("lobby", a.ID)))
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 3}))
		for _, p := range watchers {
			p.ExpectStates(2*time.Second, a.ID, `{"n":1}`, `{"n":2}`, "null", `{"n":3}`)
		}
		late := s2.Dial().Subscribe("lobby")
		require.JSONEq(t, `{"n":3}`, string(late.States[a.ID]))
	})
}

func TestStateExpiresOnceForEverySubscriber(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2, s3 := w.Tracked(), w.Tracked(), w.Tracked()
		watchers, raw := harness.Subscribers("lobby", s1, s2, s3, s1), w.Client()
		a := s1.Dial()
		a.Join("lobby")
		began := time.Now()
		require.Equal(t, "true", a.State("lobby", map[string]any{"typing": true}, map[string]any{"expireAfter": 600}))
		life := harness.KeyLife(t, raw, w.StateKey("lobby", a.ID))
		if w.Virtual { // in real time, some of the 600 ms has passed
			require.Greater(t, life, 590*time.Millisecond)
		}
		require.LessOrEqual(t, life, 600*time.Millisecond)
		for _, p := range watchers {
			p.ExpectStates(1600*time.Millisecond, a.ID, `{"typing":true}`, "null")
		}
		require.GreaterOrEqual(t, time.Since(began), 600*time.Millisecond)
		w.Sleep(700 * time.Millisecond) // by now the servers would have handled expired events
		for _, p := range watchers {
			p.ExpectStates(0, a.ID, `{"typing":true}`, "null")
			require.Equal(t, 0, p.Count("leave", ""))
		}
		require.False(t, harness.KeyExists(t, raw, w.StateKey("lobby", a.ID)))
		require.Empty(t, s2.Dial().Subscribe("lobby").States)
	})
}

func TestExpiryOfAnOlderState(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		watchers, raw := harness.Subscribers("lobby", s1, s2), w.Client()
		a := s1.Dial()
		a.Join("lobby")
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 300}))
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 2}))
		w.Sleep(time.Second)
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 3}, map[string]any{"expireAfter": 300}))
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 4}, map[string]any{"expireAfter": 60_000}))
		w.Sleep(time.Second)
		for _, p := range watchers {
			p.ExpectStates(time.Second, a.ID, `{"n":1}`, `{"n":2}`, `{"n":3}`, `{"n":4}`)
		}
		require.True(t, harness.KeyExists(t, raw, w.StateKey("lobby", a.ID)))
		// A newer state may also expire earlier.
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 5}, map[string]any{"expireAfter": 100}))
		for _, p := range watchers {
			p.ExpectStates(time.Second, a.ID, `{"n":1}`, `{"n":2}`, `{"n":3}`, `{"n":4}`, `{"n":5}`, "null")
		}
	})
}

func TestSilentStateIsStoredButNotDelivered(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		watchers := harness.Subscribers("lobby", s1, s2)
		a := s1.Dial()
		a.Join("lobby")
		silent := map[string]any{"silent": true}
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 1}, silent))
		for _, s := range []*harness.Server{s1, s2} {
			w.Eventually(2*time.Second, func() bool {
				return string(s.Dial().Subscribe("lobby").States[a.ID]) == `{"n":1}`
			}, "the silent state in a snapshot")
			require.JSONEq(t, `{"n":1}`, string(s.Dial().Room("mesh/get-presence-state", "lobby").States[a.ID]))
		}
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 2}))
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 3}, silent))
		a.Leave("lobby")
		for _, p := range watchers {
			p.Expect(2*time.Second, "leave", a.ID)
			p.ExpectStates(0, a.ID, `{"n":2}`)
		}
	})
}

// TestStateEndsWithItsEntry checks that a leave ends the state, without an update for
// the state.
func TestStateEndsWithItsEntry(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Server(), w.Server()
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{TTL: time.Second})
		}
		watchers, raw := harness.Subscribers("lobby", s1, s2), w.Client()
		leaver, closer, silent := s1.Dial(), s1.Dial(), s1.Dial()
		for _, p := range []*harness.Peer{leaver, closer, silent} {
			p.Join("lobby")
			require.Equal(t, "true", p.State("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 2500}))
		}
		leaver.Leave("lobby")
		require.False(t, harness.KeyExists(t, raw, w.StateKey("lobby", leaver.ID)))
		closer.Close()
		silent.Mute()
		for _, p := range watchers {
			for _, member := range []*harness.Peer{leaver, closer, silent} {
				p.Expect(3*time.Second, "leave", member.ID)
			}
		}
		for _, member := range []*harness.Peer{closer, silent} {
			require.False(t, harness.KeyExists(t, raw, w.StateKey("lobby", member.ID)))
		}
		// Joining again does not restore the state.
		require.Empty(t, leaver.Room("mesh/get-presence-state", "lobby").States)
		leaver.Join("lobby")
		silent.Call("mesh/noop", nil)
		for _, p := range watchers {
			w.Eventually(2*time.Second, func() bool { return p.Count("join", silent.ID) == 2 && p.Count("join", leaver.ID) == 2 }, "both have joined again")
		}
		w.Sleep(1200 * time.Millisecond) // the states would have expired by now
		for _, p := range watchers {
			for _, member := range []*harness.Peer{leaver, closer, silent} {
				p.ExpectStates(0, member.ID, `{"n":1}`)
			}
		}
		require.Empty(t, s2.Dial().Subscribe("lobby").States)
	})
}

func TestManagerPublishesStates(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s1, s2 := w.Server(), w.Server()
		for _, s := range []*harness.Server{s1, s2} {
			require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		}
		watcher, a := s2.Dial(), s1.Dial()
		watcher.Subscribe("lobby")
		a.Join("lobby")
		a.Join("untracked")
		p := s1.Presence()
		for i, bad := range []any{nil, 1, "x", []int{1}, true, func() {}} {
			require.ErrorIs(t, p.PublishState(ctx, "lobby", a.ID, bad, mesh.StateOptions{}), mesh.ErrInvalidState, fmt.Sprint(i))
		}
		ok := map[string]int{"n": 1}
		require.ErrorIs(t, p.PublishState(ctx, "lobby", a.ID, ok, mesh.StateOptions{ExpireAfter: -1}), mesh.ErrInvalidState)
		require.ErrorIs(t, p.PublishState(ctx, "untracked", a.ID, ok, mesh.StateOptions{}), mesh.ErrNotTracked)
		require.ErrorIs(t, p.ClearState(ctx, "untracked", a.ID), mesh.ErrNotTracked)
		require.ErrorIs(t, p.PublishState(ctx, "lobby", watcher.ID, ok, mesh.StateOptions{}), mesh.ErrUnknownConnection, "a connection of another server")
		big := map[string]string{"x": string(make([]byte, 9<<10))}
		require.ErrorIs(t, p.PublishState(ctx, "lobby", a.ID, big, mesh.StateOptions{}), mesh.ErrTooLarge)

		require.NoError(t, p.PublishState(ctx, "lobby", a.ID, ok, mesh.StateOptions{}))
		require.NoError(t, p.ClearState(ctx, "lobby", a.ID))
		require.NoError(t, p.ClearState(ctx, "lobby", a.ID))
		require.NoError(t, p.PublishState(ctx, "lobby", a.ID, map[string]int{"n": 2}, mesh.StateOptions{Silent: true}))
		require.NoError(t, p.PublishState(ctx, "lobby", a.ID, map[string]int{"n": 3}, mesh.StateOptions{ExpireAfter: 50 * time.Millisecond}))
		watcher.ExpectStates(2*time.Second, a.ID, `{"n":1}`, "null", `{"n":3}`, "null")
		a.Leave("lobby")
		require.ErrorIs(t, p.PublishState(ctx, "lobby", a.ID, ok, mesh.StateOptions{}), mesh.ErrNotPresent)
		require.ErrorIs(t, p.ClearState(ctx, "lobby", a.ID), mesh.ErrNotPresent)
	})
}

// TestStatesOfOneClientOverlap publishes states without waiting for the answers, and
// then leaves. All states must be delivered in order, before the leave.
func TestStatesOfOneClientOverlap(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const states = 48
		s1, s2 := w.Tracked(), w.Tracked()
		watchers := harness.Subscribers("lobby", s1, s2)
		a := s1.Dial()
		a.Join("lobby")
		id := 1000
		send := func(command string, payload map[string]any) {
			id++
			payload["roomName"] = "lobby"
			require.NoError(t, a.Send(map[string]any{"id": id, "command": command, "payload": payload}))
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
			p.ExpectStates(5*time.Second, a.ID, append(want, "null")...)
			p.Expect(5*time.Second, "leave", a.ID)
			require.Equal(t, append(want, "null"), p.StatesOf(a.ID), "no state after the leave")
		}
		answers := func() (list []string) {
			a.Mu.Lock()
			defer a.Mu.Unlock()
			for _, f := range a.Frames {
				if f.ID != nil && *f.ID > 1000 {
					list = append(list, fmt.Sprint(*f.ID, string(f.Payload)))
				}
			}
			return list
		}
		w.Eventually(5*time.Second, func() bool { return len(answers()) == states+3 }, "all answers")
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

// TestStateInterval checks that a subscriber receives at most one state per member and
// interval, and always the last one. A new rule must take effect at once.
func TestStateInterval(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const interval = 200 * time.Millisecond
		s1, s2 := w.Server(), w.Server()
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{StateInterval: interval})
		}
		watchers := harness.Subscribers("lobby", s1, s2)
		members := []*harness.Peer{s1.Dial(), s2.Dial()}
		for _, a := range members {
			a.Join("lobby")
		}
		const last = 60
		began := time.Now()
		for n := 1; n <= last; n++ {
			for _, a := range members {
				require.Equal(t, "true", a.State("lobby", map[string]any{"n": n}))
			}
			w.Sleep(time.Second / 30)
		}
		for _, p := range watchers {
			for _, a := range members {
				end := fmt.Sprintf(`{"n":%d}`, last)
				w.Eventually(2*time.Second, func() bool { return slices.Contains(p.StatesOf(a.ID), end) }, "the last state")
				took, got := time.Since(began), p.StatesOf(a.ID)
				require.Equal(t, `{"n":1}`, got[0])
				require.Equal(t, end, got[len(got)-1])
				require.LessOrEqual(t, len(got), int(took/interval)+2)
			}
		}
		if w.Virtual { // in real time the states may be published more slowly
			require.Positive(t, s1.Stats().StatesSuperseded)
		}

		// A waiting state ends with its entry.
		s1.Track(".*", mesh.PresenceOptions{StateInterval: time.Minute})
		a := members[0]
		a.State("lobby", map[string]any{"n": "first"})
		a.State("lobby", map[string]any{"n": "waits"})
		a.Leave("lobby")
		for _, p := range watchers {
			p.Expect(2*time.Second, "leave", a.ID)
		}
		w.Sleep(2 * interval)
		require.NotContains(t, watchers[0].StatesOf(a.ID), `{"n":"waits"}`)

		s2.Track(".*", mesh.PresenceOptions{})
		b := members[1]
		before := len(watchers[0].StatesOf(b.ID))
		var want []string
		for n := range 5 {
			require.Equal(t, "true", b.State("lobby", map[string]any{"free": n}))
			want = append(want, fmt.Sprintf(`{"free":%d}`, n))
		}
		w.Eventually(2*time.Second, func() bool { return len(watchers[0].StatesOf(b.ID)) >= before+5 }, "all states")
		require.Equal(t, want, watchers[0].StatesOf(b.ID)[before:])
	})
}

// FuzzStates compares the encoding of states and metadata with encoding/json. The result
// must be valid JSON of the same value, and encoding it again must not change it.
func FuzzStates(f *testing.F) {
	for _, s := range []string{`{}`, ` { "a" : [ 1.50 , "\ud800" ] } `, `null`, ` null `, `[]`, `{"a":1,"a":2}`, `1e999`, "{\"\xff\":1}", `{"a":"` + "\u2028" + `"}`} {
		f.Add([]byte(s))
	}
	r := meshtest.StartRedis(f)
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: r.Client()})
	require.NoError(f, err)
	f.Cleanup(func() { require.NoError(f, p.Shutdown(context.Background())) })
	f.Fuzz(func(t *testing.T, raw []byte) {
		state, err := p.EncodeState(json.RawMessage(raw))
		metadata, metaErr := p.EncodeMetadata(json.RawMessage(raw))
		if err == nil {
			require.NoError(t, metaErr, "a valid state is valid metadata")
			require.Equal(t, string(metadata), string(state))
			require.Equal(t, byte('{'), state[0])
		} else {
			_, code, _ := testhook.WireError(err)
			require.Contains(t, []string{"EINVALID", "ETOOLARGE"}, code)
		}
		if metaErr != nil || metadata == nil {
			return
		}
		require.True(t, utf8.Valid(metadata) && json.Valid(metadata))
		again, err := p.EncodeMetadata(metadata)
		require.NoError(t, err)
		require.Equal(t, string(metadata), string(again))
		var one, two any
		if json.Unmarshal(raw, &one) == nil { // fails for numbers that do not fit into a float64
			require.NoError(t, json.Unmarshal(metadata, &two))
			require.Equal(t, one, two)
		}
	})
}
