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
	Users(room string) string       // hash: user id -> number of live connections, or the connection of a kept place
	Recount(room string) string     // set with PX: connections that an unfinished recount has counted
	RoomMeta(room string) string    // hash: v, d
	ConnMeta(conn string) string    // hash: o, v, d
	Owned(bucket int, incarnation string) string
	Fence(bucket int, incarnation string) string
	Rooms(bucket int) string        // set: names of rooms with members
	Kept(bucket int) string         // sorted set: kept place -> deadline
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

	User  string        // id of the user; "": none
	Grace time.Duration // of the rule: how long the place is kept after the connection has ended; 0: not at all

	// KeptUntil and KeptCause are set if the connection has ended and its place is
	// kept. The incarnation is then NoOwner.
	KeptUntil int64 // Redis time, unix ms
	KeptCause Cause // reason for the end of the connection
}

// NoOwner stands for the incarnation in the record of a kept place, which belongs to
// all servers. A position counts kept places under it, too.
const NoOwner = "~"

// Kept reports whether the record is a kept place.
func (r *Record) Kept() bool { return r.Incarnation == NoOwner }

// EventType is the kind of a change in a room.
type EventType byte

// The types of events. Replaced is a join of a connection that was present under an
// older entry id. Subscribers do not see it unless the state differs. Disconnected says
// that a connection has ended and its place is kept.
const (
	Joined       EventType = 'J'
	Replaced     EventType = 'R'
	Left         EventType = 'L'
	State        EventType = 'S'
	Meta         EventType = 'M'
	Disconnected EventType = 'D'
)

// Cause is the reason for the end of an entry or of its connection.
type Cause byte

// The causes of a leave.
const (
	CauseLeft       Cause = 'l' // the connection asked for it
	CauseRemoved    Cause = 'r' // the app removed it
	CauseClosed     Cause = 'c' // the connection closed
	CauseLost       Cause = 'b' // the connection broke
	CauseSilent     Cause = 's' // no frame for TTL
	CauseServerLost Cause = 'd' // its server was declared dead
	CauseReplaced   Cause = 'p' // another connection of its user took its place
)

// Event is one change of a room, as published by the script that made it. The record
// holds the entry after the change. For Left it has only Conn, Entry, Incarnation, User
// and Seq. For State and Disconnected it lacks the metadata.
type Event struct {
	Type  EventType
	Epoch string
	Tag   string // of this event
	Prev  string // of the event before it; "-" for the first of an epoch
	At    int64  // Redis time, unix ms
	Cause Cause  // of Left and Disconnected

	// Replaces is the connection whose place a Joined or a Meta took. Its Left is the
	// next event. If it is the connection itself, the connection is back at its own
	// place, and no Left follows.
	Replaces string
	// Rebuild means that Redis had lost the entry of a Joined, so it is no arrival.
	Rebuild bool

	// Counted means that the following numbers are known. That is so in a room with
	// users or kept places, unless they have to be recounted. They include kept places.
	Counted         bool
	UserConnections int // of the user in the room, after the event; 0 if the entry has no user
	Connections     int // of the room, after the event
	Users           int // of the room, after the event; a connection without a user counts as one
	Record
}

// Position returns the position of the room after the event.
func (e *Event) Position() Position { return Position{Epoch: e.Epoch, Seq: e.Seq, Tag: e.Tag} }

// Snapshot is the content of a room in Redis.
type Snapshot struct {
	// Position is the position of the room when reading began. In a paged snapshot,
	// records may be newer, as their Seq shows.
	Position Position
	Numbers  Numbers // at Position
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

	// User and Grace are those of the entry. In an OpUpdate they count only if Person is
	// set; the user then belongs to the metadata of MetaVersion and changes nothing if
	// Redis holds newer metadata. An OpUpdate from one user to another publishes one
	// event; an OpJoin with another entry publishes a leave and a join. In an OpLeave,
	// User only saves a round trip.
	User   string
	Grace  time.Duration // of the rule
	Person bool

	// Rebuild, in an OpJoin with a user, means that Redis had acknowledged an entry of
	// the connection before, and lost it or gave it to the clean-up. It is no arrival
	// and passes all bounds. If it begins the epoch of the room or follows soon after
	// that, the last connections of users are kept until Rebuild after the beginning:
	// other servers may not have rebuilt theirs yet.
	Rebuild time.Duration
	// Replaces, in an OpJoin with a user, is a connection of the same user whose place
	// the entry takes, in any condition. A kept place of the user is taken in any case.
	Replaces string
	// MaxConnections and MaxUsers bound the members and users of the room of an OpJoin.
	// 0: no bound.
	MaxConnections, MaxUsers int

	Cause Cause // OpLeave
	// Keep means, in an OpLeave, that the connection did not ask to leave. Its place is
	// kept for the grace of its record if its user has no other connection in the room.
	Keep bool
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
	Full  OpStatus = 'f' // OpJoin: the room has no place
)

// OpResult is the answer to one Op.
type OpResult struct {
	Status OpStatus
	Err    error // Redis refused this op (out of memory, wrong type); nothing was changed
	// Position is the position of the room after the op. It is zero if an update
	// changed nothing that is published.
	Position Position
	Total    int    // members of the room (OpJoin only)
	Users    int    // users of the room (OpJoin only); -1: unknown
	Owner    string // incarnation of the other entry (Other to OpUpdate only)
	// Replaced is the connection whose place an OpJoin took, which may be the connection
	// itself. ReplacedOwner is the incarnation that owned it, NoOwner for a kept place.
	Replaced, ReplacedOwner string
	// KeptUntil is the time until which an OpLeave has left the place (Redis time, unix
	// ms). 0: the entry has ended.
	KeptUntil int64
	// FullOf is the bound that the room has reached (Full only).
	FullOf Bound
	// MetaVersion and Meta are the connection's metadata if Redis holds a newer version
	// than the op (OpConnect only).
	MetaVersion uint64
	Meta        []byte
}

// Bound is a bound of a room.
type Bound string

// The bounds.
const (
	BoundConnections Bound = "connections"
	BoundUsers       Bound = "users"
)

// CleanUpGround is the condition on which a server may end an entry or a state that it
// does not own.
type CleanUpGround byte

// The grounds.
const (
	GroundExpired      CleanUpGround = 't' // its per-connection key is gone
	GroundStateExpired CleanUpGround = 's' // the state's key is gone
	GroundDead         CleanUpGround = 'd' // its owner is fenced
	// GroundGraceOver ends a kept place whose time is over. Otherwise it puts the place
	// into the index of kept places, in case the index has lost it. The caller must know
	// that a write of its own has succeeded since that time, so that a user whose server
	// could not write either has not lost the place.
	GroundGraceOver CleanUpGround = 'g'
	GroundRemoved   CleanUpGround = 'r' // the app removes a kept place
)

// CleanUpItem names one entry (or its state) to end.
type CleanUpItem struct {
	Mode         CleanUpGround
	Room         string
	Conn         string
	Entry        string
	Incarnation  string
	StateVersion uint64 // GroundStateExpired
	// Since is the time from which the grace of an entry counts if its place is kept
	// (Redis time, unix ms): the end of the lease of a dead owner, so that all servers
	// find the same deadline. 0: the time of the call.
	Since int64
	// KeptUntil is part of the answer: CleanUp sets it to the time until which the place
	// is kept (Redis time, unix ms) if the status is PlaceKept, or Alive for
	// GroundGraceOver because the time is not over.
	KeptUntil int64
}

// CleanUpStatus is the outcome of one item.
type CleanUpStatus byte

// The outcomes. Ended: this call ended it. Alive: the ground does not hold. NotThere:
// it had ended before. PlaceKept: its connection has ended and its place is kept.
const (
	Ended    CleanUpStatus = '+'
	Alive    CleanUpStatus = 'a'
	NotThere CleanUpStatus = '0'

	PlaceKept CleanUpStatus = 'k'
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
	DeadSince []int64       // when the lease of each of them ended (Redis time, unix ms)
	Owned     int64         // size of the index in bucket 0; -1: not read
	Receivers int64         // receivers of the echo on the same Redis node
}

// MetaValue is a versioned JSON value: the metadata of a connection or a room.
type MetaValue struct {
	Version uint64
	Data    []byte // nil: none
	Owner   string // incarnation (connections only)
}
