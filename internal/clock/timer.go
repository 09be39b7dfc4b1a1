package clock

// Timer is one timer of a Wheel. The zero value is ready for use and meant to be
// embedded: arming it allocates nothing. It must not be copied while it is armed. From
// its first use on it belongs to one wheel.
type Timer struct {
	// The wheel's mu guards all fields.
	next, prev *Timer
	in         *list // nil: not armed
	due        int64 // tick
	fire       func()
}

// list is a doubly linked list of timers in the order of arming.
type list struct{ head, tail *Timer }

// push appends t, which is in no list.
func (l *list) push(t *Timer) {
	t.in, t.prev, t.next = l, l.tail, nil
	if l.tail == nil {
		l.head = t
	} else {
		l.tail.next = t
	}
	l.tail = t
}

// unlink removes t from its list.
func (t *Timer) unlink() {
	if t.prev == nil {
		t.in.head = t.next
	} else {
		t.prev.next = t.next
	}
	if t.next == nil {
		t.in.tail = t.prev
	} else {
		t.next.prev = t.prev
	}
	t.in, t.prev, t.next = nil, nil, nil
}
