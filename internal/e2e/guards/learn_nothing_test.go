package guards

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// learnNothingFromChanges rechecks a refused connection, removes it from the room and
// adds it again. The connection must not receive anything.
func learnNothingFromChanges(t *testing.T, w *harness.World, s1, s2 *harness.Server, spy, insider *harness.Peer) {
	t.Helper()
	ctx := t.Context()
	for e, err := range s1.Presence().Subscribe(ctx, "secret", mesh.SubscribeOptions{Viewer: spy.ID}) {
		assert.ErrorIs(t, err, mesh.ErrRefused)
		assert.Zero(t, e)
	}
	for _, do := range []func() error{
		func() error { return s2.Rooms().Recheck(ctx, "secret") },
		func() error { return s2.Connections().Recheck(ctx, spy.ID) },
		func() error { _, err := s2.Rooms().Remove(ctx, "secret", spy.ID); return err },
		func() error { return s2.Rooms().Add(ctx, "secret", spy.ID, mesh.AddOptions{}) },
		func() error {
			return s2.Connections().SetMetadata(ctx, spy.ID, json.RawMessage(`{"isAdmin":false,"n":1}`), mesh.MetadataOptions{})
		},
		func() error { return s2.Rooms().Clear(ctx, "secret") },
		func() error { return s2.Rooms().Add(ctx, "secret", insider.ID, mesh.AddOptions{}) },
	} {
		require.NoError(t, do())
		assert.JSONEq(t, `{"success":false,"present":[]}`, string(spy.Call("mesh/subscribe-presence", harness.InRoomPayload("secret"))))
		assert.JSONEq(t, `{"metadata":null}`, string(spy.Call("mesh/get-connection-metadata", map[string]any{"connectionId": insider.ID})))
	}
	require.Equal(t, "true", insider.State("secret", map[string]any{"a": 3}))
	w.Sleep(50 * time.Millisecond)
	assert.Empty(t, spy.Got(), "no update")
	spy.Mu.Lock()
	defer spy.Mu.Unlock()
	var commands []string
	for _, f := range spy.Pushes {
		commands = append(commands, f.Command)
	}
	// It learns only what the app did with itself.
	assert.Equal(t, []string{"mesh/room-left", "mesh/room-joined", "mesh/room-left"}, commands)
}

// A connection that may not be in a room receives nothing that is sent to its members.
func TestExcludedConnectionsLearnNothing(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s1, s2 := w.Server(harness.ByHeader), w.Server(harness.ByHeader)
		for _, s := range []*harness.Server{s1, s2} {
			s.Track("^secret$", mesh.PresenceOptions{Guard: harness.AdminsOnly, JoinGuard: harness.AdminsOnly})
		}
		insider, spy, out := s2.Dial(harness.Meta(`{"isAdmin":true,"name":"insider"}`)), s1.Dial(harness.Meta(harness.Visitor)), s1.Dial(harness.Meta(harness.Admin))
		insider.Join("secret")
		assert.JSONEq(t, `{"success":false,"present":[],"code":"EREFUSED"}`, string(spy.Call("mesh/join-room", harness.InRoomPayload("secret"))))
		out.Join("secret")
		out.Subscribe("secret")
		require.NoError(t, s2.Connections().SetMetadata(ctx, out.ID, json.RawMessage(harness.Visitor), mesh.MetadataOptions{}))
		require.NoError(t, s2.Rooms().Recheck(ctx, "secret"))
		w.Eventually(2*time.Second, func() bool { return out.Pushed("mesh/membership-ended") == 1 }, "the connection is no member")
		require.NoError(t, s2.Rooms().Send(ctx, "secret", "chat", "the plan"))
		require.Equal(t, "true", insider.State("secret", map[string]any{"a": 3}))
		for _, p := range []*harness.Peer{spy, out} {
			assert.JSONEq(t, `{"metadata":null}`, string(p.Call("mesh/get-connection-metadata", map[string]any{"connectionId": insider.ID})))
			assert.JSONEq(t, `false`, string(p.Call("mesh/publish-presence-state", map[string]any{"roomName": "secret", "state": map[string]any{}})))
			assert.JSONEq(t, `{"success":false,"present":[],"code":"EREFUSED"}`, string(p.Call("mesh/join-room", harness.InRoomPayload("secret"))))
		}
		w.Sleep(50 * time.Millisecond)
		for _, p := range []*harness.Peer{spy, out} {
			assert.Zero(t, p.Pushed("chat"))
			assert.Zero(t, p.Count("state", ""))
		}
	})
}
