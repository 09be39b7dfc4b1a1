package socket

import (
	"context"
	"time"
)

// socketContext is the context of a socket's commands. It ends with the connection, and
// its cause is the [*End]. A context of package context would hold some 700 bytes from
// the first command on, which is much for an idle connection. This one is part of the
// socket, and keeps derived contexts only until they end.
type socketContext Socket

// after is a function to be called at the end of the context.
type after struct {
	call       func()
	next, prev *after
	listed     bool
}

// Deadline implements context.Context.
func (c *socketContext) Deadline() (time.Time, bool) { return c.parent.Deadline() }

// Done implements context.Context.
func (c *socketContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.endCh == nil {
		c.endCh = make(chan struct{})
		if c.ending != nil {
			close(c.endCh)
		}
	}
	return c.endCh
}

// Err implements context.Context.
func (c *socketContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending == nil {
		return nil
	}
	return context.Canceled
}

// Value implements context.Context. After the end it asks a context that was cancelled
// with the same cause, because context.Cause finds the cause in that way.
func (c *socketContext) Value(key any) any {
	c.mu.Lock()
	ctx, e := c.parent, c.ending
	c.mu.Unlock()
	if e == nil {
		return ctx.Value(key)
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	cancel(e)
	return ctx.Value(key)
}

// AfterFunc calls f on a goroutine of its own after the end. Package context uses it for
// derived contexts.
func (c *socketContext) AfterFunc(f func()) (stop func() bool) {
	a := &after{call: f}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending != nil {
		go f() // a function of package context, which returns at once
		return func() bool { return false }
	}
	a.listed = true
	if a.next = c.afterwards; a.next != nil {
		a.next.prev = a
	}
	c.afterwards = a
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		listed := a.listed
		c.forget(a)
		return listed
	}
}

// forget removes a function from the list. The caller holds mu.
func (c *socketContext) forget(a *after) {
	if !a.listed {
		return
	}
	a.listed = false
	if a.prev != nil {
		a.prev.next = a.next
	} else {
		c.afterwards = a.next
	}
	if a.next != nil {
		a.next.prev = a.prev
	}
	a.next, a.prev = nil, nil
}

// end ends the context and calls the registered functions. The caller holds mu and has
// set ending.
func (c *socketContext) end() {
	if c.endCh != nil {
		close(c.endCh)
	}
	for c.afterwards != nil {
		a := c.afterwards
		c.forget(a)
		c.workers.Go(a.call)
	}
}
