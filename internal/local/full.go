package local

import (
	"fmt"

	"github.com/meshpresence/mesh/internal/store"
)

// FullError is the error of a join that found the room full. Nothing of the join is left.
type FullError struct {
	Of  store.Bound
	Max int // the cap of the room
}

func (e *FullError) Error() string { return fmt.Sprintf("local: the room is full: %d %s", e.Max, e.Of) }

// maxOf returns the cap of a join.
func maxOf(op store.Op, of store.Bound) int {
	if of == store.BoundUsers {
		return op.MaxUsers
	}
	return op.MaxConnections
}

// joinFull ends an entry that has found the room full. It reports whether the entry was
// promised to the client. Conn.mu is held.
func (e *entry) joinFull(op store.Op, res store.OpResult) bool {
	if op.Entry != e.id || e.phase != sent {
		return false // ended since
	}
	if e.overCap || op.Replaces != e.replaces() {
		e.move(byRefusal) // asked for again since, on other terms
		return false
	}
	e.c.registry.stats.full.Add(1)
	// An earlier attempt to write the entry may have succeeded for another user, and the
	// reply may have been lost.
	switch {
	case e.resent:
		e.leaving = leaving{id: e.id, cause: store.CauseLeft, hasState: true}
	case e.replaced.id != "":
		e.leaving = leaving{id: e.replaced.id, cause: store.CauseLeft, hasState: true}
	default:
		e.giveUpPlace(store.CauseLeft)
	}
	broken := e.promised
	e.setReplaces("")
	e.end(byFull)
	e.answer(e.rev, &FullError{Of: res.FullOf, Max: maxOf(op, res.FullOf)})
	return broken
}
