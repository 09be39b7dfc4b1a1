package api

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// A burst has many commands about one room. Each answer reflects the commands before
// it, and none of those after it. The ids are used twice.
func TestOneRoomInOneBurst(t *testing.T) {
	t.Parallel()
	for name, interval := range map[string]time.Duration{"": 0, "interval": 50 * time.Millisecond} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s := w.Server(harness.NoCommandLimit)
				s.Track(".*", mesh.PresenceOptions{StateInterval: interval})
				paced := interval > 0 // a state is visible when it is delivered
				r := s.Raw()
				var sent, want []string
				add := func(answer, command, more string) {
					sent = append(sent, fmt.Sprintf(`{"id":%d,"command":"mesh/%s","payload":{"roomName":"r"%s}}`, len(sent)%10, command, more))
					want = append(want, fmt.Sprintf(`{"id":%d,"command":"mesh/%s","payload":%s}`, len(want)%10, command, answer))
				}
				state := func(n int) string { return fmt.Sprintf(`{%q:{"n":%d}}`, r.ID, n) }
				publish := func(n int) { add("true", "publish-presence-state", fmt.Sprintf(`,"state":{"n":%d}`, n)) }
				get := func(state string, in bool) { add(fmt.Sprint(state, in), "get-presence-state", "") }
				for n := range 3 {
					add("joined", "join-room", "")
					publish(10 * n)
					get(state(10*n), true)
					add(`{"success":true}`, "leave-room", "")
					add("false", "publish-presence-state", `,"state":{"n":0}`)
					get(`{}`, false)
					add("joined", "join-room", "")
					get(`{}`, true)
					publish(10*n + 1)
					publish(10*n + 2)
					add("true", "clear-presence-state", "")
					get(`{}`, true)
					publish(10*n + 3)
					publish(10*n + 4)
					add("subscribed"+state(10*n+4), "subscribe-presence", "")
					add("true", "unsubscribe-presence", "")
					add("subscribed"+state(10*n+4), "subscribe-presence", "")
					add("subscribed"+state(10*n+4), "subscribe-presence", "")
					add("true", "unsubscribe-presence", "")
					add("false", "unsubscribe-presence", "")
					add(`{"success":true}`, "leave-room", "")
				}
				for _, text := range sent {
					r.Send(text)
				}
				for i := 0; i < len(sent); {
					text := r.Next()
					if !strings.HasPrefix(text, `{"id":`) {
						continue
					}
					var a struct {
						Payload struct {
							Success bool
							Present []any
							States  json.RawMessage
						}
					}
					_ = json.Unmarshal([]byte(text), &a) // some payloads are no objects
					in, got := len(a.Payload.Present) == 1, a.Payload.Success
					switch kind := want[i]; {
					case strings.Contains(kind, `"payload":joined}`):
						got = got && in && strings.Contains(text, "join-room")
					case strings.Contains(kind, `"payload":subscribed`):
						got = got && in && (paced || strings.Contains(kind, "subscribed"+string(a.Payload.States)+"}"))
					case strings.Contains(kind, "get-presence-state"):
						got = got && strings.HasSuffix(kind, fmt.Sprint(in, "}")) &&
							(paced || strings.Contains(kind, `"payload":`+string(a.Payload.States)))
					default:
						got = text == kind
					}
					require.True(t, got, "answer %d of %d: %s, want %s", i, len(sent), text, want[i])
					i++
				}
			})
		})
	}
}
