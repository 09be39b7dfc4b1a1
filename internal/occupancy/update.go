package occupancy

import (
	"sync"
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/wire"
)

// Update is the numbers of a room at one position. It is shared by all watchers and must
// not be changed or copied.
type Update struct {
	Room        string
	Connections int
	Users       int
	Epoch       string // empty: the room has never had an event
	Seq         uint64 // never decreases within an epoch
	Stale       bool   // the numbers may lack changes

	number uint64 // rises with each update of all rooms

	once  sync.Once // makes frame
	frame atomic.Pointer[wire.Frame]
}

// Frame returns the push with the update. The first call makes it with encode, and all
// watchers of the room get the same frame.
func (u *Update) Frame(encode func(*Update) *wire.Frame) *wire.Frame {
	if f := u.frame.Load(); f != nil {
		return f // without the garbage of once.Do
	}
	u.once.Do(func() { u.frame.Store(encode(u)) })
	return u.frame.Load()
}

// same reports whether a watcher that has one of the updates needs the other.
func (u *Update) same(v *Update) bool {
	return u.Connections == v.Connections && u.Users == v.Users && u.Stale == v.Stale
}

// After reports whether the update is later than another one of the same room. The
// positions cannot tell, because a room may get another epoch, and may become stale.
func (u *Update) After(v *Update) bool { return u.number > v.number }

// Watcher receives the numbers of rooms. Its dynamic type must be comparable (a pointer).
type Watcher interface {
	// Deliver is called for each push, in order per room, from any goroutine. It must not
	// block and must not call Rooms, because the room is locked. After Unwatch or
	// UnwatchAll has returned, it is not called again.
	Deliver(u *Update)
}
