package attack

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// quoted returns text in the form of JavaScript's JSON.stringify.
func quoted(t *testing.T, text string) string {
	t.Helper()
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	require.NoError(t, e.Encode(text))
	return strings.TrimSuffix(b.String(), "\n")
}

// oddNames are valid names. Each one is a room of its own, and is sent back unchanged.
var oddNames = []string{
	"caf\u00e9", "cafe\u0301", // NFC and NFD
	"\ufeffroom", "room", "room\u200b", "ro\u200dom", "\u202emoor", "room\u2028", "\u00adroom", // BOM, zero width, right to left, line separator
	"👩‍👩‍👧‍👦", "👩", "🏳️‍🌈", "\U0010ffff", "\ufffd", "\ufffe", "\U000e0041",
	"lobby:conn:X", "mesh:presence:members:x", "presence:conn:lobby:c", "}:presence:conn:y", "{x}", "{", "}{", "*", "?[a]", "%s%d", "-", "0", " ", "  ",
	`"`, `\`, `\u0041`, "'; FLUSHALL", "<script>", "e c e1 other", "__proto__", "constructor", "toString",
	strings.Repeat("é", 128),
}

func TestOddNamesAreRoomsOfTheirOwn(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.NoCommandLimit, harness.ByHeader, func(o *mesh.Options) { o.PingInterval = time.Hour })
		watcher, p := s.Dial(harness.Meta(`{"n":1}`)), s.Dial(harness.Meta(`{"who":"p"}`))
		for _, name := range oddNames {
			v := watcher.Subscribe(name)
			require.Empty(t, v.IDs(t), "%q is another room", name)
			v = p.Join(name)
			require.Equal(t, []string{p.ID}, v.IDs(t), "%q", name)
			state := fmt.Sprintf(`{%s:%[1]s,"n":-0.10e+02}`, quoted(t, name))
			require.Equal(t, "true", string(p.Ask("mesh/publish-presence-state", `{"roomName":`+quoted(t, name)+`,"state":`+state+`}`)), "%q", name)
			w.Eventually(5*time.Second, func() bool { return watcher.Count("state", p.ID) == 1 }, "the state in %q", name)
			for _, u := range watcher.Got() {
				require.Equal(t, name, u.RoomName, "the name is unchanged")
			}
			require.Equal(t, state, string(watcher.Got()[1].State))
			rooms, err := s.Rooms().Of(t.Context(), p.ID)
			require.NoError(t, err)
			require.Equal(t, []string{name}, rooms)
			p.Leave(name)
			w.Eventually(5*time.Second, func() bool { return watcher.Count("leave", p.ID) == 1 }, "the leave of %q", name)
			watcher.Call("mesh/unsubscribe-presence", harness.InRoomPayload(name))
			watcher.Mu.Lock()
			watcher.Updates, watcher.Times = nil, nil
			watcher.Mu.Unlock()
		}
	})
}

// TestInvalidNames checks that invalid names get an error code from every command, and
// have no effect.
func TestInvalidNames(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.NoCommandLimit, harness.Limits(func(l *mesh.Limits) { l.FrameBytes = 2 << 20 }))
		p := s.Level2().Dial()
		before := w.RoomKeys()
		for _, name := range []string{
			`""`, `"a\u0000b"`, `"\u0000"`, `"a\nb"`, `"\r\n"`, `"\u001b[31m"`, `"\u007f"`, `"\u0085"`, // control characters
			`"\ud800"`, `"\udc00\ud800"`, `"a\udfff"`, // halves of surrogate pairs
			`"` + strings.Repeat("x", 257) + `"`, `"` + strings.Repeat("x", 1<<20) + `"`, `"` + strings.Repeat("é", 129) + `"`,
			`null`, `1`, `true`, `[]`, `{}`, `["lobby"]`, `1e400`,
		} {
			for _, command := range []string{"mesh/join-room", "mesh/leave-room", "mesh/subscribe-presence", "mesh/unsubscribe-presence",
				"mesh/publish-presence-state", "mesh/clear-presence-state", "mesh/get-presence-state", "mesh/get-room-metadata"} {
				answer := p.Ask(command, `{"roomName":`+name+`,"state":{}}`)
				require.Equal(t, "EINVALID", harness.Code(t, answer), "%s %.40s: %.200s", command, name, answer)
				require.Less(t, len(answer), 400, "the answer does not contain the name")
			}
			answer := p.Ask("mesh/get-connection-metadata", `{"connectionId":`+name+`}`)
			require.Contains(t, []string{"EINVALID", ""}, harness.Code(t, answer), "%.40s", name)
		}
		// A frame with invalid UTF-8 (overlong forms, surrogates, cut characters) is no
		// text. Like every frame that is not JSON, it gets no answer.
		seen := s.Stats()
		for _, bytes := range []string{"\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xff", "\xc3"} {
			p.Say(`{"id":7,"command":"mesh/join-room","payload":{"roomName":"a` + bytes + `"}}`)
		}
		require.Equal(t, "true", string(p.Call("mesh/noop", nil)))
		assert.Equal(t, seen.Changes, s.Stats().Changes)
		assert.Equal(t, before, w.RoomKeys(), "Redis has new keys")
	})
}

// States and metadata are either delivered unchanged or refused.
func TestOddValues(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.NoCommandLimit, harness.AllowMetadata)
		watcher, p := s.Level2().Dial(), s.Dial()
		watcher.Subscribe("lobby")
		p.Join("lobby")
		nested := func(n int) string { return strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n) }
		kept := []string{
			`{}`, `{"a":1,"a":2}`, `{"":0}`, `{"n":12345678901234567890.000100,"e":1e400,"z":-0}`, `{"s":"\ud800 \u0000 \ufeff"}`,
			`{"\u202e":"` + "\u200b\u2028" + `"}`, `{"big":` + strings.Repeat("9", 5000) + `}`, `{"__proto__":{"x":1}}`, nested(500),
		}
		for i, state := range kept {
			require.Equal(t, "true", string(p.Ask("mesh/publish-presence-state", `{"roomName":"lobby","state":`+state+`}`)), "%.80s", state)
			w.Eventually(5*time.Second, func() bool { return watcher.Count("state", p.ID) == i+1 }, "%.80s", state)
			got := watcher.Got()
			require.Equal(t, state, string(got[len(got)-1].State), "the state is unchanged")
			set := p.Ask("mesh/set-my-connection-metadata", `{"metadata":`+state+`}`)
			require.JSONEq(t, `{"success":true}`, string(set))
			require.Equal(t, `{"metadata":`+state+`}`, string(p.Call("mesh/get-my-connection-metadata", nil)))
		}
		for state, want := range map[string]string{
			`[]`: "EINVALID", `"x"`: "EINVALID", `1`: "EINVALID", `true`: "EINVALID",
			`{"x":"` + strings.Repeat("x", 9000) + `"}`: "ETOOLARGE",
		} {
			require.Equal(t, want, harness.Code(t, p.Ask("mesh/publish-presence-state", `{"roomName":"lobby","state":`+state+`}`)), "%.40s", state)
		}
		for expiry, want := range map[string]string{
			`1e308`: "EINVALID", `9.3e18`: "EINVALID", `"5"`: "EINVALID", `{}`: "EINVALID", `1e999`: "EINVALID",
			`9.2e12`: "", `-1e300`: "", `0.0001`: "", `null`: "",
		} {
			answer := p.Ask("mesh/publish-presence-state", `{"roomName":"lobby","state":{"x":1},"expireAfter":`+expiry+`}`)
			require.Equal(t, want, harness.Code(t, answer), "%s: %s", expiry, answer)
		}
		// A value that could not be encoded at the deeper level of a push.
		deep := `{"id":1,"command":"mesh/publish-presence-state","payload":{"roomName":"lobby","state":` + nested(511) + `}}`
		p.Say(deep)
		require.Equal(t, "true", string(p.Call("mesh/noop", nil)))
		assert.EqualValues(t, 0, testhook.SocketPanics(s.Server))
	})
}
