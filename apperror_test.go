package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// rudeCause is a cause of a context whose methods panic.
type rudeCause struct{}

func (rudeCause) Error() string { return "rude" }
func (rudeCause) Is(error) bool { panic("Is was called") }
func (rudeCause) Unwrap() error { panic("Unwrap was called") }

// TestRudeCause: the cause of the app's context is not looked into. A panic there
// would end the process.
func TestRudeCause(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(ctx context.Context) error{
		"nil":           func(context.Context) error { return nil },
		"too late":      func(context.Context) error { time.Sleep(time.Second); return nil },
		"the error":     func(ctx context.Context) error { return ctx.Err() },
		"wrapped error": func(ctx context.Context) error { return fmt.Errorf("x: %w", ctx.Err()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newCallbacks(t.Context(), slog.New(slog.DiscardHandler))
				for _, early := range []bool{true, false} {
					ctx, cancel := context.WithCancelCause(t.Context())
					err := c.run(ctx, callbackGuard, time.Minute, func(ctx context.Context) error {
						if cancel(rudeCause{}); early {
							synctest.Wait() // the call has settled
						}
						return answer(ctx)
					})
					_, is := err.(rudeCause)
					assert.True(t, is, "%T %v", err, err)
				}
				require.NoError(t, c.close(t.Context()))
				assert.Equal(t, callbackStats{Calls: 2}, c.stats()[callbackGuard])
			})
		})
	}
}

// circular wraps itself.
type circular struct{ next []error }

func (*circular) Error() string     { return "circular" }
func (e *circular) Unwrap() []error { return e.next }

// TestCircularError: an error that wraps itself does not keep a goroutine busy
// for ever.
func TestCircularError(t *testing.T) {
	t.Parallel()
	e := &circular{}
	e.next = []error{errors.New("x"), fmt.Errorf("y: %w", e), e}
	c := newCallbacks(t.Context(), slog.New(slog.DiscardHandler))
	err := c.run(t.Context(), callbackCommand, time.Minute, func(context.Context) error { return e })
	require.EqualError(t, err, "circular")
	message, code, _ := wireError(err)
	assert.Equal(t, []string{"Internal error", "ESERVER"}, []string{message, code})
	require.NoError(t, c.close(t.Context()))
}

// encodesNot does not encode to JSON, and says why.
type encodesNot struct{ why error }

func (e encodesNot) MarshalJSON() ([]byte, error) { return nil, e.why }

// TestAppsOwnEncodingError: the app finds its own error in that of a method that
// it gave a value to.
func TestAppsOwnEncodingError(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		conn, ok := s.Connection(s.dial().id)
		require.True(t, ok)
		why := errors.New("no JSON today")
		bad := encodesNot{fmt.Errorf("late: %w", why)}
		m := s.Presence()
		require.NoError(t, m.Join(t.Context(), "lobby", conn.ID()))
		for name, tt := range map[string]struct{ err, is error }{
			"PublishState":           {m.PublishState(t.Context(), "lobby", conn.ID(), bad, StateOptions{}), ErrInvalidState},
			"Connect":                {m.Connect(t.Context(), "c1", bad), ErrInvalidMetadata},
			"ConnectionsSetMetadata": {s.Connections().SetMetadata(t.Context(), conn.ID(), bad, MetadataOptions{}), ErrInvalidMetadata},
			"RoomsSetMetadata":       {s.Rooms().SetMetadata(t.Context(), "lobby", bad, MetadataOptions{}), ErrInvalidMetadata},
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
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		conn, ok := s.Connection(s.dial().id)
		require.True(t, ok)
		require.NoError(t, s.Shutdown(t.Context()))
		for _, payload := range []any{1, encodes{}} {
			require.ErrorIs(t, conn.Send("news", payload), ErrClosed, "%T", payload)
		}
	})
}

type zeroer struct{ N int }

func (*zeroer) IsZero() bool { panic("IsZero was called") }

// TestPlainFields: a field for which encoding/json calls the app's IsZero is not
// plain.
func TestPlainFields(t *testing.T) {
	t.Parallel()
	assert.False(t, isPlain(struct {
		Z zeroer `json:",omitzero"`
	}{}))
	assert.False(t, isPlain(struct {
		Z *zeroer `json:",omitzero"`
	}{&zeroer{}}))
	assert.True(t, isPlain(struct {
		Z zeroer
		T time.Time `json:",omitzero"`
	}{}))
}
