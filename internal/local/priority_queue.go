package local

// priorityQueue holds the items that wait for a writer, in a fair queue for each
// priority. The zero value is empty.
type priorityQueue struct {
	lines  [priorities]fairQueue
	credit [priorities]int // of each queue in the current round of weights
	n      int
}

// push queues an item.
func (q *priorityQueue) push(it writable, p priority) {
	q.lines[p].push(it)
	q.n++
}

// move gives a queued item a higher priority.
func (q *priorityQueue) move(it writable, from, to priority) {
	q.lines[from].remove(it)
	q.lines[to].push(it)
}

// putBack puts items at the front, in their order.
func (q *priorityQueue) putBack(items []writable) {
	var of [priorities][]writable
	for _, it := range items {
		p := it.queueState().priority
		of[p] = append(of[p], it)
	}
	for u := range of {
		q.lines[u].putBack(of[u])
	}
	q.n += len(items)
}

// pop removes and returns the next item, or nil if there is none. Without all, it leaves
// out routine and background items.
func (q *priorityQueue) pop(all bool) writable {
	p := q.pick(all)
	if p == priorities {
		return nil
	}
	it := q.lines[p].pop(p.servesNewest())
	if q.n--; q.n == 0 {
		*q = priorityQueue{} // an idle writer keeps no memory
	}
	return it
}

// pick returns the priority that is next by the weights, or priorities if all queues are
// empty.
func (q *priorityQueue) pick(all bool) priority {
	best, total := priorities, 0
	for p := range priorities {
		if q.lines[p].n == 0 || !all && !p.unlimited() {
			continue
		}
		q.credit[p] += priorityWeights[p]
		total += priorityWeights[p]
		if best == priorities || q.credit[p] > q.credit[best] {
			best = p
		}
	}
	if best < priorities {
		q.credit[best] -= total
	}
	return best
}

// clear empties the queue and returns its items.
func (q *priorityQueue) clear() []writable {
	items := make([]writable, 0, q.n)
	for u := range q.lines {
		items = q.lines[u].appendTo(items)
	}
	*q = priorityQueue{}
	return items
}
