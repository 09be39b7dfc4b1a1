package mesh

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestWhatIsOthers: ids and rooms of others are of no use to a client that has
// nothing to do with them.
func TestWhatIsOthers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.server(byHeader, noCommandLimit), w.server(byHeader, noCommandLimit)
		for _, s := range []*testServer{s1, s2} {
			s.track("^private", PresenceOptions{Guard: adminsOnly})
			s.track("^public", PresenceOptions{})
		}
		here, far, spy := s1.dial(meta(admin)), s2.dial(meta(admin)), s1.dial(meta(visitor))
		for _, p := range []*peer{here, far} {
			p.join("private1")
			require.Equal(t, "true", p.state("private1", map[string]any{"secret": 1}))
		}
		watcher := s2.dial(meta(admin))
		watcher.subscribe("private1")
		watcher.subscribe("public1")
		spy.join("public1")
		watcher.expect(5*time.Second, "join", spy.id)

		for _, victim := range []*peer{here, far} {
			forged := func(more string) string {
				return fmt.Sprintf(`{"roomName":"private1","connectionId":%q,"id":%[1]q,"conn":%[1]q,"connection":{"id":%[1]q}%s}`, victim.id, more)
			}
			for _, c := range []struct{ command, payload, want string }{
				{"mesh/get-connection-metadata", fmt.Sprintf(`{"connectionId":%q}`, victim.id), `{"metadata":null}`},
				{"mesh/get-connection-metadata", `{"connectionId":"nobody"}`, `{"metadata":null}`}, // the same as for nobody
				{"mesh/get-my-connection-metadata", forged(""), `{"metadata":` + visitor + `}`},
				{"mesh/get-presence-state", forged(""), `{"success":false,"present":[]}`},
				{"mesh/get-room-metadata", forged(""), `{"metadata":null}`},
				{"mesh/subscribe-presence", forged(""), `{"success":false,"present":[]}`},
				{"mesh/unsubscribe-presence", forged(""), `false`},
				{"mesh/publish-presence-state", forged(`,"state":{"forged":true}`), `false`},
				{"mesh/clear-presence-state", forged(""), `false`},
				{"mesh/leave-room", forged(""), `{"success":true}`},
			} {
				require.JSONEq(t, c.want, string(spy.ask(c.command, c.payload)), "%s %s", c.command, c.payload)
			}
			// In a room of its own it acts for itself, whatever it says.
			require.Equal(t, "true", string(spy.ask("mesh/publish-presence-state",
				fmt.Sprintf(`{"roomName":"public1","connectionId":%q,"state":{"of":%[1]q}}`, victim.id))))
			u := watcher.expect(5*time.Second, "state", spy.id)
			require.Equal(t, "public1", u.RoomName)
		}
		for _, id := range []string{"", "a:b", "a b", "x\\u0000", strings.Repeat("x", 129), "\\ud800", "*:"} {
			require.Equal(t, "EINVALID", code(t, spy.ask("mesh/get-connection-metadata", `{"connectionId":"`+id+`"}`)), "%q", id)
		}
		for _, id := range []string{"*", "mesh", "{1}", strings.Repeat("x", 128), "..%2f", s1.Stats().Incarnation} {
			require.JSONEq(t, `{"metadata":null}`, string(spy.ask("mesh/get-connection-metadata", `{"connectionId":"`+id+`"}`)), "%q", id)
		}

		now, err := s1.inRedis("private1")
		require.NoError(t, err)
		assert.Equal(t, sight{here.id: `{"secret":1}`, far.id: `{"secret":1}`}, now, "untouched")
		for _, u := range watcher.got() {
			assert.False(t, u.RoomName == "private1" || u.ConnectionID != spy.id, "%v", u)
		}
		assert.Empty(t, spy.got())
	})
}

// TestPongsOfOthers: nobody answers for somebody else.
func TestPongsOfOthers(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(func(o *Options) { o.PingInterval, o.MaxMissedPongs = time.Second, -1 })
		victim, liar := s.dial(), s.dial()
		victim.mute()
		for range 20 {
			liar.say(fmt.Sprintf(`{"id":1,"command":"pong","connectionId":%q,"payload":{"connectionId":%[1]q,"id":%[1]q}}`, victim.id))
			liar.say(fmt.Sprintf(`{"id":1,"command":"latency:response","payload":{"connectionId":%q,"latency":-1e9}}`, victim.id))
			w.sleep(100 * time.Millisecond)
		}
		assert.Equal(t, websocket.CloseInternalServerErr, victim.closed(time.Second))
		assert.Equal(t, "true", string(liar.call("mesh/noop", nil)))
		assert.Zero(t, liar.pushed("latency"), "what nobody asked for has no answer")
	})
}
