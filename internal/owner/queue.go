package owner

// queue holds the items that wait for a lane. Each connection has its turn,
// one item at a time: whoever has a hundred entries to be rewritten does not
// hold up who has one. The items of one connection keep their order. The zero
// queue is empty.
type queue struct {
	turns []*turn // of connections with items; the first is next
	of    map[*Conn]*turn
	n     int
}

// turn is what one connection has waiting, never nothing.
type turn struct {
	c     *Conn
	items []item
}

// push lets an item wait behind those of its connection.
func (q *queue) push(it item) {
	t := q.of[it.conn()]
	if t == nil {
		t = q.turn(it.conn())
		q.turns = append(q.turns, t)
	}
	t.items = append(t.items, it)
	q.n++
}

// back puts items in front again, in their order.
func (q *queue) back(items []item) {
	var first []*turn
	var its map[*Conn][]item
	for _, it := range items {
		if its == nil {
			its = make(map[*Conn][]item)
		}
		if its[it.conn()] == nil && q.of[it.conn()] == nil {
			first = append(first, q.turn(it.conn()))
		}
		its[it.conn()] = append(its[it.conn()], it)
	}
	for c, list := range its {
		q.of[c].items = append(list, q.of[c].items...)
	}
	q.turns = append(first, q.turns...)
	q.n += len(items)
}

func (q *queue) turn(c *Conn) *turn {
	if q.of == nil {
		q.of = make(map[*Conn]*turn)
	}
	t := &turn{c: c}
	q.of[c] = t
	return t
}

// pop takes the first item of the connection whose turn it is, whose next turn
// comes after everybody else's; nil: the queue is empty.
func (q *queue) pop() item {
	if q.n == 0 {
		return nil
	}
	t := q.turns[0]
	q.turns[0] = nil
	q.turns = q.turns[1:]
	it := t.items[0]
	t.items[0] = nil
	if t.items = t.items[1:]; len(t.items) > 0 {
		q.turns = append(q.turns, t)
	} else {
		delete(q.of, t.c)
	}
	if q.n--; q.n == 0 {
		*q = queue{} // an idle lane keeps no memory
	}
	return it
}

// clear empties the queue and returns what was in it.
func (q *queue) clear() []item {
	items := make([]item, 0, q.n)
	for _, t := range q.turns {
		items = append(items, t.items...)
	}
	*q = queue{}
	return items
}
