package guards

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// A request of a client does not use an answer of a guard that is older than five
// seconds, with any command.
func TestAnOldAnswerIsNotUsedForARequest(t *testing.T) {
	t.Parallel()
	for _, path := range []struct{ command, payload, allowed string }{
		{"mesh/join-room", `{"roomName":"doc"}`, "insider"},
		{"mesh/subscribe-presence", `{"roomName":"doc"}`, "insider"},
		{"mesh/get-presence-state", `{"roomName":"doc"}`, `"success":true`},
		{"mesh/get-room-metadata", `{"roomName":"doc"}`, "topic"},
		{"mesh/get-connection-metadata", `{"connectionId":"INSIDER"}`, "insider"},
		{"mesh/get-connection-metadata", `{"connectionId":"FAR"}`, "far"},
		{"mesh/publish-presence-state", `{"roomName":"doc","state":{"b":2}}`, "true"},
		{"mesh/clear-presence-state", `{"roomName":"doc"}`, "true"},
	} {
		t.Run(path.command, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				rights := &harness.Register{}
				s1, s2 := w.Server(harness.ByHeader), w.Server(harness.ByHeader)
				for _, s := range []*harness.Server{s1, s2} {
					s.Track(".*", mesh.PresenceOptions{Guard: rights.Guard})
				}
				require.NoError(t, s1.Rooms().SetMetadata(t.Context(), "doc", "topic", mesh.MetadataOptions{}))
				insider, far, p := s1.Dial(harness.Meta(`"insider"`)), s2.Dial(harness.Meta(`"far"`)), s1.Dial(harness.Meta(`{}`))
				for _, m := range []*harness.Peer{insider, far, p} {
					m.Join("doc")
				}
				payload := json.RawMessage(strings.NewReplacer("INSIDER", insider.ID, "FAR", far.ID).Replace(path.payload))
				p.Subscribe("doc")
				ask := func() string { return string(p.Call(path.command, payload)) }
				assert.Contains(t, ask(), path.allowed)

				asked := rights.Times(p.ID)
				w.Sleep(4900 * time.Millisecond)
				assert.Contains(t, ask(), path.allowed)
				assert.Equal(t, asked, rights.Times(p.ID), "answers are kept for five seconds")
				rights.Set(p.ID, false)
				w.Sleep(200 * time.Millisecond)
				assert.NotContains(t, ask(), path.allowed)
				assert.Equal(t, asked+1, rights.Times(p.ID))

				// The subscription ends, too.
				w.Sleep(time.Millisecond)
				before := len(p.Got())
				require.Equal(t, "true", insider.State("doc", map[string]any{"n": 1}))
				w.Sleep(10 * time.Millisecond)
				assert.Len(t, p.Got(), before, "update after the end")

				// The client gets its right back.
				rights.Set(p.ID, true)
				w.Sleep(5100 * time.Millisecond)
				p.Join("doc")
				assert.Contains(t, ask(), path.allowed)
			})
		})
	}
}

// If a connection loses its right while Redis is read for it, the result is not sent.
func TestARightLostWhileRedisIsAsked(t *testing.T) {
	t.Parallel()
	for _, path := range []struct{ command, payload, refused string }{
		{"mesh/join-room", `{"roomName":"doc"}`, `{"success":true,"present":[]}`},
		{"mesh/get-presence-state", `{"roomName":"doc"}`, `{"success":false,"present":[]}`},
		{"mesh/get-room-metadata", `{"roomName":"doc"}`, `{"metadata":null}`},
		{"mesh/subscribe-presence", `{"roomName":"doc"}`, `{"success":false,"present":[]}`},
	} {
		t.Run(path.command, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				rights := &harness.Register{}
				s := w.Server(harness.ByHeader)
				s.Track(".*", mesh.PresenceOptions{Guard: rights.Guard})
				insider, p := s.Dial(harness.Meta(`"insider"`)), s.Dial(harness.Meta(`{}`))
				insider.Join("doc")
				if path.command == "mesh/join-room" {
					p.Join("doc") // it joins again
				}
				require.NoError(t, s.Rooms().SetMetadata(t.Context(), "doc", "topic", mesh.MetadataOptions{}))
				w.Away()
				answer := make(chan string, 1)
				go func() {
					data, err := p.TryCall(path.command, json.RawMessage(path.payload))
					answer <- fmt.Sprint(string(data), err)
				}()
				w.Sleep(50 * time.Millisecond)
				rights.Set(p.ID, false)
				require.NoError(t, s.Presence().Recheck(p.ID))
				w.Sleep(50 * time.Millisecond)
				w.Back()
				got := <-answer
				assert.NotContains(t, got, "insider")
				assert.NotContains(t, got, "topic")
				assert.NotContains(t, got, insider.ID)
				assert.JSONEq(t, path.refused, strings.TrimSuffix(got, "<nil>"))
			})
		})
	}
}

// A guard that fails during a request refuses that request. A subscription that it
// allowed before continues.
func TestAFailingGuardRefusesTheRequestOnly(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		var fails atomic.Bool
		s.Track(".*", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) {
			if fails.Load() {
				return false, errors.New("the database is away")
			}
			return true, nil
		}})
		p, busy := s.Dial(), s.Dial()
		p.Join("doc")
		p.Subscribe("doc")
		w.Sleep(6 * time.Second)
		fails.Store(true)
		assert.Equal(t, "false", p.State("doc", map[string]any{"n": 1}))
		assert.False(t, p.Room("mesh/get-presence-state", "doc").Success)
		w.Sleep(time.Second)
		busy.Join("doc")
		p.Expect(time.Second, "join", busy.ID)
		assert.Zero(t, p.Pushed("mesh/presence-ended"))
		fails.Store(false)
		w.Sleep(time.Second)
		assert.Equal(t, "true", p.State("doc", map[string]any{"n": 1}))
	})
}
