package owner

import "slices"

// line holds the items of one urgency. It is fair to rooms and to connections:
//
//   - Each room has its turn, one item at a time. A crowd that joins one room
//     does not delay a join of another.
//   - Each connection has one item in the turns of rooms, and the others wait
//     behind it in their order. A connection whose metadata is in a hundred
//     rooms does not delay another connection.
//   - In a line that is served newest first, too, half of the turns go to rooms
//     that have just come, and half of a room's to its newest item. Behind a
//     backlog that takes seconds, an operation that has just begun is answered at
//     once. The oldest advance at half the speed; their callers may have given up
//     already.
//
// The zero line is empty.
type line struct {
	fresh  []*turn // those that have not been served since they came; the oldest first
	turns  []*turn // the others; the first is next
	of     map[place]*turn
	conns  map[*Conn]conveyor
	newest bool   // the last turn was the newest fresh one
	clock  uint64 // of turn.at
	n      int
}

// place is what shares a turn: the items of a room, or what a connection has to
// write about itself.
type place struct {
	room string
	conn *Conn
}

// turn is what waits for one place.
type turn struct {
	place  place
	items  []slot
	oldest bool   // the last item was the oldest one
	at     uint64 // when it came, or was served; 0: it goes first
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
	l.put(it)
}

// put appends an item to its turn.
func (l *line) put(it item) {
	l.placed(it, 1)
	t, fresh := l.turn(it.place())
	if fresh {
		l.clock++
		t.at = l.clock
		l.fresh = append(l.fresh, t)
	}
	t.items = append(t.items, slot{it, it.mark().stay})
}

// back puts items in front again, in their order.
func (l *line) back(items []item) {
	var first, touched []*turn
	of := make(map[*turn][]slot)
	for _, it := range items {
		l.placed(it, 1)
		t, fresh := l.turn(it.place())
		if fresh {
			first = append(first, t)
		}
		if of[t] == nil {
			touched = append(touched, t)
		}
		of[t] = append(of[t], slot{it, it.mark().stay})
	}
	for _, t := range touched {
		t.items = append(of[t], t.items...)
	}
	l.turns = append(first, l.turns...)
	l.n += len(items)
}

func (l *line) turn(p place) (t *turn, fresh bool) {
	if t = l.of[p]; t != nil {
		return t, false
	}
	if l.of == nil {
		l.of = make(map[place]*turn)
	}
	t = &turn{place: p}
	l.of[p] = t
	return t, true
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
		t := l.next(newest)
		it := t.pop(newest)
		if len(t.items) > 0 {
			l.clock++
			t.at = l.clock
			l.turns = append(l.turns, t)
		} else {
			delete(l.of, t.place)
		}
		if it != nil {
			l.leave(it)
			return it
		}
	}
}

// next takes the turn that is served now out of the line.
func (l *line) next(newest bool) *turn {
	if l.newest = newest && !l.newest && len(l.fresh) > 0; l.newest {
		last := len(l.fresh) - 1
		t := l.fresh[last]
		l.fresh[last] = nil
		l.fresh = l.fresh[:last]
		return t
	}
	from := &l.turns
	if len(l.turns) == 0 || len(l.fresh) > 0 && l.fresh[0].at < l.turns[0].at {
		from = &l.fresh
	}
	t := (*from)[0]
	(*from)[0] = nil
	*from = (*from)[1:]
	return t
}

// pop takes the oldest item; newest: in turns with the newest. nil: all of them
// have left.
func (t *turn) pop(newest bool) item {
	t.oldest = !newest || !t.oldest
	for len(t.items) > 0 {
		last := len(t.items) - 1
		var s slot
		if t.oldest {
			s, t.items[0] = t.items[0], slot{}
			t.items = t.items[1:]
		} else {
			s, t.items[last] = t.items[last], slot{}
			t.items = t.items[:last]
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
	l.leave(it)
}

// leave notes that an item is in no turn any more, and has the next one of its
// connection follow.
func (l *line) leave(it item) {
	it.mark().stay++
	switch c := l.placed(it, -1); {
	case c.placed > 0:
	case len(c.behind) > 0:
		next := c.behind[0]
		c.behind[0] = nil
		c.behind = c.behind[1:]
		l.conns[it.conn()] = c
		l.put(next)
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
	for _, t := range l.of {
		for _, s := range t.items {
			if !s.stale() {
				it := s.item
				it.mark().stay++
				items = append(items, it)
			}
		}
	}
	for _, c := range l.conns {
		items = append(items, c.behind...)
	}
	return items
}
