package callbacks

import (
	"context"
	"errors"
	"fmt"
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

// No method of the cause of the app's context is called. A panic there would end the
// process.
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
				c := New(t.Context(), testConfig)
				for _, early := range []bool{true, false} {
					ctx, cancel := context.WithCancelCause(t.Context())
					err := c.Run(ctx, Guard, time.Minute, func(ctx context.Context) error {
						if cancel(rudeCause{}); early {
							synctest.Wait() // the call has settled
						}
						return answer(ctx)
					})
					_, is := err.(rudeCause)
					assert.True(t, is, "%T %v", err, err)
				}
				require.NoError(t, c.Close(t.Context()))
				assert.Equal(t, Counts{Calls: 2}, c.Stats()[Guard])
			})
		})
	}
}

// circular wraps itself.
type circular struct{ next []error }

func (*circular) Error() string     { return "circular" }
func (e *circular) Unwrap() []error { return e.next }

// An error that wraps itself does not keep a goroutine busy for ever.
func TestCircularError(t *testing.T) {
	t.Parallel()
	e := &circular{}
	e.next = []error{errors.New("x"), fmt.Errorf("y: %w", e), e}
	c := New(t.Context(), testConfig)
	err := c.Run(t.Context(), Command, time.Minute, func(context.Context) error { return e })
	require.EqualError(t, err, "circular")
	assert.True(t, IsPrivate(err))
	require.NoError(t, c.Close(t.Context()))
}
