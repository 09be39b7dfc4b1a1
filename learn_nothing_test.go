package mesh

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// learnNothingByWhatHappensToIt rechecks a connection that is refused, takes it out
// and brings it in.
func learnNothingByWhatHappensToIt(t *testing.T, w *world, s1, s2 *testServer, spy, insider *peer) {
	t.Helper()
	ctx := t.Context()
	for e, err := range s1.Presence().Subscribe(ctx, "secret", SubscribeOptions{Viewer: spy.id}) {
		assert.ErrorIs(t, err, ErrRefused)
		assert.Zero(t, e)
	}
	for _, do := range []func() error{
		func() error { return s2.Rooms().Recheck(ctx, "secret") },
		func() error { return s2.Connections().Recheck(ctx, spy.id) },
		func() error { _, err := s2.Rooms().Remove(ctx, "secret", spy.id); return err },
		func() error { return s2.Rooms().Add(ctx, "secret", spy.id) },
		func() error {
			return s2.Connections().SetMetadata(ctx, spy.id, json.RawMessage(`{"isAdmin":false,"n":1}`), MetadataOptions{})
		},
		func() error { return s2.Rooms().Clear(ctx, "secret") },
		func() error { return s2.Rooms().Add(ctx, "secret", insider.id) },
	} {
		require.NoError(t, do())
		assert.JSONEq(t, `{"success":false,"present":[]}`, string(spy.call("mesh/subscribe-presence", inRoomPayload("secret"))))
		assert.JSONEq(t, `{"metadata":null}`, string(spy.call("mesh/get-connection-metadata", map[string]any{"connectionId": insider.id})))
	}
	require.Equal(t, "true", insider.state("secret", map[string]any{"a": 3}))
	w.sleep(50 * time.Millisecond)
	assert.Empty(t, spy.got(), "no update")
	spy.mu.Lock()
	defer spy.mu.Unlock()
	assert.Empty(t, spy.pushes, "nothing else")
}

// A connection that may not be in a room gets nothing that is for its members.
func TestTheExcludedLearnNothing(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s1, s2 := w.server(byHeader), w.server(byHeader)
		for _, s := range []*testServer{s1, s2} {
			s.track("^secret$", PresenceOptions{Guard: adminsOnly, JoinGuard: adminsOnly})
		}
		insider, spy, out := s2.dial(meta(`{"isAdmin":true,"name":"insider"}`)), s1.dial(meta(visitor)), s1.dial(meta(admin))
		insider.join("secret")
		assert.JSONEq(t, `{"success":false,"present":[]}`, string(spy.call("mesh/join-room", inRoomPayload("secret"))))
		out.join("secret")
		out.subscribe("secret")
		require.NoError(t, s2.Connections().SetMetadata(ctx, out.id, json.RawMessage(visitor), MetadataOptions{}))
		require.NoError(t, s2.Rooms().Recheck(ctx, "secret"))
		w.eventually(w.unhurried(2*time.Second), func() bool { return out.pushed("mesh/membership-ended") == 1 }, "it is out")
		require.NoError(t, s2.Rooms().Send(ctx, "secret", "chat", "the plan"))
		require.Equal(t, "true", insider.state("secret", map[string]any{"a": 3}))
		for _, p := range []*peer{spy, out} {
			assert.JSONEq(t, `{"metadata":null}`, string(p.call("mesh/get-connection-metadata", map[string]any{"connectionId": insider.id})))
			assert.JSONEq(t, `false`, string(p.call("mesh/publish-presence-state", map[string]any{"roomName": "secret", "state": map[string]any{}})))
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/join-room", inRoomPayload("secret"))))
		}
		w.sleep(50 * time.Millisecond)
		for _, p := range []*peer{spy, out} {
			assert.Zero(t, p.pushed("chat"))
			assert.Zero(t, p.count("state", ""))
		}
	})
}
