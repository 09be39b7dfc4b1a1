package owner

import "slices"

// line holds the items of one urgency. It is fair to rooms and to connections:
//
//   - Each room has its turn, one item at a time. A crowd that joins one room
//     does not delay a join of another. Rooms that have had a turn and rooms that
//     have just come are served alternately: with thousands of either, the others
//     do not wait for all of them.
//   - Each connection has one item in the turns of rooms, and the others wait
//     behind it in their order. A connection whose metadata is in a hundred
//     rooms does not delay another connection.
//   - If pop is asked for the newest, too, every third turn is that of the room
//     that came last, and every second of a room's that of its newest item. Behind
//     a backlog that takes seconds, an operation that has just begun is answered
//     at once. The callers of the oldest may have given up already.
//
// The zero line is empty.
type line struct {
	first  []slot  // items that were put back; they go before all turns
	fresh  []*turn // those that have not been served since they came; the oldest first
	turns  []*turn // the others; the first is next
	of     map[place]*turn
	conns  map[*Conn]conveyor
	served int // turns
	n      int
}

// place identifies the items that share a turn: those of a room, or those that a
// connection writes about itself.
type place struct {
	room string
	conn *Conn
}

// turn holds the items that wait in one place.
type turn struct {
	place place
	items []slot
	odd   bool // it has been served an odd number of times
}

// slot holds an item for as long as that has the same stay: an item that was
// given a higher urgency leaves its slot behind.
type slot struct {
	item item
	stay uint32
}

func (s slot) stale() bool { return s.item.mark().stay != s.stay }

// conveyor is what one connection has in a line.
type conveyor struct {
	placed int    // items in turns
	behind []item // those that wait until there is none
}

// push lets an item wait behind those of its connection and of its place.
func (l *line) push(it item) {
	l.n++
	c := l.conns[it.conn()]
	if c.placed > 0 {
		c.behind = append(c.behind, it)
		l.conns[it.conn()] = c
		return
	}
	l.put(it, &l.fresh)
}

// put appends an item to its turn; one that there was none of before joins the
// given turns.
func (l *line) put(it item, turns *[]*turn) {
	l.placed(it, 1)
	t := l.of[it.place()]
	if t == nil {
		if l.of == nil {
			l.of = make(map[place]*turn)
		}
		t = &turn{place: it.place()}
		l.of[t.place] = t
		*turns = append(*turns, t)
	}
	t.items = append(t.items, slot{it, it.mark().stay})
}

// back puts items in front of all others, in their order.
func (l *line) back(items []item) {
	first := make([]slot, len(items), len(items)+len(l.first))
	for i, it := range items {
		l.placed(it, 1)
		first[i] = slot{it, it.mark().stay}
	}
	l.first = append(first, l.first...)
	l.n += len(items)
}

// placed counts the items in turns of an item's connection, and returns what
// the connection has then.
func (l *line) placed(it item, by int) conveyor {
	if l.conns == nil {
		l.conns = make(map[*Conn]conveyor)
	}
	c := l.conns[it.conn()]
	c.placed += by
	l.conns[it.conn()] = c
	return c
}

// pop takes the next item; newest: of those that have just come in turns with the
// others. The line is not empty.
func (l *line) pop(newest bool) item {
	for {
		it, turns := l.take(newest)
		if it != nil {
			l.leave(it, turns)
			return it
		}
	}
}

// take is pop for an item, or for a slot that its item has left: nil. It also
// returns the turns that the next item of its connection joins. Only after the
// newest it is among the fresh ones: otherwise what the oldest connections had
// waiting would pass for new.
func (l *line) take(newest bool) (item, *[]*turn) {
	if len(l.first) > 0 {
		s := l.first[0]
		l.first[0] = slot{}
		if l.first = l.first[1:]; s.stale() {
			return nil, nil
		}
		return s.item, &l.turns
	}
	t, fresh := l.next(newest)
	it := t.pop(fresh || newest && t.odd)
	t.odd = !t.odd
	if len(t.items) > 0 {
		l.turns = append(l.turns, t)
	} else {
		delete(l.of, t.place)
	}
	if fresh {
		return it, &l.fresh
	}
	return it, &l.turns
}

// next takes the turn that is served now out of the line, and reports whether
// it is served as the newest.
func (l *line) next(newest bool) (*turn, bool) {
	l.served++
	last := len(l.fresh) - 1
	if newest && l.served%3 == 0 && last >= 0 {
		t := l.fresh[last]
		l.fresh[last] = nil
		l.fresh = l.fresh[:last]
		return t, true
	}
	from := &l.fresh
	if last < 0 || l.served%3 == 1 && len(l.turns) > 0 {
		from = &l.turns
	}
	t := (*from)[0]
	(*from)[0] = nil
	*from = (*from)[1:]
	return t, false
}

// pop takes the oldest item, or the newest; nil: all of them have left.
func (t *turn) pop(newest bool) item {
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

// remove takes an item of the line out of it.
func (l *line) remove(it item) {
	c := l.conns[it.conn()]
	if i := slices.Index(c.behind, it); i >= 0 {
		c.behind = slices.Delete(c.behind, i, i+1)
		l.conns[it.conn()] = c
		l.less()
		return
	}
	l.leave(it, &l.turns)
}

// leave notes that an item is in no turn any more, and has the next one of its
// connection follow, in a turn that joins the given ones.
func (l *line) leave(it item, turns *[]*turn) {
	it.mark().stay++
	switch c := l.placed(it, -1); {
	case c.placed > 0:
	case len(c.behind) > 0:
		next := c.behind[0]
		c.behind[0] = nil
		c.behind = c.behind[1:]
		l.conns[it.conn()] = c
		l.put(next, turns)
	default:
		delete(l.conns, it.conn())
	}
	l.less()
}

// less counts an item that is out of the line. An empty line keeps no memory.
func (l *line) less() {
	if l.n--; l.n == 0 {
		*l = line{}
	}
}

// appendTo appends all items of the line, those of each connection in their
// order.
func (l *line) appendTo(items []item) []item {
	placed := l.first
	for _, t := range l.of {
		placed = append(placed, t.items...)
	}
	for _, s := range placed {
		if !s.stale() {
			s.item.mark().stay++
			items = append(items, s.item)
		}
	}
	for _, c := range l.conns {
		items = append(items, c.behind...)
	}
	return items
}
