package local

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// place is what an entry has beyond its connection and room: the grace of its user's
// place, and the place that it takes. Most entries have none.
type place struct {
	grace    time.Duration // of the rule; 0: none, or the connection has no user
	replaces string        // connection whose place the join takes; "": none, or Redis has the join
	took     string        // connection whose place the last join has taken; "": none
	kept     string        // an earlier id of the entry under which Redis may keep its place; "": none
}

// withPlace returns the place of the entry, to change it. Conn.mu is held.
func (e *entry) withPlace() *place {
	if e.place == nil {
		e.place = new(place)
	}
	return e.place
}

// ruleGrace returns the grace of the entry by the rules. Conn.mu is held.
func (e *entry) ruleGrace() time.Duration {
	if e.c.userID() == "" || e.c.registry.cfg.Grace == nil {
		return 0
	}
	return e.c.registry.cfg.Grace(e.room)
}

func (e *entry) grace() time.Duration {
	if e.place == nil {
		return 0
	}
	return e.place.grace
}

func (e *entry) setGrace(d time.Duration) {
	if d != e.grace() {
		e.withPlace().grace = d
	}
}

func (e *entry) replaces() string {
	if e.place == nil {
		return ""
	}
	return e.place.replaces
}

func (e *entry) setReplaces(conn string) {
	if conn != e.replaces() {
		e.withPlace().replaces = conn
	}
}

func (e *entry) took() string {
	if e.place == nil {
		return ""
	}
	return e.place.took
}

func (e *entry) setTook(conn string) {
	if conn != e.took() {
		e.withPlace().took = conn
	}
}

func (e *entry) kept() string {
	if e.place == nil {
		return ""
	}
	return e.place.kept
}

func (e *entry) setKept(id string) {
	if id != e.kept() {
		e.withPlace().kept = id
	}
}

// giveUpPlace ends the place that Redis keeps for the entry, or is about to keep, because
// the entry has ended by silence. It returns false if there is none. Conn.mu is held.
func (e *entry) giveUpPlace(cause store.Cause) bool {
	switch {
	case e.leaving.id != "" && e.leaving.keep:
		e.leaving.keep, e.leaving.cause = false, cause
	case e.leaving.id == "" && e.kept() != "":
		e.leaving = leaving{id: e.kept(), cause: cause}
		e.setKept("")
	default:
		return false
	}
	return true
}

// leftPlace notes what the answer to a leave says about the place that Redis keeps for the
// entry. It reports whether that place has to be left next. Conn.mu is held.
func (e *entry) leftPlace(op store.Op, res store.OpResult) bool {
	switch {
	case res.KeptUntil > 0 && op.Keep && e.in():
		e.setKept(op.Entry)
	case res.Status != store.Other || e.kept() == op.Entry:
		e.setKept("")
	case e.kept() != "" && !op.Keep:
		// The leave was that of a join that was to take the place, and did not reach Redis.
		return e.giveUpPlace(op.Cause)
	}
	return false
}
