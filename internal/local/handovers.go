package local

import (
	"container/heap"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// maxHandedOver is the most hand-overs that a server remembers. Further ones are not
// remembered. If Redis then goes back to a time before such a hand-over, reconciling ends
// the entry at once.
const maxHandedOver = 1 << 17

// roomConn names the entry of a connection in a room.
type roomConn struct{ room, conn string }

// handedOver is an entry that this server has handed over: Redis keeps its place.
type handedOver struct {
	entry string
	cause store.Cause
	keep  bool          // the connection did not ask to leave
	life  time.Duration // the longest time for which the place is kept after the hand-over
	until time.Time     // Redis has ended the place by then
}

// handOvers remembers each hand-over of this server until the place has ended. If Redis
// goes back to a time before a hand-over, reconciling finds the entry in the index of this
// server again, and hands it over again. The zero value is ready.
type handOvers struct {
	mu     sync.Mutex // guards the fields below
	places map[roomConn]handedOver
	ends   endHeap // of the places, and of places that were dropped before
	timer  clock.Timer
	armed  time.Time // the time at which timer fires; zero: never
	stop   bool
}

// remember notes a hand-over.
func (h *handOvers) remember(wheel *clock.Wheel, at roomConn, p handedOver) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.until = time.Now().Add(p.life)
	if h.stop || len(h.ends) >= maxHandedOver {
		delete(h.places, at) // an earlier entry
		return
	}
	if h.places == nil {
		h.places = make(map[roomConn]handedOver)
	}
	h.places[at] = p
	heap.Push(&h.ends, placeEnd{at: at, until: p.until})
	h.arm(wheel)
}

// arm arms the timer for the first end. h.mu is held.
func (h *handOvers) arm(wheel *clock.Wheel) {
	if len(h.ends) == 0 || h.stop || h.armed.Equal(h.ends[0].until) {
		return
	}
	h.armed = h.ends[0].until
	wheel.Schedule(&h.timer, time.Until(h.armed), func() { h.expire(wheel) })
}

// expire runs on the wheel. It forgets the places that have ended.
func (h *handOvers) expire(wheel *clock.Wheel) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.armed = time.Time{}
	for now := time.Now(); len(h.ends) > 0 && !h.ends[0].until.After(now); {
		end := heap.Pop(&h.ends).(placeEnd)
		if p, ok := h.places[end.at]; ok && !p.until.After(now) {
			delete(h.places, end.at)
		}
	}
	if len(h.places) == 0 {
		h.places = nil
	}
	h.arm(wheel)
}

// drop forgets the place of a connection, because it has ended.
func (h *handOvers) drop(at roomConn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.places, at)
}

// find returns the hand-over of an entry.
func (h *handOvers) find(ref store.EntryRef) (handedOver, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, ok := h.places[roomConn{ref.Room, ref.Conn}]
	return p, ok && p.entry == ref.Entry && p.until.After(time.Now())
}

func (h *handOvers) size() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.places)
}

// close ends the timer.
func (h *handOvers) close(wheel *clock.Wheel) {
	h.mu.Lock()
	h.stop = true
	h.mu.Unlock()
	wheel.Cancel(&h.timer)
}

// placeEnd is the time at which a place has ended at the latest.
type placeEnd struct {
	at    roomConn
	until time.Time
}

// endHeap is a heap.Interface of ends, earliest first.
type endHeap []placeEnd

func (h endHeap) Len() int           { return len(h) }
func (h endHeap) Less(i, j int) bool { return h[i].until.Before(h[j].until) }
func (h endHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *endHeap) Push(x any)        { *h = append(*h, x.(placeEnd)) }

func (h *endHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = placeEnd{}
	*h = old[:len(old)-1]
	return last
}
