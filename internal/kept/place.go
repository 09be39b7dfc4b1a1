package kept

import (
	"container/heap"
	"math/rand/v2"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// margin is the time after a deadline at which a place is due. The clock of Redis is
	// known only as exactly as a round trip allows.
	margin = 10 * time.Millisecond
	// farthest bounds the time until a deadline that is believed. It is more than the
	// longest grace.
	farthest = 15 * time.Minute
)

// placeID names a kept place.
type placeID struct{ room, conn, entry string }

// place is a kept place with a timer.
type place struct {
	placeID
	until  int64 // deadline in Redis time (unix ms)
	bucket int
	at     time.Time // of the next attempt
	// refused counts the attempts that Redis refused because of the data of the room.
	refused int
	// done means that end has settled the place.
	done bool

	index int // in the heap; -1: not in it
}

// item returns the item that ends the place.
func (p *place) item() store.CleanUpItem {
	return store.KeptPlace{EntryRef: store.EntryRef{Room: p.room, Conn: p.conn, Entry: p.entry}}.Item()
}

// localTime returns the time of this server at which a place with the given deadline is
// due, and whether the deadline is over. It is not ok if the clock of Redis is unknown.
func (s *Sweeper) localTime(until int64) (at time.Time, over, ok bool) {
	now, ok := s.cfg.Clock()
	if !ok {
		return time.Time{}, false, false
	}
	left := min(max(until-now, 0), farthest.Milliseconds())
	return time.Now().Add(time.Duration(left)*time.Millisecond + margin), until <= now, true
}

// jitter is a random addition to othersTurn.
func jitter() time.Duration { return rand.N(othersJitter) }

// queue is a heap of places with the next one first, without duplicates.
type queue struct {
	heap placeHeap
	of   map[placeID]*place
}

// add adds a place. It returns false if the queue is full. A place that is in the queue
// stays as it is, or becomes due earlier.
func (q *queue) add(p *place) bool {
	if old := q.of[p.placeID]; old != nil {
		if old.refused == 0 && p.at.Before(old.at) {
			old.at, old.until = p.at, p.until
			heap.Fix(&q.heap, old.index)
		}
		return true
	}
	if len(q.heap) >= maxPlaces {
		return false
	}
	q.of[p.placeID] = p
	heap.Push(&q.heap, p)
	return true
}

// refused reports whether a place waits because Redis refused to end it.
func (q *queue) refused(id placeID) bool {
	p := q.of[id]
	return p != nil && p.refused > 0
}

// remove removes a place, if it is in the queue.
func (q *queue) remove(id placeID) {
	if p := q.of[id]; p != nil {
		delete(q.of, id)
		heap.Remove(&q.heap, p.index)
	}
}

// takeDue removes and returns places that are due, at most limit. Those of a held bucket
// are put off until the time that held returns.
func (q *queue) takeDue(now time.Time, limit int, held func(bucket int) time.Time) (due []*place) {
	for len(due) < limit && len(q.heap) > 0 {
		p := q.heap[0]
		if p.at.After(now) {
			break
		}
		if until := held(p.bucket); until.After(now) {
			p.at = until
			heap.Fix(&q.heap, 0)
			continue
		}
		q.remove(p.placeID)
		due = append(due, p)
	}
	return due
}

// placeHeap implements heap.Interface.
type placeHeap []*place

func (h placeHeap) Len() int           { return len(h) }
func (h placeHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }

func (h placeHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *placeHeap) Push(x any) {
	p, _ := x.(*place)
	p.index = len(*h)
	*h = append(*h, p)
}

func (h *placeHeap) Pop() any {
	last := len(*h) - 1
	p := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	p.index = -1
	return p
}
