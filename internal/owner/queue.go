package owner

import "slices"

// queue holds the items that wait for a lane, in a line for each urgency. The
// zero queue is empty.
type queue struct {
	lines  [urgencies]line
	credit [urgencies]int // of each line in the current round of shares
	newest bool           // the next asked item is the newest one
	n      int
}

// push lets an item wait behind those of its connection and urgency.
func (q *queue) push(it item, u urgency) {
	q.lines[u].push(it)
	q.n++
}

// move gives an item that waits a higher urgency.
func (q *queue) move(it item, from, to urgency) {
	if q.lines[from].remove(it) {
		q.lines[to].push(it)
	}
}

// back puts items in front again, in their order.
func (q *queue) back(items []item) {
	var of [urgencies][]item
	for _, it := range items {
		u := it.mark().urgency
		of[u] = append(of[u], it)
	}
	for u := range of {
		q.lines[u].back(of[u])
	}
	q.n += len(items)
}

// pop takes the next item; all: also one that is not pressing. nil: there is
// none.
//
// Of the asked ones every second is the newest: behind a backlog that takes
// seconds, an operation that has just begun is answered at once, and the oldest
// still advance at half the speed. Their callers may have given up already.
func (q *queue) pop(all bool) item {
	u := q.pick(all)
	if u == urgencies {
		return nil
	}
	newest := false
	if u == asked {
		newest, q.newest = q.newest, !q.newest
	}
	it := q.lines[u].pop(newest)
	if q.n--; q.n == 0 {
		*q = queue{} // an idle lane keeps no memory
	}
	return it
}

// pick returns the line whose turn it is by the shares; urgencies: none.
func (q *queue) pick(all bool) urgency {
	best, total := urgencies, 0
	for u := range urgencies {
		if q.lines[u].n == 0 || !all && !u.pressing() {
			continue
		}
		q.credit[u] += shares[u]
		total += shares[u]
		if best == urgencies || q.credit[u] > q.credit[best] {
			best = u
		}
	}
	if best < urgencies {
		q.credit[best] -= total
	}
	return best
}

// clear empties the queue and returns what was in it.
func (q *queue) clear() []item {
	items := make([]item, 0, q.n)
	for u := range q.lines {
		for _, t := range q.lines[u].turns {
			items = append(items, t.items...)
		}
	}
	*q = queue{}
	return items
}

// line holds the items of one urgency. Each connection has its turn, one item
// at a time: a connection with a hundred entries to be rewritten does not hold
// up one with a single entry. The items of one connection keep their order.
type line struct {
	turns []*turn // of connections with items; the first is next
	of    map[*Conn]*turn
	n     int
}

// turn is what one connection has waiting. It is empty if all of that was given
// a higher urgency; then it is dropped when its time comes.
type turn struct {
	c      *Conn
	served int // items that were taken since it came into the line
	items  []item
}

// newcomer is how many items of the connection that came last are taken ahead
// of others: its registration, a few joins, a state.
const newcomer = 8

func (l *line) push(it item) {
	t := l.of[it.conn()]
	if t == nil {
		t = l.turn(it.conn())
		l.turns = append(l.turns, t)
	}
	t.items = append(t.items, it)
	l.n++
}

func (l *line) back(items []item) {
	var first []*turn
	var its map[*Conn][]item
	for _, it := range items {
		if its == nil {
			its = make(map[*Conn][]item)
		}
		if its[it.conn()] == nil && l.of[it.conn()] == nil {
			first = append(first, l.turn(it.conn()))
		}
		its[it.conn()] = append(its[it.conn()], it)
	}
	for c, list := range its {
		l.of[c].items = append(list, l.of[c].items...)
	}
	l.turns = append(first, l.turns...)
	l.n += len(items)
}

func (l *line) turn(c *Conn) *turn {
	if l.of == nil {
		l.of = make(map[*Conn]*turn)
	}
	t := &turn{c: c}
	l.of[c] = t
	return t
}

// pop takes the first item of the connection whose turn it is, whose next turn
// comes after all others. newest prefers the connection that came last, for its
// first items. The line is not empty.
func (l *line) pop(newest bool) item {
	t := l.next(newest)
	it := t.items[0]
	t.items[0] = nil
	t.served++
	if t.items = t.items[1:]; len(t.items) > 0 {
		l.turns = append(l.turns, t)
	} else {
		delete(l.of, t.c)
	}
	l.less()
	return it
}

// next takes the turn that is served now out of the line.
func (l *line) next(newest bool) *turn {
	for {
		last := len(l.turns) - 1
		t := l.turns[last]
		if empty := len(t.items) == 0; empty || newest && t.served < newcomer {
			l.turns[last] = nil
			l.turns = l.turns[:last]
		} else {
			t = l.turns[0]
			l.turns[0] = nil
			l.turns = l.turns[1:]
		}
		if len(t.items) > 0 {
			return t
		}
		delete(l.of, t.c)
	}
}

// remove takes an item out of the line; false: it is not in it.
func (l *line) remove(it item) bool {
	t := l.of[it.conn()]
	if t == nil {
		return false
	}
	i := slices.Index(t.items, it)
	if i < 0 {
		return false
	}
	t.items = slices.Delete(t.items, i, i+1)
	l.less()
	return true
}

// less counts an item that is out of the line. An empty line keeps no memory.
func (l *line) less() {
	if l.n--; l.n == 0 {
		*l = line{}
	}
}
