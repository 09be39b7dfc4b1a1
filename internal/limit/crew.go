package limit

import "sync"

// Crew counts goroutines. It is a WaitGroup whose Wait can be given up: a
// goroutine may hang in the app's code. The zero Crew has none. Safe for
// concurrent use.
type Crew struct {
	mu   sync.Mutex // guards the fields below
	n    int
	idle chan struct{} // closed when n falls to 0; nil: nothing waits
}

// Go runs f on a goroutine of the crew.
func (c *Crew) Go(f func()) {
	c.Add()
	go func() {
		defer c.Done()
		f()
	}()
}

// Add counts a goroutine in.
func (c *Crew) Add() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
}

// Done counts a goroutine out.
func (c *Crew) Done() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n--
	if c.n == 0 && c.idle != nil {
		close(c.idle)
		c.idle = nil
	}
}

// Wait returns true when none is left, and false if quit is closed before.
func (c *Crew) Wait(quit <-chan struct{}) bool {
	c.mu.Lock()
	if c.n == 0 {
		c.mu.Unlock()
		return true
	}
	if c.idle == nil {
		c.idle = make(chan struct{})
	}
	idle := c.idle
	c.mu.Unlock()
	select {
	case <-idle:
		return true
	case <-quit:
		return false
	}
}
