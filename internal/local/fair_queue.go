package local

import "slices"

// fairQueue holds the items of one priority. It is fair to rooms and to connections:
//
//   - Each room has its turn, one item at a time. A crowd that joins one room does not
//     delay a join of another. Rooms that have had a turn and new rooms are served
//     alternately, so that neither waits for thousands of the other kind.
//   - Each connection has one item in the turns of rooms, and its others wait behind it
//     in their order. A connection whose metadata is in a hundred rooms does not delay
//     another connection.
//   - If pop is called with newest, every third turn is that of the newest room, and
//     every second turn of a room serves its newest item. So a new operation is answered
//     at once behind a backlog of seconds, whose oldest callers may have given up.
//
// The zero value is empty.
type fairQueue struct {
	first  []slot  // items that were put back; they go before all turns
	fresh  []*turn // not served since they came, oldest first
	turns  []*turn // the others; the first is next
	of     map[queueKey]*turn
	conns  map[*Conn]connBacklog
	served int // turns
	n      int
}

// queueKey identifies the items that share a turn: the items of a room, or those that a
// connection writes about itself.
type queueKey struct {
	room string
	conn *Conn
}

// turn holds the queued items of one key.
type turn struct {
	key   queueKey
	items []slot
	odd   bool // served an odd number of times
}

// slot holds an item while the item has the same stays. An item that got a higher
// priority leaves its slot behind.
type slot struct {
	item  writable
	stays uint32
}

func (s slot) stale() bool { return s.item.queueState().stays != s.stays }

// connBacklog is the items of one connection in a queue.
type connBacklog struct {
	placed int        // items in turns
	behind []writable // items that wait until placed is zero
}

// push queues an item behind those of its connection and of its key.
func (q *fairQueue) push(it writable) {
	q.n++
	b := q.conns[it.conn()]
	if b.placed > 0 {
		b.behind = append(b.behind, it)
		q.conns[it.conn()] = b
		return
	}
	q.put(it, &q.fresh)
}

// put appends an item to its turn. A new turn joins turns.
func (q *fairQueue) put(it writable, turns *[]*turn) {
	q.addPlaced(it, 1)
	t := q.of[it.key()]
	if t == nil {
		if q.of == nil {
			q.of = make(map[queueKey]*turn)
		}
		t = &turn{key: it.key()}
		q.of[t.key] = t
		*turns = append(*turns, t)
	}
	t.items = append(t.items, slot{it, it.queueState().stays})
}

// putBack puts items in front of all others, in their order.
func (q *fairQueue) putBack(items []writable) {
	first := make([]slot, len(items), len(items)+len(q.first))
	for i, it := range items {
		q.addPlaced(it, 1)
		first[i] = slot{it, it.queueState().stays}
	}
	q.first = append(first, q.first...)
	q.n += len(items)
}

// addPlaced counts the items in turns of an item's connection and returns the new backlog
// of that connection.
func (q *fairQueue) addPlaced(it writable, by int) connBacklog {
	if q.conns == nil {
		q.conns = make(map[*Conn]connBacklog)
	}
	b := q.conns[it.conn()]
	b.placed += by
	q.conns[it.conn()] = b
	return b
}

// pop removes the next item. With newest it alternates between the newest items and the
// others. The queue is not empty.
func (q *fairQueue) pop(newest bool) writable {
	for {
		it, turns := q.take(newest)
		if it != nil {
			q.removed(it, turns)
			return it
		}
	}
}

// take is pop, but returns nil for a slot that its item has left. It also returns the
// turns that the next item of the same connection joins. Those are the fresh ones only
// after the newest item. Otherwise the backlog of the oldest connections would pass for
// new.
func (q *fairQueue) take(newest bool) (writable, *[]*turn) {
	if len(q.first) > 0 {
		s := q.first[0]
		q.first[0] = slot{}
		if q.first = q.first[1:]; s.stale() {
			return nil, nil
		}
		return s.item, &q.turns
	}
	t, fresh := q.next(newest)
	it := t.pop(fresh || newest && t.odd)
	t.odd = !t.odd
	if len(t.items) > 0 {
		q.turns = append(q.turns, t)
	} else {
		delete(q.of, t.key)
	}
	if fresh {
		return it, &q.fresh
	}
	return it, &q.turns
}

// next removes the turn that is served now, and reports whether it is served as the
// newest.
func (q *fairQueue) next(newest bool) (*turn, bool) {
	q.served++
	last := len(q.fresh) - 1
	if newest && q.served%3 == 0 && last >= 0 {
		t := q.fresh[last]
		q.fresh[last] = nil
		q.fresh = q.fresh[:last]
		return t, true
	}
	from := &q.fresh
	if last < 0 || q.served%3 == 1 && len(q.turns) > 0 {
		from = &q.turns
	}
	t := (*from)[0]
	(*from)[0] = nil
	*from = (*from)[1:]
	return t, false
}

// pop removes the oldest item, or the newest. It returns nil if all items have left.
func (t *turn) pop(newest bool) writable {
	for len(t.items) > 0 {
		last := len(t.items) - 1
		var s slot
		if newest {
			s, t.items[last] = t.items[last], slot{}
			t.items = t.items[:last]
		} else {
			s, t.items[0] = t.items[0], slot{}
			t.items = t.items[1:]
		}
		if !s.stale() {
			return s.item
		}
	}
	return nil
}

// remove removes a queued item.
func (q *fairQueue) remove(it writable) {
	b := q.conns[it.conn()]
	if i := slices.Index(b.behind, it); i >= 0 {
		b.behind = slices.Delete(b.behind, i, i+1)
		q.conns[it.conn()] = b
		q.uncount()
		return
	}
	q.removed(it, &q.turns)
}

// removed notes that an item is in no turn any more. The next item of its connection
// follows, in a turn that joins turns.
func (q *fairQueue) removed(it writable, turns *[]*turn) {
	it.queueState().stays++
	switch b := q.addPlaced(it, -1); {
	case b.placed > 0:
	case len(b.behind) > 0:
		next := b.behind[0]
		b.behind[0] = nil
		b.behind = b.behind[1:]
		q.conns[it.conn()] = b
		q.put(next, turns)
	default:
		delete(q.conns, it.conn())
	}
	q.uncount()
}

// uncount counts an item that was removed. An empty queue keeps no memory.
func (q *fairQueue) uncount() {
	if q.n--; q.n == 0 {
		*q = fairQueue{}
	}
}

// appendTo appends all queued items, those of each connection in their order.
func (q *fairQueue) appendTo(items []writable) []writable {
	placed := q.first
	for _, t := range q.of {
		placed = append(placed, t.items...)
	}
	for _, s := range placed {
		if !s.stale() {
			s.item.queueState().stays++
			items = append(items, s.item)
		}
	}
	for _, b := range q.conns {
		items = append(items, b.behind...)
	}
	return items
}
