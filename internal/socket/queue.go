package socket

import (
	"math"

	"github.com/meshpresence/mesh/internal/wire"
)

const (
	// largeBytes is the size from which an item is written by itself.
	largeBytes = 4 << 10
	// togetherBytes limits the bytes that are written together.
	togetherBytes = 16 << 10
	// headerBytes is the longest header of an item that is not large.
	headerBytes = 4
)

// item is one frame that waits to be written.
type item struct {
	prev, next *item
	frame      *wire.Frame
	update     *wire.Update // the update in frame; nil: no update
	message    *rawMessage  // instead of frame: a message that is not of the Mesh protocol
	charge     int32        // see setCharge
	answer     bool         // the answer to a command
}

// rawMessage is a message that is not of the Mesh protocol. kind is WebSocket's message
// type.
type rawMessage struct {
	kind int
	data []byte
}

// leastCharge is the least that an item counts, about its own size in memory. Otherwise
// any number of empty messages could wait.
const leastCharge = 64

// size returns the bytes that the item counts.
func (it *item) size() int {
	if it.message != nil {
		return max(len(it.message.data), leastCharge)
	}
	return max(it.frame.Size(), leastCharge)
}

// setCharge charges the item with its size, but at most most. A value that is not
// positive means no limit.
func (it *item) setCharge(most int) {
	if most <= 0 {
		most = math.MaxInt32
	}
	it.charge = int32(min(it.size(), most, math.MaxInt32))
}

// large reports whether the item is written by itself.
func (it *item) large() bool { return it.size() > largeBytes }

// append appends the item as it is sent over the network.
func (it *item) append(dst []byte) []byte {
	if it.message != nil {
		return wire.AppendMessage(dst, it.message.kind, it.message.data)
	}
	return it.frame.AppendMessage(dst)
}

// member identifies a member of a room. Without a connection it stands for the numbers of
// the room.
type member struct{ room, conn string }

// key returns the member whose state the item carries, or the room whose numbers it
// carries. It returns false if a later item does not replace it.
func (it *item) key() (member, bool) {
	if it.frame != nil && it.frame.NumbersOf() != "" {
		return member{room: it.frame.NumbersOf()}, true
	}
	if it.update == nil || it.update.Type != wire.UpdateState {
		return member{}, false
	}
	return member{it.update.RoomName, it.update.ConnectionID}, true
}

// queue holds frames in the order in which they are to be written. It is a list and not a
// slice, because coalescing removes items from the middle. A list does that in constant
// time even if every push replaces an older state. The zero queue is empty and holds no
// memory, and so does a queue that has been emptied.
type queue struct {
	head, tail *item
	n          int
	// latest is the last state of each member, and the last numbers of each room, in the
	// queue. Then it has no other states and numbers. It is nil until coalesce is called, and again once the queue is empty.
	latest map[member]*item
}

// push appends it. If the queue coalesces, push removes and returns the older item that
// it replaces. Otherwise it returns nil.
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

// pop takes the first item out. It returns nil if the queue is empty.
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

// take takes out the next items that may be written together, and appends them to dst.
// These are one large item, or the item alone (nil: none), or small items of at most most
// bytes together.
func (q *queue) take(dst []*item, most int, alone *item) []*item {
	for bytes := 0; q.head != nil; {
		bytes += q.head.size() + headerBytes
		if len(dst) > 0 && (bytes > most || q.head.large() || q.head == alone) {
			break
		}
		it := q.pop()
		dst = append(dst, it)
		if it.large() || it == alone {
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

// coalesce removes every state that a later one of the same member replaces, and numbers
// that later ones of the same room replace. Until the
// queue has been emptied, push does the same from now on. The remaining items keep their
// order. coalesce returns the number of removed items and their charge.
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
				freed += int(it.charge)
			}
		}
		it = prev
	}
	return removed, freed
}

// clear empties the queue and returns the number of its items.
func (q *queue) clear() int {
	n := q.n
	*q = queue{}
	return n
}
