package limit

import "sync"

// Group counts goroutines. It is like sync.WaitGroup, but its Wait can be given up,
// because a goroutine may hang in the app's code. The zero value is an empty group. It
// is safe for concurrent use.
type Group struct {
	mu   sync.Mutex // guards the following
	n    int
	idle chan struct{} // closed when n falls to 0; nil: no call waits
}

// Go runs f on a goroutine of the group.
func (g *Group) Go(f func()) {
	g.Add()
	go func() {
		defer g.Done()
		f()
	}()
}

// Add adds a goroutine.
func (g *Group) Add() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n++
}

// Done removes a goroutine.
func (g *Group) Done() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n--
	if g.n == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
}

// Wait waits until the group is empty. It returns false if quit is closed before.
func (g *Group) Wait(quit <-chan struct{}) bool {
	g.mu.Lock()
	if g.n == 0 {
		g.mu.Unlock()
		return true
	}
	if g.idle == nil {
		g.idle = make(chan struct{})
	}
	idle := g.idle
	g.mu.Unlock()
	select {
	case <-idle:
		return true
	case <-quit:
		return false
	}
}
