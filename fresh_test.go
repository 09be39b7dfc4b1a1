package mesh

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
)

// A request of a client does not go by a verdict older than five seconds, on any
// path, whatever it was.
func TestAnOldVerdictAnswersNoRequest(t *testing.T) {
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
			embedded(t, func(t *testing.T, w *world) {
				rights := &register{}
				s1, s2 := w.server(byHeader), w.server(byHeader)
				for _, s := range []*testServer{s1, s2} {
					s.track(".*", PresenceOptions{Guard: rights.guard})
				}
				require.NoError(t, s1.Rooms().SetMetadata(t.Context(), "doc", "topic", MetadataOptions{}))
				insider, far, p := s1.dial(meta(`"insider"`)), s2.dial(meta(`"far"`)), s1.dial(meta(`{}`))
				for _, m := range []*peer{insider, far, p} {
					m.join("doc")
				}
				payload := json.RawMessage(strings.NewReplacer("INSIDER", insider.id, "FAR", far.id).Replace(path.payload))
				p.subscribe("doc")
				ask := func() string { return string(p.call(path.command, payload)) }
				assert.Contains(t, ask(), path.allowed)

				asked := rights.times(p.id)
				w.sleep(4900 * time.Millisecond)
				assert.Contains(t, ask(), path.allowed)
				assert.Equal(t, asked, rights.times(p.id), "kept for five seconds")
				rights.set(p.id, false)
				w.sleep(200 * time.Millisecond)
				assert.NotContains(t, ask(), path.allowed)
				assert.Equal(t, asked+1, rights.times(p.id))

				// It ends what it has watched, too.
				w.sleep(time.Millisecond)
				before := len(p.got())
				require.Equal(t, "true", insider.state("doc", map[string]any{"n": 1}))
				w.sleep(10 * time.Millisecond)
				assert.Len(t, p.got(), before, "no event")

				// And the other way round.
				rights.set(p.id, true)
				w.sleep(5100 * time.Millisecond)
				p.join("doc")
				assert.Contains(t, ask(), path.allowed)
			})
		})
	}
}

// What is read for a connection while it loses the right is not told.
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
			embedded(t, func(t *testing.T, w *world) {
				rights := &register{}
				s := w.server(byHeader)
				s.track(".*", PresenceOptions{Guard: rights.guard})
				insider, p := s.dial(meta(`"insider"`)), s.dial(meta(`{}`))
				insider.join("doc")
				if path.command == "mesh/join-room" {
					p.join("doc") // it joins again
				}
				require.NoError(t, s.Rooms().SetMetadata(t.Context(), "doc", "topic", MetadataOptions{}))
				w.away()
				answer := make(chan string, 1)
				go func() {
					data, err := p.tryCall(path.command, json.RawMessage(path.payload))
					answer <- fmt.Sprint(string(data), err)
				}()
				w.sleep(50 * time.Millisecond)
				rights.set(p.id, false)
				require.NoError(t, s.Presence().Recheck(p.id))
				w.sleep(50 * time.Millisecond)
				w.back()
				got := <-answer
				assert.NotContains(t, got, "insider")
				assert.NotContains(t, got, "topic")
				assert.NotContains(t, got, insider.id)
				assert.JSONEq(t, path.refused, strings.TrimSuffix(got, "<nil>"))
			})
		})
	}
}

// A guard that fails when a client makes a request refuses that request. The
// subscription, to which it said yes before, goes on.
func TestAFailureRefusesTheRequestOnly(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server()
		var fails atomic.Bool
		s.track(".*", PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) {
			if fails.Load() {
				return false, errors.New("the database is away")
			}
			return true, nil
		}})
		p, busy := s.dial(), s.dial()
		p.join("doc")
		p.subscribe("doc")
		w.sleep(6 * time.Second)
		fails.Store(true)
		assert.Equal(t, "false", p.state("doc", map[string]any{"n": 1}))
		assert.False(t, p.room("mesh/get-presence-state", "doc").Success)
		w.sleep(time.Second)
		busy.join("doc")
		p.expect(time.Second, "join", busy.id)
		assert.Zero(t, p.pushed("mesh/presence-ended"))
		fails.Store(false)
		w.sleep(time.Second)
		assert.Equal(t, "true", p.state("doc", map[string]any{"n": 1}))
	})
}
