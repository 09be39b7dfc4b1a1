package socket

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

// The context of commands works like one of package context, and keeps no derived
// contexts.
func TestSocketContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := prepare(t, h, nil)
		contexts := make(chan context.Context, 1)
		h.command = func(ctx context.Context, _ wire.Request) { contexts <- ctx }
		r.start(true)
		r.say(`{"command":"mesh/noop"}`)
		ctx := <-contexts
		for range 100 {
			_, cancel := context.WithTimeout(ctx, time.Hour)
			cancel()
		}
		stopped := context.AfterFunc(ctx, func() { t.Error("a function that was stopped was called") })
		derived, cancel := context.WithCancel(ctx)
		defer cancel()
		called := make(chan struct{})
		defer context.AfterFunc(derived, func() { close(called) })()
		if !stopped() || stopped() {
			t.Error("a function is not stopped exactly once")
		}
		r.mu.Lock()
		if a := r.afterwards; a == nil || a.next != nil {
			t.Error("what was derived is kept, or what lasts is not")
		}
		r.mu.Unlock()
		if ctx.Err() != nil || context.Cause(derived) != nil {
			t.Errorf("%v, %v before the end", ctx.Err(), context.Cause(derived))
		}
		r.Close(1000, "")
		<-called
		late, cancel := context.WithTimeout(ctx, time.Hour)
		defer cancel()
		for name, ctx := range map[string]context.Context{"own": ctx, "derived": derived, "late": late} {
			<-ctx.Done()
			var e *End
			if !errors.As(context.Cause(ctx), &e) || e.Cause != CauseClosed || ctx.Err() != context.Canceled {
				t.Errorf("%s: %v, cause %v", name, ctx.Err(), context.Cause(ctx))
			}
		}
		if late := (*socketContext)(r.Socket).AfterFunc(func() {}); late() {
			t.Error("a function was stopped after the end")
		}
	})
}
