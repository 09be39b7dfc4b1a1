// Package channels shares the channels of rooms between the parts of a server that need
// the events of rooms. Each part asks for its rooms as if it were alone, and gets the
// confirmations and events of those.
package channels

import "sync"

// Listener subscribes to the channels of rooms. Its methods must not block, and must not
// call a Mux before they return.
type Listener interface {
	Add(room string)
	Remove(room string)
}

// Handler is a part that needs the events of rooms. All calls for one Handler come one
// after the other, in the order in which things happened. They must not block.
type Handler interface {
	// HandleSubscribed is called when the subscription to the room's channel is
	// confirmed. again is false for the first call after each Add, and true for every
	// later one. If it is true, earlier events may have been missed.
	HandleSubscribed(room string, again bool)
	// HandleEvent is called for each event of a room, only after HandleSubscribed.
	HandleEvent(room, payload string)
	// HandleDisconnect is called when the listener's connection has ended. Events may be
	// missed until HandleSubscribed is called again.
	HandleDisconnect()
}

// Mux shares one Listener between its shares. A channel is subscribed to as long as at
// least one share wants it. The methods HandleSubscribed, HandleEvent and
// HandleDisconnect are for the listener, which calls them from one goroutine.
//
// A share may ask for a room whose channel is subscribed to already. It then gets the
// confirmation at once, from a goroutine of the Mux, because Add must not call a handler
// that holds its own locks.
type Mux struct {
	listener Listener
	run      func(func()) // runs a function on a goroutine
	shares   []*Share     // not changed after the first Add

	// order is held during the calls of handlers. So a confirmation for one share cannot
	// come after a disconnect that happened later.
	order sync.Mutex

	mu         sync.Mutex // guards the fields below, and keeps the calls of listener in order; no handler is called with it
	rooms      map[string]room
	connection uint64 // number of the listener's present connection, from 1
	late       []lateAdd
	confirming bool // a goroutine works on late
}

// room is the state of one channel. Each share has a bit, 1<<Share.index.
type room struct {
	confirmed uint64 // the last connection on which the subscription was confirmed; 0: none
	wanted    uint8  // by these shares
	told      uint8  // these have got a confirmation since their Add
}

// lateAdd is a room that a share has added when it was already subscribed to.
type lateAdd struct {
	share *Share
	room  string
}

// New returns a Mux without shares. run must run its argument on another goroutine. The
// caller waits for these goroutines, which end by themselves.
func New(l Listener, run func(func())) *Mux {
	return &Mux{listener: l, run: run, rooms: make(map[string]room), connection: 1}
}

// Share is the access of one part to the channels. It is a Listener for that part.
type Share struct {
	mux     *Mux
	handler Handler
	bit     uint8
}

// NewShare returns a share, of which there may be eight. Shares are made, and Connect is
// called for each of them, before the first Add and before the listener starts.
func (m *Mux) NewShare() *Share {
	s := &Share{mux: m, bit: 1 << len(m.shares)}
	if s.bit == 0 {
		panic("channels: too many shares")
	}
	m.shares = append(m.shares, s)
	return s
}

// Connect sets the handler of the share.
func (s *Share) Connect(h Handler) { s.handler = h }

// Add asks for the events of a room. It returns at once. It does nothing if the share has
// the room already.
func (s *Share) Add(name string) {
	m := s.mux
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.rooms[name]
	if r.wanted&s.bit != 0 {
		return
	}
	first := r.wanted == 0
	r.wanted |= s.bit
	m.rooms[name] = r
	switch {
	case first:
		m.listener.Add(name)
	case r.confirmed == m.connection:
		m.late = append(m.late, lateAdd{share: s, room: name})
		if !m.confirming {
			m.confirming = true
			m.run(m.confirmLate)
		}
	}
}

// Remove gives a room back. It returns at once. Calls of the handler that are under way
// may still be about the room.
func (s *Share) Remove(name string) {
	m := s.mux
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.rooms[name]
	if r.wanted&s.bit == 0 {
		return
	}
	r.wanted &^= s.bit
	r.told &^= s.bit
	if r.wanted == 0 {
		delete(m.rooms, name)
		m.listener.Remove(name)
		return
	}
	m.rooms[name] = r
}

// confirmLate gives the shares the confirmations in late, until none is left.
func (m *Mux) confirmLate() {
	for {
		m.order.Lock()
		a, told, more := m.nextLate()
		if told {
			a.share.handler.HandleSubscribed(a.room, false)
		}
		m.order.Unlock()
		if !more {
			return
		}
	}
}

// nextLate takes the first of late and reports whether its share must get the
// confirmation. It must not if the share has got one since, or has given the room back.
// After a disconnect it gets the next confirmation like all others. more is false if
// there was none.
func (m *Mux) nextLate() (a lateAdd, told, more bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.late) == 0 {
		m.late, m.confirming = nil, false
		return lateAdd{}, false, false
	}
	a, m.late = m.late[0], m.late[1:]
	r := m.rooms[a.room]
	if r.wanted&^r.told&a.share.bit == 0 || r.confirmed != m.connection {
		return a, false, true
	}
	r.told |= a.share.bit
	m.rooms[a.room] = r
	return a, true, true
}

// HandleSubscribed is called when the subscription to a room's channel is confirmed.
func (m *Mux) HandleSubscribed(name string, again bool) {
	m.order.Lock()
	defer m.order.Unlock()
	m.mu.Lock()
	r, ok := m.rooms[name]
	told := r.told
	if ok {
		r.told, r.confirmed = r.wanted, m.connection
		m.rooms[name] = r
	}
	m.mu.Unlock()
	for _, s := range m.shares {
		if r.wanted&s.bit != 0 {
			s.handler.HandleSubscribed(name, again && told&s.bit != 0)
		}
	}
}

// HandleEvent is called for each message of a room's channel. It allocates nothing. The
// first share also gets the messages of rooms that no share has, and counts them.
func (m *Mux) HandleEvent(name, payload string) {
	m.order.Lock()
	defer m.order.Unlock()
	m.mu.Lock()
	room, wanted := m.rooms[name]
	told := room.told
	m.mu.Unlock()
	for i, s := range m.shares {
		if told&s.bit != 0 || !wanted && i == 0 {
			s.handler.HandleEvent(name, payload)
		}
	}
}

// HandleDisconnect is called when the listener's connection has ended.
func (m *Mux) HandleDisconnect() {
	m.order.Lock()
	defer m.order.Unlock()
	m.mu.Lock()
	m.connection++
	m.mu.Unlock()
	for _, s := range m.shares {
		s.handler.HandleDisconnect()
	}
}
