// Package store is the only part of mesh that talks to Redis. It knows the layout of
// rooms in Redis. Each change is one Lua script that also publishes the event, so that
// the data in Redis and the events that servers receive cannot differ. The package
// decides nothing about time, ownership or access.
package store

import (
	"errors"
	"time"
)

// Errors of the store. Any other error means that the outcome is unknown: the script
// may have run, and its reply may have been lost.
var (
	// ErrFenced means that the incarnation was declared dead, and may not write any
	// more.
	ErrFenced = errors.New("store: incarnation is fenced")
	// ErrForgotten means that Redis has lost a batch that it had acknowledged, or that
	// it does not know the incarnation although that has written before.
	ErrForgotten = errors.New("store: redis has lost what it had acknowledged")
	// ErrLate means that a later batch of the same incarnation and bucket has already
	// run. The late batch changed nothing.
	ErrLate = errors.New("store: batch is older than one that ran")
	// ErrClock means that the clock of Redis is not where the caller's own clock
	// expected it. No other server may be declared dead now.
	ErrClock = errors.New("store: redis clock stepped")
	// ErrUnavailable means that Redis did not answer in time or refused. refused.go
	// lists the known reasons.
	ErrUnavailable = errors.New("store: redis is unavailable")
	// ErrData means that Redis refused an op because a key holds a value that is not of
	// this library. It is an ErrUnavailable.
	ErrData = errors.New("store: a key holds something else")
)

// Keys returns the names of keys and channels. The keys of one room share a hash slot.
// Keys of different rooms never collide.
type Keys interface {
	// Buckets returns the number of buckets (1 without a cluster).
	Buckets() int
	// Clustered reports whether names contain their bucket as a hash tag.
	Clustered() bool
	// RoomBucket and ConnBucket return the bucket of a room and of a connection's
	// metadata.
	RoomBucket(room string) int
	ConnBucket(conn string) int

	Members(room string) string     // hash: connection id -> record
	Conn(room, conn string) string  // string with PX: entry id
	State(room, conn string) string // string: copy of the state
	Seq(room string) string         // string: position, and the number of entries of each incarnation
	RoomMeta(room string) string    // hash: v, d
	ConnMeta(conn string) string    // hash: o, v, d
	Owned(bucket int, incarnation string) string
	Fence(bucket int, incarnation string) string
	Rooms(bucket int) string        // set: names of rooms with members
	Instances() string              // sorted set: incarnation -> deadline
	Dead() string                   // sorted set: incarnation -> time of death
	Name(incarnation string) string // string with PX: a server's name for people, in the slot of Instances
	Format() string                 // string: layout version and number of buckets
	OtherFormat() string            // the format key of a cluster if this is none, and the reverse
	Canary() string                 // string with PX: probe for expired events
	OtherServerKeys() []string      // keys that other software uses under the same prefix, and this library never does

	EventsPrefix() string                    // channel of a room's events is this + room
	ServerChannel(incarnation string) string // channel of one server
}

// Position is a point in a room's history. The zero Position means that Redis has none.
type Position struct {
	Epoch string
	Seq   uint64
	Tag   string // of the event with number Seq
}

// None reports whether Redis has no position of the room.
func (p Position) None() bool { return p.Epoch == "" }

// Record is one entry as stored in the room's hash.
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

	User      string        // "": none
	Grace     time.Duration // of the rule; 0: none
	KeptUntil int64         // when a kept place ends, Redis time, unix ms; 0: connected
	KeptCause Cause         // why the connection of a kept place ended
}

// Kept reports whether the connection of the entry has ended and its place is kept.
// The incarnation is then "~", because no server owns the entry.
func (r *Record) Kept() bool { return r.KeptUntil != 0 }

// EventType is the kind of a change in a room.
type EventType byte

// The types of events. Replaced is a join of a connection that was present under an
// older entry id. Subscribers do not see it unless the state or metadata differ or the
// place was kept. Disconnected means that the connection has ended and its place is
// kept.
const (
	Joined       EventType = 'J'
	Replaced     EventType = 'R'
	Left         EventType = 'L'
	State        EventType = 'S'
	Meta         EventType = 'M'
	Disconnected EventType = 'D'
)

// Cause is the reason for the end of an entry.
type Cause byte

// The causes of a leave, and of a kept place.
const (
	CauseLeft       Cause = 'l' // the connection or the app asked for it
	CauseRemoved    Cause = 'r' // the app removed it
	CauseClosed     Cause = 'c' // the connection closed
	CauseLost       Cause = 'b' // the connection broke
	CauseSilent     Cause = 's' // no frame for TTL
	CauseServerLost Cause = 'd' // its server was declared dead
	CauseReplaced   Cause = 'p' // another connection of its user took its place
)

// Event is one change of a room, as published by the script that made it. The record
// holds the entry after the change. For Left it has only Conn, Entry, Incarnation and
// Seq.
type Event struct {
	Type  EventType
	Epoch string
	Tag   string // of this event
	Prev  string // of the event before it; "-" for the first of an epoch
	At    int64  // Redis time, unix ms
	Cause Cause
	// Replaces is the connection whose place a join took, or empty. If it is another
	// connection, the next event is its leave. Otherwise it is the connection itself,
	// whose place was kept.
	Replaces string
	Record
}

// Position returns the position of the room after the event.
func (e *Event) Position() Position { return Position{Epoch: e.Epoch, Seq: e.Seq, Tag: e.Tag} }

// Snapshot is the content of a room in Redis.
type Snapshot struct {
	// Position is the position of the room when reading began. In a paged snapshot,
	// records may be newer, as their Seq shows.
	Position Position
	Records  []Record
	// Paged means that the records were not read in one atomic step. Events after
	// Position must be merged in. For each connection the higher Seq wins.
	Paged bool
	// Incomplete means that the room counts more members than it has. Redis lost
	// records, so a missing member may not have left.
	Incomplete bool
}

// OpKind is the kind of an Op.
type OpKind byte

// The kinds of ops.
const (
	OpJoin       OpKind = 'J' // write the entry, even if the connection has one
	OpUpdate     OpKind = 'U' // refresh, metadata, state: only if the entry exists
	OpLeave      OpKind = 'L' // end the entry, only if it is this one
	OpConnect    OpKind = 'K' // register a connection with its metadata
	OpDisconnect OpKind = 'D' // delete a connection's metadata
	OpRecount    OpKind = 'C' // restore a room's position, its count of this incarnation, and its place in the index
	OpTouch      OpKind = 'N' // nothing but the batch itself, which restores the fence
)

// Op is one change by the owner of an entry. It may be executed twice: the second
// execution changes and publishes nothing.
type Op struct {
	Kind  OpKind
	Room  string // empty for OpConnect, OpDisconnect, OpTouch
	Conn  string
	Entry string

	TTL  time.Duration // of the rule; 0: none
	Left time.Duration // life of the per-connection key from now; 0 in OpUpdate: no refresh

	MetaVersion uint64 // 0 in OpUpdate: metadata unchanged
	Meta        []byte

	StateVersion uint64 // 0 in OpUpdate: state unchanged
	State        []byte // nil: no state
	StateSilent  bool
	StateLeft    time.Duration // life of the state from now; 0: no expiry

	Cause Cause // OpLeave
	// Stated means, in an OpLeave, that the entry may have a state. A leave of an entry
	// with a state takes a second call without it. In an OpJoin it means that there may
	// be a copy of the state of an earlier entry, which the op deletes.
	Stated bool
	// Known means that Redis has acknowledged the entry of an OpLeave. If its record is
	// lost, the leave is published nevertheless.
	Known bool

	Entries int // OpRecount: the exact number of entries of this incarnation in the room

	Fresh bool // OpConnect: the connection is new, not registered again
}

// OpStatus is the outcome of an Op.
type OpStatus byte

// The outcomes. Gone means that the connection has no entry. Other means that it has
// one with another entry id. For an OpUpdate, Other means one of another incarnation;
// one of the same incarnation counts as Gone.
const (
	Done  OpStatus = '+'
	Gone  OpStatus = '0'
	Other OpStatus = 'x'
)

// OpResult is the answer to one Op.
type OpResult struct {
	Status OpStatus
	Err    error // Redis refused this op (out of memory, wrong type); nothing was changed
	// Position is the position of the room after the op. It is zero if an update
	// changed nothing that is published.
	Position Position
	Total    int    // members of the room (OpJoin only)
	Owner    string // incarnation of the other entry (Other to OpUpdate only)
	// MetaVersion and Meta are the connection's metadata if Redis holds a newer version
	// than the op (OpConnect only).
	MetaVersion uint64
	Meta        []byte
}

// CleanUpGround is the condition on which a server may end an entry or a state that it
// does not own.
type CleanUpGround byte

// The grounds.
const (
	GroundExpired      CleanUpGround = 't' // its per-connection key is gone
	GroundStateExpired CleanUpGround = 's' // the state's key is gone
	GroundDead         CleanUpGround = 'd' // its owner is fenced
)

// CleanUpItem names one entry (or its state) to end.
type CleanUpItem struct {
	Mode         CleanUpGround
	Room         string
	Conn         string
	Entry        string
	Incarnation  string
	StateVersion uint64 // GroundStateExpired
}

// CleanUpStatus is the outcome of one item.
type CleanUpStatus byte

// The outcomes. Ended: this call ended it. Alive: the ground does not hold. NotThere:
// it had ended before.
const (
	Ended    CleanUpStatus = '+'
	Alive    CleanUpStatus = 'a'
	NotThere CleanUpStatus = '0'
)

// ClockProof allows a server to end what it does not own. It is the time that the
// server expects the clock of Redis to show. The script fails with ErrClock if the
// clock differs by more than Tolerance.
type ClockProof struct {
	Now       int64 // expected Redis time, unix ms
	Tolerance time.Duration
}

// EntryRef is one item of an incarnation's index: an entry, or a registered connection
// (if Room and Entry are empty).
type EntryRef struct {
	Conn  string
	Entry string
	Room  string
}

// Renewal is the result of Renew.
type Renewal struct {
	Listed    bool          // the incarnation is in the list of live servers
	Now       int64         // Redis time, unix ms
	Next      string        // the other incarnation whose lease runs out first, "" if none
	NextIn    time.Duration // time until then; negative: it has run out
	Dead      []string      // incarnations that are not cleaned up yet; nil unless asked for
	Owned     int64         // size of the index in bucket 0; -1: not read
	Receivers int64         // receivers of the echo on the same Redis node
}

// MetaValue is a versioned JSON value: the metadata of a connection or a room.
type MetaValue struct {
	Version uint64
	Data    []byte // nil: none
	Owner   string // incarnation (connections only)
}
