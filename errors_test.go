package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/store"
)

func TestWireError(t *testing.T) {
	t.Parallel()
	dial := &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("10.0.0.7:6379 refused")}
	for name, tc := range map[string]struct {
		err                 error
		message, code, name string
	}{
		"nil":               {nil, "Internal error", "ESERVER", "Error"},
		"app's plain error": {errors.New("no such order"), "no such order", "ESERVER", "Error"},
		"app's choice":      {fmt.Errorf("x: %w", &CommandError{Code: "E1", Name: "N", Message: "m"}), "m", "E1", "N"},
		"app's bare choice": {&CommandError{Message: "m"}, "m", "ESERVER", "CommandError"},
		"empty choice":      {&CommandError{}, "Internal error", "ESERVER", "CommandError"},
		"nil choice":        {(*CommandError)(nil), "Internal error", "ESERVER", "CommandError"},
		"refusal":           {Refuse(403, "members only"), "members only", "EREFUSED", "CommandError"},
		"unavailable":       {fmt.Errorf("%w: %w", ErrUnavailable, dial), "Temporarily unavailable", "EUNAVAILABLE", "CommandError"},
		"store unavailable": {fmt.Errorf("%w: key mesh:x", store.ErrUnavailable), "Temporarily unavailable", "EUNAVAILABLE", "CommandError"},
		"full":              {fmt.Errorf("%w: %w: OOM command not allowed", ErrUnavailable, store.ErrFull), "Temporarily unavailable: storage is full", "EUNAVAILABLE", "CommandError"},
		"fenced":            {store.ErrFenced, "Temporarily unavailable", "EUNAVAILABLE", "CommandError"},
		"too large":         {fmt.Errorf("%w: state of 9000 bytes, at most 8192", ErrTooLarge), "too large: state of 9000 bytes, at most 8192", "ETOOLARGE", "CommandError"},
		"limit":             {ErrLimit, "limit reached", "ELIMIT", "CommandError"},
		"invalid room":      {ErrInvalidRoom, "invalid room name", "EINVALID", "CommandError"},
		"invalid, and redis": {fmt.Errorf("%w: %w", ErrInvalidState, redis.Nil), "invalid presence state", "EINVALID",
			"CommandError"},
		"refused":      {fmt.Errorf("%w: because of Bob", ErrRefused), "Refused", "EREFUSED", "CommandError"},
		"busy guards":  {fmt.Errorf("%w: %w", ErrRefused, ErrBusy), "Busy", "EBUSY", "CommandError"},
		"not present":  {ErrNotPresent, "Not in the room", "ENOTFOUND", "CommandError"},
		"closed":       {ErrClosed, "Closed", "ECLOSED", "CommandError"},
		"conflict":     {ErrConflict, "Conflicting changes", "ECONFLICT", "CommandError"},
		"late":         {&callbacks.TimeoutError{Name: "command", After: time.Second}, "Timed out", "ETIMEOUT", "CommandError"},
		"cancelled":    {context.Canceled, "Closed", "ECLOSED", "CommandError"},
		"panic":        {&callbacks.PanicError{Name: "command", Value: "secret"}, "Internal error", "ESERVER", "Error"},
		"redis":        {redis.Nil, "Internal error", "ESERVER", "Error"},
		"redis closed": {redis.ErrClosed, "Internal error", "ESERVER", "Error"},
		"network":      {fmt.Errorf("x: %w", dial), "Internal error", "ESERVER", "Error"},
	} {
		message, code, class := wireError(tc.err)
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
		"as given":     {Refuse(403, "members only"), 403, "members only"},
		"defaults":     {&Refusal{}, 401, "Unauthorized"},
		"status alone": {Refuse(429, ""), 429, "Too Many Requests"},
		"odd status":   {Refuse(499, ""), 499, "Unauthorized"},
		"no refusal":   {Refuse(200, "fine"), 401, "fine"},
		"nil":          {(*Refusal)(nil), 401, "Unauthorized"},
	} {
		r, ok := errors.AsType[*Refusal](fmt.Errorf("hook: %w", tc.err))
		assert.True(t, ok, name)
		status, message := r.response()
		assert.Equal(t, tc.status, status, name)
		assert.Equal(t, tc.message, message, name)
		assert.ErrorIs(t, tc.err, ErrRefused, name)
	}
}
