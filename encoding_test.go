package mesh_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// encodesNot does not encode to JSON, and says why.
type encodesNot struct{ why error }

func (e encodesNot) MarshalJSON() ([]byte, error) { return nil, e.why }

// TestAppsOwnEncodingError: the app finds its own error in that of a method that
// it gave a value to.
func TestAppsOwnEncodingError(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		conn, ok := s.Connection(s.Dial().ID)
		require.True(t, ok)
		why := errors.New("no JSON today")
		bad := encodesNot{fmt.Errorf("late: %w", why)}
		m := s.Presence()
		require.NoError(t, m.Join(t.Context(), "lobby", conn.ID()))
		for name, tt := range map[string]struct{ err, is error }{
			"PublishState":           {m.PublishState(t.Context(), "lobby", conn.ID(), bad, mesh.StateOptions{}), mesh.ErrInvalidState},
			"Connect":                {m.Connect(t.Context(), "c1", bad), mesh.ErrInvalidMetadata},
			"ConnectionsSetMetadata": {s.Connections().SetMetadata(t.Context(), conn.ID(), bad, mesh.MetadataOptions{}), mesh.ErrInvalidMetadata},
			"RoomsSetMetadata":       {s.Rooms().SetMetadata(t.Context(), "lobby", bad, mesh.MetadataOptions{}), mesh.ErrInvalidMetadata},
			"Send":                   {conn.Send("news", bad), why},
		} {
			require.ErrorIs(t, tt.err, tt.is, name)
			require.ErrorIs(t, tt.err, why, name)
			_, ok = errors.AsType[*json.MarshalerError](tt.err)
			assert.True(t, ok, name)
		}
	})
}

// encodes encodes to JSON by a method of its own.
type encodes struct{}

func (encodes) MarshalJSON() ([]byte, error) { return []byte("1"), nil }

// TestSendAfterShutdown: whatever is sent, the error is the same.
func TestSendAfterShutdown(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		conn, ok := s.Connection(s.Dial().ID)
		require.True(t, ok)
		require.NoError(t, s.Shutdown(t.Context()))
		for _, payload := range []any{1, encodes{}} {
			require.ErrorIs(t, conn.Send("news", payload), mesh.ErrClosed, "%T", payload)
		}
	})
}
