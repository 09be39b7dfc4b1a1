package hub

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// alarm is one thing to do later. Its fields are the alarms' own, but for
// fire, which is set once.
type alarm struct {
	fire  func() // runs on the goroutine of alarms.run; must not block
	at    time.Time
	index int // in the heap, from 1; 0: not set
}

// alarms does things later, all on one goroutine. An alarm that is cancelled
// may still be about to fire: whoever it fires for looks again.
type alarms struct {
	wake chan struct{} // the earliest alarm has changed

	mu   sync.Mutex // guards heap and the alarms in it
	heap alarmHeap
}

func newAlarms() *alarms { return &alarms{wake: make(chan struct{}, 1)} }

// set arms a for the given time, instead of the one it was armed for.
func (s *alarms) set(a *alarm, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.index > 0 && a.at.Equal(at) {
		return
	}
	a.at = at
	if a.index > 0 {
		heap.Fix(&s.heap, a.index-1)
	} else {
		heap.Push(&s.heap, a)
	}
	if s.heap[0] == a {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// cancel disarms a.
func (s *alarms) cancel(a *alarm) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.index > 0 {
		heap.Remove(&s.heap, a.index-1)
	}
}

// next takes the first alarm that is due, or says how long until there is
// one (negative: there is none).
func (s *alarms) next(now time.Time) (due *alarm, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.heap) == 0 {
		return nil, -1
	}
	if wait := s.heap[0].at.Sub(now); wait > 0 {
		return nil, wait
	}
	return heap.Pop(&s.heap).(*alarm), 0
}

// run fires alarms until ctx ends.
func (s *alarms) run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for ctx.Err() == nil {
		due, wait := s.next(time.Now())
		if due != nil {
			due.fire()
			continue
		}
		if wait < 0 {
			wait = time.Hour
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-s.wake:
		case <-ctx.Done():
		}
	}
}

// alarmHeap is a container/heap, earliest first.
type alarmHeap []*alarm

func (h alarmHeap) Len() int           { return len(h) }
func (h alarmHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h alarmHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i+1, j+1
}

func (h *alarmHeap) Push(x any) {
	a := x.(*alarm)
	*h = append(*h, a)
	a.index = len(*h)
}

func (h *alarmHeap) Pop() any {
	old := *h
	a := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	a.index = 0
	return a
}
