package socket

import (
	"context"
	"time"
)

// life is the context of what a socket's commands do: it ends with the
// connection, and its cause is the [*End]. The context package's own would hold
// some 700 bytes from the first command on, which is much for a connection that
// is idle: this one is part of the socket, and keeps contexts derived from it
// only as long as they last.
type life Socket

// after is a function to be called at the end of a life.
type after struct {
	call       func()
	next, prev *after
	listed     bool
}

// Deadline implements context.Context.
func (l *life) Deadline() (time.Time, bool) { return l.parent.Deadline() }

// Done implements context.Context.
func (l *life) Done() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over == nil {
		l.over = make(chan struct{})
		if l.ending != nil {
			close(l.over)
		}
	}
	return l.over
}

// Err implements context.Context.
func (l *life) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ending == nil {
		return nil
	}
	return context.Canceled
}

// Value implements context.Context. What is asked of a life that is over is
// asked of a context that has been cancelled for the same cause: that is how
// context.Cause finds it.
func (l *life) Value(key any) any {
	l.mu.Lock()
	ctx, e := l.parent, l.ending
	l.mu.Unlock()
	if e == nil {
		return ctx.Value(key)
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	cancel(e)
	return ctx.Value(key)
}

// AfterFunc has f called on a goroutine of its own once the life is over: the
// context package asks for that where it derives contexts.
func (l *life) AfterFunc(f func()) (stop func() bool) {
	a := &after{call: f}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ending != nil {
		go f() // the context package's, which returns at once
		return func() bool { return false }
	}
	a.listed = true
	if a.next = l.afterwards; a.next != nil {
		a.next.prev = a
	}
	l.afterwards = a
	return func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		listed := a.listed
		l.forget(a)
		return listed
	}
}

// forget takes a function off the list. The caller holds mu.
func (l *life) forget(a *after) {
	if !a.listed {
		return
	}
	a.listed = false
	if a.prev != nil {
		a.prev.next = a.next
	} else {
		l.afterwards = a.next
	}
	if a.next != nil {
		a.next.prev = a.prev
	}
	a.next, a.prev = nil, nil
}

// end tells everybody that the life is over. The caller holds mu and has set
// ending.
func (l *life) end() {
	if l.over != nil {
		close(l.over)
	}
	for l.afterwards != nil {
		a := l.afterwards
		l.forget(a)
		l.workers.Go(a.call)
	}
}
