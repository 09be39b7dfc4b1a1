package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

func TestWireError(t *testing.T) {
	t.Parallel()
	dial := &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("10.0.0.7:6379 refused")}
	for name, tc := range map[string]struct {
		err                 error
		message, code, name string
	}{
		"nil":                              {nil, "Internal error", "ESERVER", "Error"},
		"app's plain error":                {errors.New("no such order"), "no such order", "ESERVER", "Error"},
		"CommandError":                     {fmt.Errorf("x: %w", &mesh.CommandError{Code: "E1", Name: "N", Message: "m"}), "m", "E1", "N"},
		"CommandError with a message only": {&mesh.CommandError{Message: "m"}, "m", "ESERVER", "CommandError"},
		"empty CommandError":               {&mesh.CommandError{}, "Internal error", "ESERVER", "CommandError"},
		"nil CommandError":                 {(*mesh.CommandError)(nil), "Internal error", "ESERVER", "CommandError"},
		"refusal":                          {mesh.Refuse(403, "members only"), "members only", "EREFUSED", "CommandError"},
		"unavailable":                      {fmt.Errorf("%w: %w", mesh.ErrUnavailable, dial), "Temporarily unavailable", "EUNAVAILABLE", "CommandError"},
		"store unavailable":                {fmt.Errorf("%w: key mesh:x", store.ErrUnavailable), "Temporarily unavailable", "EUNAVAILABLE", "CommandError"},
		"full":                             {fmt.Errorf("%w: %w: OOM command not allowed", mesh.ErrUnavailable, store.ErrFull), "Temporarily unavailable: storage is full", "EUNAVAILABLE", "CommandError"},
		"fenced":                           {store.ErrFenced, "Temporarily unavailable", "EUNAVAILABLE", "CommandError"},
		"too large":                        {fmt.Errorf("%w: state of 9000 bytes, at most 8192", mesh.ErrTooLarge), "too large: state of 9000 bytes, at most 8192", "ETOOLARGE", "CommandError"},
		"limit":                            {mesh.ErrLimit, "limit reached", "ELIMIT", "CommandError"},
		"invalid room":                     {mesh.ErrInvalidRoom, "invalid room name", "EINVALID", "CommandError"},
		"invalid, and redis": {fmt.Errorf("%w: %w", mesh.ErrInvalidState, redis.Nil), "invalid presence state", "EINVALID",
			"CommandError"},
		"refused":      {fmt.Errorf("%w: because of Bob", mesh.ErrRefused), "Refused", "EREFUSED", "CommandError"},
		"busy guards":  {fmt.Errorf("%w: %w", mesh.ErrRefused, mesh.ErrBusy), "Busy", "EBUSY", "CommandError"},
		"not present":  {mesh.ErrNotPresent, "Not in the room", "ENOTFOUND", "CommandError"},
		"closed":       {mesh.ErrClosed, "Closed", "ECLOSED", "CommandError"},
		"conflict":     {mesh.ErrConflict, "Conflicting changes", "ECONFLICT", "CommandError"},
		"late":         {&callbacks.TimeoutError{Name: "command", After: time.Second}, "Timed out", "ETIMEOUT", "CommandError"},
		"cancelled":    {context.Canceled, "Closed", "ECLOSED", "CommandError"},
		"panic":        {&callbacks.PanicError{Name: "command", Value: "secret"}, "Internal error", "ESERVER", "Error"},
		"redis":        {redis.Nil, "Internal error", "ESERVER", "Error"},
		"redis closed": {redis.ErrClosed, "Internal error", "ESERVER", "Error"},
		"network":      {fmt.Errorf("x: %w", dial), "Internal error", "ESERVER", "Error"},
	} {
		message, code, class := testhook.WireError(tc.err)
		assert.Equal(t, []string{tc.message, tc.code, tc.name}, []string{message, code, class}, name)
	}
}

func TestRefusal(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		err     error
		status  int
		message string
	}{
		"as given":     {mesh.Refuse(403, "members only"), 403, "members only"},
		"defaults":     {&mesh.Refusal{}, 401, "Unauthorized"},
		"status alone": {mesh.Refuse(429, ""), 429, "Too Many Requests"},
		"odd status":   {mesh.Refuse(499, ""), 499, "Unauthorized"},
		"no refusal":   {mesh.Refuse(200, "fine"), 401, "fine"},
		"nil":          {(*mesh.Refusal)(nil), 401, "Unauthorized"},
	} {
		r, ok := errors.AsType[*mesh.Refusal](fmt.Errorf("hook: %w", tc.err))
		assert.True(t, ok, name)
		status, message := r.Response()
		assert.Equal(t, tc.status, status, name)
		assert.Equal(t, tc.message, message, name)
		assert.ErrorIs(t, tc.err, mesh.ErrRefused, name)
	}
}

// failingJSON returns an error if it is encoded to JSON.
type failingJSON struct{ err error }

func (f failingJSON) MarshalJSON() ([]byte, error) { return nil, f.err }

// TestAppsOwnEncodingError checks that methods that encode a value of the app wrap the
// error of its MarshalJSON.
func TestAppsOwnEncodingError(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		conn, ok := s.Connection(s.Dial().ID)
		require.True(t, ok)
		cause := errors.New("no JSON today")
		bad := failingJSON{fmt.Errorf("late: %w", cause)}
		m := s.Presence()
		require.NoError(t, m.Join(t.Context(), "lobby", conn.ID()))
		for name, tt := range map[string]struct{ err, is error }{
			"PublishState":           {m.PublishState(t.Context(), "lobby", conn.ID(), bad, mesh.StateOptions{}), mesh.ErrInvalidState},
			"Connect":                {m.Connect(t.Context(), "c1", bad), mesh.ErrInvalidMetadata},
			"ConnectionsSetMetadata": {s.Connections().SetMetadata(t.Context(), conn.ID(), bad, mesh.MetadataOptions{}), mesh.ErrInvalidMetadata},
			"RoomsSetMetadata":       {s.Rooms().SetMetadata(t.Context(), "lobby", bad, mesh.MetadataOptions{}), mesh.ErrInvalidMetadata},
			"Send":                   {conn.Send("news", bad), cause},
		} {
			require.ErrorIs(t, tt.err, tt.is, name)
			require.ErrorIs(t, tt.err, cause, name)
			_, ok = errors.AsType[*json.MarshalerError](tt.err)
			assert.True(t, ok, name)
		}
	})
}
