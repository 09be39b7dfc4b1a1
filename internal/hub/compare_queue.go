package hub

import (
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/wait"
)

// compareQueue is the set of rooms to compare with Redis soon.
type compareQueue struct {
	wake wait.Signal

	mu    sync.Mutex // guards since
	since map[string]time.Time
}

func newCompareQueue() *compareQueue {
	return &compareQueue{wake: wait.NewSignal(), since: make(map[string]time.Time)}
}

// add asks for a comparison of the room. The generation of Redis must then be
// known from the given time or later.
func (q *compareQueue) add(room string, since time.Time) {
	q.mu.Lock()
	if q.since[room].Before(since) {
		q.since[room] = since
	}
	q.mu.Unlock()
	q.wake.Set()
}

// take empties the set. It returns the latest of the times given to add.
func (q *compareQueue) take() (rooms []string, since time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for room, at := range q.since {
		rooms = append(rooms, room)
		if at.After(since) {
			since = at
		}
	}
	clear(q.since)
	return rooms, since
}
