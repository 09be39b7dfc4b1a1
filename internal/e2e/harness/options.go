package harness

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// InRoomPayload returns the payload of a request about a room.
func InRoomPayload(room string) map[string]any { return map[string]any{"roomName": room} }

// AllowMetadata lets clients set their metadata.
func AllowMetadata(o *mesh.Options) {
	o.ClientMetadata = func(_ context.Context, _ mesh.Member, proposed json.RawMessage) (any, error) { return proposed, nil }
}

// ExpectPushed checks that text is exactly the presence update about p with the given
// fields and the fields of every update.
func (p *Peer) ExpectPushed(t *testing.T, text, want string) Update {
	t.Helper()
	var f struct {
		Command string
		Payload map[string]any
	}
	var raw map[string]json.RawMessage
	require.NoError(t, json.Unmarshal([]byte(text), &f))
	require.NoError(t, json.Unmarshal([]byte(text), &raw))
	assert.Len(t, raw, 2, "command and payload: %s", text)
	assert.Equal(t, "mesh/presence-update", f.Command)
	var u Update
	require.NoError(t, json.Unmarshal(raw["payload"], &u))
	assert.Equal(t, p.ID, u.ConnectionID)
	assert.Positive(t, u.Timestamp)
	added := []string{"connectionId", "timestamp", "seq", "epoch"}
	if u.Type == "join" || u.Type == "leave" {
		added = append(added, "joinedAt")
	}
	for _, extra := range added {
		assert.Contains(t, f.Payload, extra)
		delete(f.Payload, extra)
	}
	got, err := json.Marshal(f.Payload)
	require.NoError(t, err)
	assert.JSONEq(t, want, string(got))
	return u
}

// NoCommandLimit removes the limit of commands per second.
func NoCommandLimit(o *mesh.Options) { o.Limits.CommandsPerSecond = -1 }

// Panicking panics when it is encoded.
type Panicking struct{}

func (Panicking) MarshalJSON() ([]byte, error) { panic("no JSON today") }

// ExpirationOff turns expired events off.
func ExpirationOff(o *mesh.Options) { off := false; o.EnablePresenceExpirationEvents = &off }

// LeaseOf sets Options.LeaseTTL.
func LeaseOf(d time.Duration) func(*mesh.Options) { return func(o *mesh.Options) { o.LeaseTTL = d } }

// Limits changes Options.Limits.
func Limits(change func(*mesh.Limits)) func(*mesh.Options) {
	return func(o *mesh.Options) { change(&o.Limits) }
}

// Code returns the code of an answer that is an error, or "".
func Code(t *testing.T, answer json.RawMessage) string {
	t.Helper()
	var e struct{ Code string }
	_ = json.Unmarshal(answer, &e)
	return e.Code
}
