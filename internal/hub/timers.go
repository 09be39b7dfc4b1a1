package hub

import (
	"container/heap"
	"context"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/wait"
)

// timer is one function to call later. fire is set once; timers.mu guards the
// other fields.
type timer struct {
	fire  func() // runs on the goroutine of timers.run; must not block
	at    time.Time
	index int // in the heap, from 1; 0: not set
}

// timers calls functions later, all of them on one goroutine. A function may still
// be called just after its timer was cancelled, so it must check whether there is
// anything to do.
type timers struct {
	wake wait.Signal // the earliest timer has changed

	mu   sync.Mutex // guards heap and the timers in it
	heap timerHeap
}

func newTimers() *timers { return &timers{wake: wait.NewSignal()} }

// set sets t to the given time, in place of an earlier one.
func (ts *timers) set(t *timer, at time.Time) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if t.index > 0 && t.at.Equal(at) {
		return
	}
	t.at = at
	if t.index > 0 {
		heap.Fix(&ts.heap, t.index-1)
	} else {
		heap.Push(&ts.heap, t)
	}
	if ts.heap[0] == t {
		ts.wake.Set()
	}
}

// cancel stops t.
func (ts *timers) cancel(t *timer) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if t.index > 0 {
		heap.Remove(&ts.heap, t.index-1)
	}
}

// next removes and returns the first timer that is due. If none is, it returns the
// time until the first one, or -1 if no timer is set.
func (ts *timers) next(now time.Time) (due *timer, delay time.Duration) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if len(ts.heap) == 0 {
		return nil, -1
	}
	if delay := ts.heap[0].at.Sub(now); delay > 0 {
		return nil, delay
	}
	return heap.Pop(&ts.heap).(*timer), 0
}

// run calls the functions of timers until ctx ends.
func (ts *timers) run(ctx context.Context) {
	sleep := time.NewTimer(time.Hour)
	defer sleep.Stop()
	for ctx.Err() == nil {
		due, delay := ts.next(time.Now())
		if due != nil {
			due.fire()
			continue
		}
		if delay < 0 {
			delay = time.Hour
		}
		sleep.Reset(delay)
		select {
		case <-sleep.C:
		case <-ts.wake:
		case <-ctx.Done():
		}
	}
}

// timerHeap is a container/heap with the earliest timer first.
type timerHeap []*timer

func (h timerHeap) Len() int           { return len(h) }
func (h timerHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h timerHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i+1, j+1
}

func (h *timerHeap) Push(x any) {
	t := x.(*timer)
	*h = append(*h, t)
	t.index = len(*h)
}

func (h *timerHeap) Pop() any {
	old := *h
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	t.index = 0
	return t
}
