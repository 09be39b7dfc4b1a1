package attack

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// TestIDsAndRoomsOfOtherClients checks that a client without access to a room can
// neither read nor change anything with the ids of its members.
func TestIDsAndRoomsOfOtherClients(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Server(harness.ByHeader, harness.NoCommandLimit), w.Server(harness.ByHeader, harness.NoCommandLimit)
		for _, s := range []*harness.Server{s1, s2} {
			s.Track("^private", mesh.PresenceOptions{Guard: harness.AdminsOnly})
			s.Track("^public", mesh.PresenceOptions{})
		}
		here, far, spy := s1.Dial(harness.Meta(harness.Admin)), s2.Dial(harness.Meta(harness.Admin)), s1.Dial(harness.Meta(harness.Visitor))
		for _, p := range []*harness.Peer{here, far} {
			p.Join("private1")
			require.Equal(t, "true", p.State("private1", map[string]any{"secret": 1}))
		}
		watcher := s2.Dial(harness.Meta(harness.Admin))
		watcher.Subscribe("private1")
		watcher.Subscribe("public1")
		spy.Join("public1")
		watcher.Expect(5*time.Second, "join", spy.ID)

		for _, victim := range []*harness.Peer{here, far} {
			forged := func(more string) string {
				return fmt.Sprintf(`{"roomName":"private1","connectionId":%q,"id":%[1]q,"conn":%[1]q,"connection":{"id":%[1]q}%s}`, victim.ID, more)
			}
			for _, c := range []struct{ command, payload, want string }{
				{"mesh/get-connection-metadata", fmt.Sprintf(`{"connectionId":%q}`, victim.ID), `{"metadata":null}`},
				{"mesh/get-connection-metadata", `{"connectionId":"nobody"}`, `{"metadata":null}`}, // the same answer as for an unknown id
				{"mesh/get-my-connection-metadata", forged(""), `{"metadata":` + harness.Visitor + `}`},
				{"mesh/get-presence-state", forged(""), `{"success":false,"present":[]}`},
				{"mesh/get-room-metadata", forged(""), `{"metadata":null}`},
				{"mesh/subscribe-presence", forged(""), `{"success":false,"present":[]}`},
				{"mesh/unsubscribe-presence", forged(""), `false`},
				{"mesh/publish-presence-state", forged(`,"state":{"forged":true}`), `false`},
				{"mesh/clear-presence-state", forged(""), `false`},
				{"mesh/leave-room", forged(""), `{"success":true}`},
			} {
				require.JSONEq(t, c.want, string(spy.Ask(c.command, c.payload)), "%s %s", c.command, c.payload)
			}
			// In its own room the client acts for itself, whatever the payload says.
			require.Equal(t, "true", string(spy.Ask("mesh/publish-presence-state",
				fmt.Sprintf(`{"roomName":"public1","connectionId":%q,"state":{"of":%[1]q}}`, victim.ID))))
			u := watcher.Expect(5*time.Second, "state", spy.ID)
			require.Equal(t, "public1", u.RoomName)
		}
		for _, id := range []string{"", "a:b", "a b", "x\\u0000", strings.Repeat("x", 129), "\\ud800", "*:"} {
			require.Equal(t, "EINVALID", harness.Code(t, spy.Ask("mesh/get-connection-metadata", `{"connectionId":"`+id+`"}`)), "%q", id)
		}
		for _, id := range []string{"*", "mesh", "{1}", strings.Repeat("x", 128), "..%2f", s1.Stats().Incarnation} {
			require.JSONEq(t, `{"metadata":null}`, string(spy.Ask("mesh/get-connection-metadata", `{"connectionId":"`+id+`"}`)), "%q", id)
		}

		now, err := s1.InRedis("private1")
		require.NoError(t, err)
		assert.Equal(t, harness.MemberStates{here.ID: `{"secret":1}`, far.ID: `{"secret":1}`}, now, "the room has changed")
		for _, u := range watcher.Got() {
			assert.False(t, u.RoomName == "private1" || u.ConnectionID != spy.ID, "%v", u)
		}
		assert.Empty(t, spy.Got())
	})
}

// TestPongsOfOthers checks that a client cannot send a pong for another client.
func TestPongsOfOthers(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.PingInterval, o.MaxMissedPongs = time.Second, -1 })
		victim, liar := s.Dial(), s.Dial()
		victim.Mute()
		for range 20 {
			liar.Say(fmt.Sprintf(`{"id":1,"command":"pong","connectionId":%q,"payload":{"connectionId":%[1]q,"id":%[1]q}}`, victim.ID))
			liar.Say(fmt.Sprintf(`{"id":1,"command":"latency:response","payload":{"connectionId":%q,"latency":-1e9}}`, victim.ID))
			w.Sleep(100 * time.Millisecond)
		}
		assert.Equal(t, websocket.CloseInternalServerErr, victim.Closed(time.Second))
		assert.Equal(t, "true", string(liar.Call("mesh/noop", nil)))
		assert.Zero(t, liar.Pushed("latency"), "a latency response without a request has no answer")
	})
}
