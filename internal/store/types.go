// Package store is the only part of mesh that talks to Redis. It knows how a
// room is laid out there, and does each change as one Lua script that also
// publishes the event, so that what Redis holds and what servers hear cannot
// differ. It decides nothing about time, ownership or who may see what.
package store

import (
	"errors"
	"time"
)

// Errors of the store. Any other error means that the outcome is unknown: the
// script may have run and its reply been lost.
var (
	// ErrFenced says that the incarnation has been declared dead: it must not
	// write any more.
	ErrFenced = errors.New("store: incarnation is fenced")
	// ErrLost says that Redis has lost a batch that it had acknowledged, or
	// does not know the incarnation (any more), though it has written before.
	ErrLost = errors.New("store: redis has lost what it had acknowledged")
	// ErrLate says that a later batch of the same lane has already run, so
	// this one was dropped whole.
	ErrLate = errors.New("store: batch is older than one that ran")
	// ErrClock says that Redis's clock is not where the caller's own clock
	// expected it: nobody may be judged now.
	ErrClock = errors.New("store: redis clock stepped")
	// ErrUnavailable says that Redis did not answer in time, or refused: see
	// refused.go for the reasons that are told apart.
	ErrUnavailable = errors.New("store: redis is unavailable")
	// ErrData says that Redis refused an op because of what a key holds, which
	// is nothing of this library's. It is an ErrUnavailable.
	ErrData = errors.New("store: a key holds something else")
)

// Keys names what the store keeps. Names of one room share a hash slot; names
// of different rooms never coincide.
type Keys interface {
	// Buckets is how many buckets rooms are spread over (1 without a cluster).
	Buckets() int
	// Clustered says that names carry their bucket as a hash tag.
	Clustered() bool
	// RoomBucket and ConnBucket say which bucket a room and a connection's
	// metadata belong to.
	RoomBucket(room string) int
	ConnBucket(conn string) int

	Members(room string) string     // hash: connection id -> record
	Conn(room, conn string) string  // string with PX: entry id
	State(room, conn string) string // string: copy of the state
	Seq(room string) string         // string: position, and how many entries each incarnation has
	RoomMeta(room string) string    // hash: v, d
	ConnMeta(conn string) string    // hash: o, v, d
	Owned(bucket int, incarnation string) string
	Fence(bucket int, incarnation string) string
	Rooms(bucket int) string // set: names of rooms with members
	Instances() string       // sorted set: incarnation -> deadline
	Dead() string            // sorted set: incarnation -> time of death
	Format() string          // string: layout version, and number of buckets
	OtherFormat() string     // the same on a cluster if this is none, and the reverse
	Canary() string          // string with PX: probe for expired events
	Foreign() []string       // keys that other software with the same prefix has, and this never

	EventsPrefix() string              // channel of a room's events is this + room
	Control(incarnation string) string // channel of one server
}

// Position is a place in a room's history. The zero Position is a room that
// Redis knows nothing of.
type Position struct {
	Epoch string
	Seq   uint64
	Tag   string // of the writer of the event numbered Seq
}

// None reports whether Redis knows nothing of the room.
func (p Position) None() bool { return p.Epoch == "" }

// Record is one entry as the room's hash holds it.
type Record struct {
	Conn         string
	Entry        string
	Incarnation  string
	Seq          uint64        // of the entry's last change
	JoinedAt     int64         // Redis time, unix ms
	TTL          time.Duration // 0: none
	MetaVersion  uint64
	Meta         []byte // JSON, nil: none
	StateVersion uint64
	State        []byte // JSON, nil: none
	StateSilent  bool
	StateUntil   int64 // Redis time, unix ms; 0: no expiry
}

// EventType says what happened in a room.
type EventType byte

// The types of events. Replaced is a join whose connection was already
// present under an older entry id: to subscribers nothing happened, unless
// the state differs.
const (
	Joined   EventType = 'J'
	Replaced EventType = 'R'
	Left     EventType = 'L'
	State    EventType = 'S'
	Meta     EventType = 'M'
)

// Cause says why an entry ended.
type Cause byte

// The causes of a leave.
const (
	CauseLeft   Cause = 'l' // asked to leave
	CauseClosed Cause = 'c' // the connection closed
	CauseSilent Cause = 's' // no frame for TTL
	CauseLost   Cause = 'd' // its server died
)

// Event is one change of a room, as published by the script that made it.
// The record fields hold what the change left behind (for Left: nothing but
// Conn, Entry, Incarnation, Seq).
type Event struct {
	Type  EventType
	Epoch string
	Tag   string // of this event
	Prev  string // of the event before it; "-" for the first of an epoch
	At    int64  // Redis time, unix ms
	Cause Cause
	Record
}

// Position is where the room stands after the event.
func (e *Event) Position() Position { return Position{Epoch: e.Epoch, Seq: e.Seq, Tag: e.Tag} }

// Snapshot is what Redis holds of a room.
type Snapshot struct {
	// Position is where the room stood when reading began. Records may be
	// newer (their Seq says so) where the room was read in pages.
	Position Position
	Records  []Record
	// Paged says that the records were not read in one atomic step: events
	// after Position must be merged in, per connection the higher Seq wins.
	Paged bool
	// Lost says that the room counts more members than it has: Redis lost
	// records, so a member that is missing has not left.
	Lost bool
}

// OpKind says what an Op does.
type OpKind byte

// The kinds of operations an owner commits.
const (
	OpJoin       OpKind = 'J' // write the entry, whether or not there is one of that connection
	OpUpdate     OpKind = 'U' // refresh, metadata, state: only if the entry is there
	OpLeave      OpKind = 'L' // end the entry, only if it is that one
	OpConnect    OpKind = 'K' // register a connection, with metadata
	OpDisconnect OpKind = 'D' // forget a connection's metadata
	OpRecount    OpKind = 'C' // restore a room's position, its count of this incarnation, and its place on the index
	OpTouch      OpKind = 'N' // nothing but the batch, which restores the fence
)

// Op is one change that the owner of an entry asks for. It may be executed
// twice: the second time changes and publishes nothing.
type Op struct {
	Kind  OpKind
	Room  string // not for OpConnect, OpDisconnect, OpTouch
	Conn  string
	Entry string

	TTL  time.Duration // of the rule; 0: none
	Left time.Duration // life of the per-connection key from now; 0 in OpUpdate: do not refresh

	MetaVersion uint64 // in OpUpdate 0: leave the metadata alone
	Meta        []byte

	StateVersion uint64 // in OpUpdate 0: leave the state alone
	State        []byte // nil: no state
	StateSilent  bool
	StateLeft    time.Duration // life of the state from now; 0: no expiry

	Cause Cause // OpLeave
	// Stated says that the entry of an OpLeave may have a state. If it has one and
	// this was not said, the leave takes a second call. Of an OpJoin it says that a
	// copy of an earlier entry's state may be there, which is deleted.
	Stated bool
	// Known says that Redis has acknowledged the entry of an OpLeave. If its
	// record is lost, the leave is published all the same.
	Known bool

	Entries int // OpRecount: how many this incarnation has in the room, exactly

	Fresh bool // OpConnect: the connection is new, not registered again
}

// OpStatus is the outcome of an Op.
type OpStatus byte

// The outcomes. Gone: there is no entry of that connection any more. Other:
// there is one, with another entry id; to an OpUpdate, one of another
// incarnation, and what the same incarnation left there is as good as Gone.
const (
	Done  OpStatus = '+'
	Gone  OpStatus = '0'
	Other OpStatus = 'x'
)

// OpResult answers one Op.
type OpResult struct {
	Status OpStatus
	Err    error // Redis refused this one (out of memory, wrong type); nothing was changed
	// Position of the room after the op, the zero Position where an update
	// changed nothing that anybody is told.
	Position Position
	Total    int    // members of the room (OpJoin only)
	Holder   string // incarnation that owns the other entry (Other to OpUpdate only)
	// Record of the connection's metadata where Redis holds a newer version
	// than the one offered (OpConnect only).
	MetaVersion uint64
	Meta        []byte
}

// ReapMode says on what ground an entry or state may be ended by somebody who
// does not own it.
type ReapMode byte

// The grounds.
const (
	ReapExpired ReapMode = 't' // its per-connection key is gone
	ReapState   ReapMode = 's' // the state's key is gone
	ReapDead    ReapMode = 'd' // its owner is fenced
	ReapCleared ReapMode = 'f' // the app cleared the room: no ground needed
)

// ReapItem names one entry (or its state) to end.
type ReapItem struct {
	Mode         ReapMode
	Room         string
	Conn         string
	Entry        string
	Incarnation  string
	StateVersion uint64 // ReapState
}

// ReapStatus is the outcome for one item.
type ReapStatus byte

// The outcomes of a reap: Ended it was, now; Alive: the ground does not hold;
// NotThere: it had ended before.
const (
	Ended    ReapStatus = '+'
	Alive    ReapStatus = 'a'
	NotThere ReapStatus = '0'
)

// Judgment is what lets a server end what it does not own: its own idea of
// where Redis's clock stands. The script refuses with ErrClock when Redis
// disagrees by more than Tolerance.
type Judgment struct {
	Now       int64 // expected Redis time, unix ms
	Tolerance time.Duration
}

// OwnedRef is one member of an incarnation's index: an entry, or (Room and
// Entry empty) a registered connection.
type OwnedRef struct {
	Conn  string
	Entry string
	Room  string
}

// Renewal answers Renew.
type Renewal struct {
	Present bool          // false: this incarnation is not on the list any more
	Now     int64         // Redis time, unix ms
	Next    string        // the other incarnation whose lease runs out first, "" if none
	NextIn  time.Duration // until it does; negative: it has
	Dead    []string      // declared dead and not cleaned up yet; nil unless asked for
	Owned   int64         // size of owned in bucket 0; -1 where it lives elsewhere
	Heard   int64         // how many listeners of the same node the beat went to
}

// MetaValue is a versioned JSON value: metadata of a connection or a room.
type MetaValue struct {
	Version uint64
	Data    []byte // nil: none
	Owner   string // incarnation (connections only)
}
