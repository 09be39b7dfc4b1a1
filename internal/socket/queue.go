package socket

import (
	"github.com/meshpresence/mesh/internal/wire"
)

const (
	// largeBytes is from which size on an item is written by itself.
	largeBytes = 4 << 10
	// togetherBytes is how much is written together at most.
	togetherBytes = 16 << 10
	// headerBytes is how long the header of an item that is not large is at most.
	headerBytes = 4
)

// item is one frame that waits to be written.
type item struct {
	prev, next *item
	frame      *wire.Frame
	update     *wire.Update // what frame carries; nil: no update
	foreign    *foreign     // in place of frame: one that is not Mesh's
	charge     int
}

// foreign is a message that is not Mesh's, of WebSocket's kind of that number.
type foreign struct {
	kind int
	data []byte
}

// leastCharge is what an item counts at least, about what it takes up itself:
// otherwise any number of messages without content could wait.
const leastCharge = 64

// size returns what the item counts.
func (it *item) size() int {
	if it.foreign != nil {
		return max(len(it.foreign.data), leastCharge)
	}
	return max(it.frame.Size(), leastCharge)
}

// large tells whether the item is written by itself.
func (it *item) large() bool { return it.size() > largeBytes }

// append appends the item as it goes over the network.
func (it *item) append(dst []byte) []byte {
	if it.foreign != nil {
		return wire.AppendMessage(dst, it.foreign.kind, it.foreign.data)
	}
	return it.frame.AppendMessage(dst)
}

// member names whose state an update carries.
type member struct{ room, conn string }

// key returns whose state the item carries; false: it carries none.
func (it *item) key() (member, bool) {
	if it.update == nil || it.update.Type != wire.UpdateState {
		return member{}, false
	}
	return member{it.update.RoomName, it.update.ConnectionID}, true
}

// queue is frames in the order in which they are to be written. It is a list
// and no slice because what coalesces goes from the middle, in constant time
// even when every push makes an older state superfluous. The zero queue is
// empty and holds no memory, and so does one that has been emptied.
type queue struct {
	head, tail *item
	n          int
	// latest is the last state of each member in the queue, each the only one
	// of its member. Nil until coalesce is called, and again once empty.
	latest map[member]*item
}

// push appends it. The older state that it makes superfluous is taken out and
// returned if the queue coalesces; nil: there is none.
func (q *queue) push(it *item) (replaced *item) {
	it.prev = q.tail
	if q.tail != nil {
		q.tail.next = it
	} else {
		q.head = it
	}
	q.tail = it
	q.n++
	if key, ok := it.key(); ok && q.latest != nil {
		if replaced = q.latest[key]; replaced != nil {
			q.remove(replaced)
		}
		q.latest[key] = it
	}
	return replaced
}

// pop takes the first item out; nil: the queue is empty.
func (q *queue) pop() *item {
	it := q.head
	if it == nil {
		return nil
	}
	if key, ok := it.key(); ok && q.latest[key] == it {
		delete(q.latest, key)
	}
	q.remove(it)
	return it
}

// take takes the next items out that may be written together, and appends them
// to dst: one that is large, or small ones of most bytes in all.
func (q *queue) take(dst []*item, most int) []*item {
	for bytes := 0; q.head != nil; {
		bytes += q.head.size() + headerBytes
		if len(dst) > 0 && (bytes > most || q.head.large()) {
			break
		}
		it := q.pop()
		dst = append(dst, it)
		if it.large() {
			break
		}
	}
	return dst
}

// remove takes it out of the list.
func (q *queue) remove(it *item) {
	if it.prev != nil {
		it.prev.next = it.next
	} else {
		q.head = it.next
	}
	if it.next != nil {
		it.next.prev = it.prev
	} else {
		q.tail = it.prev
	}
	it.prev, it.next = nil, nil
	if q.n--; q.n == 0 {
		q.latest = nil
	}
}

// coalesce takes out every state that a later one of the same member makes
// superfluous, and sees to it that none is queued from now on until the queue
// has been emptied. What remains keeps its order. It returns how many went and
// what was charged for them.
func (q *queue) coalesce() (removed, freed int) {
	if q.latest != nil || q.n == 0 {
		return 0, 0
	}
	q.latest = make(map[member]*item)
	for it := q.tail; it != nil; {
		prev := it.prev
		if key, ok := it.key(); ok {
			if q.latest[key] == nil {
				q.latest[key] = it
			} else {
				q.remove(it)
				removed++
				freed += it.charge
			}
		}
		it = prev
	}
	return removed, freed
}

// clear empties the queue and returns how many items it held.
func (q *queue) clear() int {
	n := q.n
	*q = queue{}
	return n
}
