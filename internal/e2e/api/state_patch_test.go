package api

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/meshtest"
)

// patch patches the state of p in the lobby.
func patch(p *harness.Peer, state string, more ...map[string]any) string {
	payload := map[string]any{"patch": true}
	for _, m := range more {
		maps.Copy(payload, m)
	}
	return p.State("lobby", raw(state), payload)
}

// raw is JSON.
type raw string

func (r raw) MarshalJSON() ([]byte, error) { return []byte(r), nil }

func TestPatchOfAState(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		watchers, client := harness.Subscribers("lobby", s1, s2), w.Client()
		a := s1.Dial()
		a.Join("lobby")
		require.Equal(t, "true", patch(a, `{"name":"ann","x":12345678901234567890}`))
		require.Equal(t, "true", patch(a, `{"x":null,"y":{"z":null}}`))
		require.Equal(t, "true", patch(a, `{"y":1.50}`, map[string]any{"silent": true}))
		stored, err := client.Get(t.Context(), w.StateKey("lobby", a.ID)).Result()
		require.NoError(t, err)
		require.Equal(t, `{"name":"ann","y":1.50}`, stored)
		require.Equal(t, "true", a.State("lobby", raw(`{"full":true}`)))
		require.Equal(t, "true", patch(a, `{"full":null}`))
		require.Equal(t, "true", patch(a, `{"again":1}`))
		for _, p := range watchers {
			p.ExpectStates(2*time.Second, a.ID, `{"name":"ann","x":12345678901234567890}`, `{"name":"ann","y":{"z":null}}`,
				`{"full":true}`, "null", `{"again":1}`)
		}
		for _, bad := range []string{`null`, `1`, `[]`, `"x"`} {
			require.Equal(t, "false", patch(a, bad), bad)
		}
		require.Equal(t, "false", a.State("lobby", raw(`{"x":1}`), map[string]any{"patch": 1}))
		require.JSONEq(t, `{"again":1}`, string(s2.Dial().Subscribe("lobby").States[a.ID]))
		a.Leave("lobby")
		require.Equal(t, "false", patch(a, `{"x":1}`))
		a.Join("lobby")
		require.Equal(t, "true", patch(a, `{"x":1}`))
		for _, p := range watchers { // a state ends with its entry
			p.ExpectStates(2*time.Second, a.ID, `{"name":"ann","x":12345678901234567890}`, `{"name":"ann","y":{"z":null}}`,
				`{"full":true}`, "null", `{"again":1}`, `{"x":1}`)
		}
	})
}

func TestKeysOfAStateExpire(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		watchers, client := harness.Subscribers("lobby", s1, s2), w.Client()
		a := s1.Dial()
		a.Join("lobby")
		require.Equal(t, "true", patch(a, `{"typing":true}`, map[string]any{"expireAfter": 1000}))
		require.LessOrEqual(t, harness.KeyLife(t, client, w.StateKey("lobby", a.ID)), time.Second)
		require.Positive(t, harness.KeyLife(t, client, w.StateKey("lobby", a.ID)))
		began := time.Now()
		require.Equal(t, "true", patch(a, `{"page":3}`))
		require.Zero(t, harness.KeyLife(t, client, w.StateKey("lobby", a.ID)), "one key has no end")
		for _, p := range watchers {
			p.ExpectStates(3*time.Second, a.ID, `{"typing":true}`, `{"typing":true,"page":3}`, `{"page":3}`)
		}
		require.LessOrEqual(t, time.Since(began), w.Unhurried(2*time.Second))
		w.Sleep(2 * time.Second)
		for _, p := range watchers {
			p.ExpectStates(0, a.ID, `{"typing":true}`, `{"typing":true,"page":3}`, `{"page":3}`)
		}
		stored, err := client.Get(t.Context(), w.StateKey("lobby", a.ID)).Result()
		require.NoError(t, err)
		require.Equal(t, `{"page":3}`, stored)
	})
}

func TestPatchedStateIsTooLarge(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.Limits.StateBytes = 24 }).Level2()
		watchers := harness.Subscribers("lobby", s)
		a := s.Dial()
		a.Join("lobby")
		require.Equal(t, "true", patch(a, `{"a":"0123456789"}`))
		require.JSONEq(t, `{"error":"too large: presence state of 25 bytes, limit 24","code":"ETOOLARGE","name":"CommandError"}`, patch(a, `{"b":12}`))
		require.Equal(t, "true", patch(a, `{"a":1,"a long key that is not there":null}`), "only the merged state counts")
		watchers[0].ExpectStates(2*time.Second, a.ID, `{"a":"0123456789"}`, `{"a":1}`)

		p := s.Presence()
		require.ErrorIs(t, p.PublishState(t.Context(), "lobby", a.ID, raw(`{"b":"01234567890123456789"}`), mesh.StateOptions{Patch: true}), mesh.ErrTooLarge)
		require.ErrorIs(t, p.PublishState(t.Context(), "lobby", a.ID, nil, mesh.StateOptions{Patch: true}), mesh.ErrInvalidState)
		require.NoError(t, p.PublishState(t.Context(), "lobby", a.ID, raw(`{"b":2}`), mesh.StateOptions{Patch: true}))
		require.NoError(t, p.PublishState(t.Context(), "lobby", a.ID, raw(`{"a":null,"b":null}`), mesh.StateOptions{Patch: true}))
		watchers[0].ExpectStates(2*time.Second, a.ID, `{"a":"0123456789"}`, `{"a":1}`, `{"a":1,"b":2}`, "null")
	})
}

// TestPatchesThatWait sends patches in a room with a StateInterval without waiting for the
// answers. Each waits as a command or for the interval, and none may lose its keys.
func TestPatchesThatWait(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const patches = 30
		s1, s2 := w.Server(func(o *mesh.Options) { o.Limits.CommandsPerSecond = 10 }), w.Server()
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{StateInterval: 200 * time.Millisecond})
		}
		watchers := harness.Subscribers("lobby", s1, s2)
		a := s1.Dial()
		a.Join("lobby")
		want := `{"k0":0`
		for n := range patches {
			state := raw(fmt.Sprintf(`{"k%d":%d}`, n, n))
			payload := map[string]any{"roomName": "lobby", "state": state, "patch": true}
			require.NoError(t, a.Send(map[string]any{"id": 1000 + n, "command": "mesh/publish-presence-state", "payload": payload}))
			if n > 0 {
				want += fmt.Sprintf(`,"k%d":%d`, n, n)
			}
		}
		want += "}"
		for _, p := range watchers {
			w.Eventually(10*time.Second, func() bool {
				got := p.StatesOf(a.ID)
				return len(got) > 0 && got[len(got)-1] == want
			}, "all keys")
		}
	})
}

func TestClientPatches(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		a := s.Dial()
		a.Join("lobby")
		for _, key := range []string{"a", "b"} {
			require.True(t, a.Client.PublishState("lobby", map[string]int{key: 1}, meshtest.StateOptions{Patch: true}))
		}
		require.JSONEq(t, `{"a":1,"b":1}`, string(s.Dial().Subscribe("lobby").States[a.ID]))
	})
}
