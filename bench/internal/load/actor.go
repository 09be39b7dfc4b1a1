package load

import (
	"bytes"
	"fmt"
	"sync"
	"time"
)

// The id of a request is its kind. An actor has at most one open request of each kind.
const (
	askJoin  = '1'
	askLeave = '2'
	askWatch = '3'
	askTurn  = '4' // unsubscribe from the watched room
	askState = '5'
)

// overdueAfter is the time after which a server with default options must have closed the
// socket of a silent client: a ping after 30 s, 60 s without an answer, and the delay of
// a busy machine.
const overdueAfter = 150 * time.Second

// actor is one client of a Soak. It is in one room and watches another, or none.
type actor struct {
	s *Soak

	mu      sync.Mutex // guards the fields below, and writing
	c       *Conn      // nil: not connected
	id      string
	room    string
	in      bool // as answered
	watch   string
	ledger  *Ledger // nil: not subscribed
	asked   int     // open requests
	silent  time.Time
	comings int
}

// live connects, and reconnects like the stock client, until the soak ends.
func (a *actor) live() {
	for pause := time.Duration(0); a.s.sleep(pause); pause = a.s.backoff() {
		if !a.s.turnToDial() {
			return
		}
		addr := a.s.pick()
		a.stay(addr)
		a.s.gone(addr)
	}
}

// stay is one connection, from beginning to end.
func (a *actor) stay(addr string) {
	c, err := Dial(addr, "/ws", 1<<10)
	if err != nil {
		a.s.counts.DialsFailed.Add(1)
		return
	}
	defer c.Close()
	line, err := c.await(`{"command":"mesh/assign-id"`)
	if err == nil {
		a.begin(c, string(value(line, `"payload":"`, '"')))
		defer a.end()
	}
	for err == nil {
		var frame []byte
		if frame, err = c.Next(); err == nil {
			a.take(frame)
		}
	}
	a.s.counts.Ended.Add(1)
}

// begin joins the room, and watches one.
func (a *actor) begin(c *Conn, id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.c, a.id, a.silent, a.asked = c, id, time.Time{}, 0
	a.comings++
	a.askLocked(askJoin, "mesh/join-room", a.room, "")
	if a.watch != "" {
		a.askLocked(askWatch, "mesh/subscribe-presence", a.watch, "")
	}
}

func (a *actor) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.c, a.in, a.ledger = nil, false, nil
}

func (a *actor) askLocked(what byte, command, room, more string) {
	a.asked++
	a.s.counts.Commands.Add(1)
	_ = a.c.Write(fmt.Appendf(nil, `{"id":%c,"command":%q,"payload":{"roomName":%q%s}}`, what, command, room, more)) // the reader notices an error
}

// take handles a frame of the server.
func (a *actor) take(frame []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case bytes.HasPrefix(frame, []byte(`{"command":"mesh/presence-update"`)):
		a.s.counts.Events.Add(1)
		if a.ledger == nil {
			a.s.violation(a, "an update of a room that it does not watch: %s", frame)
		} else if err := a.ledger.Apply(frame); err != nil {
			a.s.violation(a, "%v", err)
		}
	case bytes.HasPrefix(frame, []byte(`{"id":`)):
		a.answered(frame[6], frame)
	case !a.silent.IsZero():
	case bytes.HasPrefix(frame, []byte(`{"command":"ping"`)):
		_ = a.c.Write([]byte(`{"id":9,"command":"pong","payload":{}}`))
	case bytes.HasPrefix(frame, []byte(`{"command":"latency:request"`)):
		_ = a.c.Write([]byte(`{"id":9,"command":"latency:response","payload":{}}`))
	}
}

// answered handles an answer. a.mu is held. After a refusal the client reconnects.
func (a *actor) answered(what byte, frame []byte) {
	_, answer, _ := bytes.Cut(bytes.TrimSpace(frame), []byte(`"payload":`))
	answer = bytes.TrimSuffix(answer, []byte("}"))
	ok := bytes.Equal(answer, []byte("true")) || bytes.HasPrefix(answer, []byte(`{"success":true`))
	a.asked--
	if !ok {
		a.s.refused(frame)
		_ = a.c.Close()
		return
	}
	switch what {
	case askJoin:
		a.in = true
	case askTurn:
		// The answers of two rooms come in any order: this may be the new one's ledger.
		if a.ledger != nil && a.ledger.Room != a.watch {
			a.ledger = nil
		}
	case askWatch:
		l, err := NewLedger(a.watch, answer)
		if err != nil {
			a.s.violation(a, "%v", err)
			_ = a.c.Close()
			return
		}
		a.ledger = l
	}
}

// idleLocked reports whether the actor is free for another act.
func (a *actor) idleLocked() bool { return a.c != nil && a.asked == 0 && a.in && a.silent.IsZero() }

// act is one action of an actor.
type act func(a *actor)

func (a *actor) move() {
	a.askLocked(askLeave, "mesh/leave-room", a.room, "")
	a.room, a.in = a.s.room(), false
	a.askLocked(askJoin, "mesh/join-room", a.room, "")
}

func (a *actor) state() {
	more := `,"state":{"typing":true,"x":512,"y":384}`
	if a.comings%4 == 0 {
		more += `,"expireAfter":2000`
	}
	a.askLocked(askState, "mesh/publish-presence-state", a.room, more)
}

func (a *actor) turn() {
	if a.watch == "" {
		return
	}
	a.askLocked(askTurn, "mesh/unsubscribe-presence", a.watch, "")
	a.watch = a.s.room()
	a.askLocked(askWatch, "mesh/subscribe-presence", a.watch, "")
}

func (a *actor) drop() { _ = a.c.Close() }

func (a *actor) die() { a.silent = time.Now() }
