package owner

// queue holds the items that wait for a lane, in a line for each urgency. The
// zero queue is empty.
type queue struct {
	lines  [urgencies]line
	credit [urgencies]int // of each line in the current round of shares
	n      int
}

// push lets an item wait.
func (q *queue) push(it item, u urgency) {
	q.lines[u].push(it)
	q.n++
}

// move gives an item that waits a higher urgency.
func (q *queue) move(it item, from, to urgency) {
	q.lines[from].remove(it)
	q.lines[to].push(it)
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

// pop removes and returns the next item, nil if there is none. With all it may be
// one that is not pressing.
func (q *queue) pop(all bool) item {
	u := q.pick(all)
	if u == urgencies {
		return nil
	}
	it := q.lines[u].pop(u.newest())
	if q.n--; q.n == 0 {
		*q = queue{} // an idle lane keeps no memory
	}
	return it
}

// pick returns the line whose turn it is by the shares, or urgencies if all are empty.
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
		items = q.lines[u].appendTo(items)
	}
	*q = queue{}
	return items
}
