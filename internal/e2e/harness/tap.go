package harness

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh"
)

// Tap collects the events of a Subscribe on a goroutine of its own.
type Tap struct {
	Cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex // guards the fields below
	events []mesh.Event
	err    error
}

func (w *World) Tap(p *mesh.PresenceManager, room string, opts mesh.SubscribeOptions) *Tap {
	ctx, cancel := context.WithCancel(w.T.Context())
	a := &Tap{Cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(a.done)
		for e, err := range p.Subscribe(ctx, room, opts) {
			a.mu.Lock()
			if err != nil {
				a.err = errors.Join(a.err, err)
			} else {
				a.events = append(a.events, e)
			}
			a.mu.Unlock()
		}
	}()
	w.T.Cleanup(func() {
		cancel()
		<-a.done
	})
	return a
}

func (a *Tap) Got() []mesh.Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.events)
}

// Wait waits until n events have arrived.
func (a *Tap) Wait(w *World, n int) []mesh.Event {
	w.T.Helper()
	w.Eventually(3*time.Second, func() bool { return len(a.Got()) >= n }, "%d events, got %v", n, a.Got())
	return a.Got()
}

// End waits until the iterator has ended and returns its error.
func (a *Tap) End(w *World) error {
	w.T.Helper()
	w.Eventually(5*time.Second, func() bool {
		select {
		case <-a.done:
			return true
		default:
			return false
		}
	}, "the subscription has not ended")
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}
