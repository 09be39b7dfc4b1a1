package mesh

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Member is one connection in a room. It is not a user: a user may have several
// connections (tabs, devices).
type Member struct {
	// ID is the id of the connection.
	ID string `json:"id"`
	// UserID is the user of the connection, or empty for none.
	UserID string `json:"userId,omitempty"`
	// Metadata is the JSON value stored for the connection, or nil if there is none. It
	// is shared and must not be changed.
	Metadata json.RawMessage `json:"metadata"`
	// State is the JSON object that the connection has published for the room, or nil
	// if there is none. It is not set for guards.
	State json.RawMessage `json:"state,omitempty"`
	// EntryID is the id of the entry, which is new for each join. It is empty for
	// guards, and if the entry is not in Redis yet.
	EntryID string `json:"-"`
	// JoinedAt is the time of the join, by Redis's clock. It is zero if EntryID is empty.
	JoinedAt time.Time `json:"-"`
	// Disconnected reports whether the connection has ended and its place is kept.
	Disconnected bool `json:"disconnected,omitempty"`
}

// MetadataOf decodes a member's metadata into a T, as [json.Unmarshal] does. It returns
// the zero T if there is none. Errors wrap [ErrInvalidMetadata].
func MetadataOf[T any](m Member) (T, error) {
	var v T
	if len(m.Metadata) == 0 {
		return v, nil
	}
	if err := json.Unmarshal(m.Metadata, &v); err != nil {
		return v, fmt.Errorf("%w: %w", ErrInvalidMetadata, err)
	}
	return v, nil
}

// EventType is the kind of an Event.
type EventType string

// The types of events. EventSnapshot comes first and once in every subscription. The
// others are those of the wire protocol. More may be added: ignore unknown types.
const (
	EventSnapshot EventType = "snapshot"
	EventJoin     EventType = wire.UpdateJoin
	EventLeave    EventType = wire.UpdateLeave
	EventState    EventType = wire.UpdateState
	// EventMetadata is a change of a member's metadata.
	EventMetadata EventType = wire.UpdateMetadata
	// EventDisconnect is the end of a member's connection while its place is kept. A
	// state of the member ends with an EventState before it. Later the member either
	// reconnects or leaves.
	EventDisconnect EventType = wire.UpdateDisconnect
	// EventReconnect is the return of a disconnected member under the same connection
	// id. If it returns under another id, there is an EventJoin with Replaces, and then
	// the EventLeave of the disconnected member.
	EventReconnect EventType = wire.UpdateReconnect
)

// LeaveReason says why a member left or disconnected. More may be added: treat unknown
// reasons as ReasonClosed.
type LeaveReason string

// The reasons for a leave or a disconnect.
const (
	// ReasonLeft means that the connection asked to leave.
	ReasonLeft LeaveReason = wire.ReasonLeft
	// ReasonRemoved means that the app removed the connection from the room.
	ReasonRemoved LeaveReason = wire.ReasonRemoved
	// ReasonClosed means that the socket ended with a close frame, or that the server
	// shut down.
	ReasonClosed LeaveReason = wire.ReasonClosed
	// ReasonLost means that the socket broke, answered no pings, or was too slow.
	ReasonLost LeaveReason = wire.ReasonLost
	// ReasonSilent means that no frame came for the TTL.
	ReasonSilent LeaveReason = wire.ReasonSilent
	// ReasonServerLost means that the server of the connection died.
	ReasonServerLost LeaveReason = wire.ReasonServerLost
	// ReasonReplaced means that another connection of the same user took the place.
	ReasonReplaced LeaveReason = wire.ReasonReplaced
)

// Event is a snapshot or an update of a subscribed room. Its metadata and state are
// shared with other subscribers and must not be changed.
type Event struct {
	Type         EventType
	Room         string
	ConnectionID string // empty in a snapshot
	// Metadata is the connection's metadata in a join and a metadata event, and its last
	// metadata in a leave. nil means none.
	Metadata json.RawMessage
	State    json.RawMessage // in a state event; nil if the state has ended
	Time     time.Time       // by Redis's clock
	// UserID is the user of the connection, or empty for none.
	UserID string
	// UserConnections is the number of the user's connections in the room after the
	// event, a kept place included. It is 0 without a user.
	UserConnections int
	// Connections and Users are the room's numbers after the event. They run from one
	// event to the next, also in repairs. Each connection without a user counts as one
	// user. Users is 0 if users are not counted.
	Connections, Users int
	// Reason says why the member left or disconnected. It is set in these events only. In
	// a leave with Repair it is the reason for which the member was disconnected, or
	// else ReasonClosed.
	Reason LeaveReason
	// Replaces is the connection whose place a join took, or empty. The leave of that
	// connection follows.
	Replaces string
	// EntryID is the id of the entry. It pairs a join with its leave, unless the
	// connection's server had to write the entry again in between, after Redis lost it
	// or the server was declared dead. The new entry then has an id of its own.
	EntryID string
	// JoinedAt is the time of the join, by Redis's clock.
	JoinedAt time.Time
	// Seq never decreases within an Epoch. Missing numbers are changes that are not
	// delivered to subscribers.
	Seq   uint64
	Epoch string
	// Repair reports whether the event makes up for missed ones: it is part of the
	// difference between the delivered updates and the true state of the room.
	Repair bool
	// Snapshot is set in a snapshot only.
	Snapshot *Snapshot

	newUser bool // a metadata event that gave the connection its user
}

// UserArrived reports whether a user has come into the room: the event is the join of
// the user's first connection there. A metadata event that gives a connection its user
// counts as the join of that user.
func (e Event) UserArrived() bool {
	return e.UserID != "" && e.UserConnections == 1 && (e.Type == EventJoin || e.newUser)
}

// UserLeft reports whether a user has left the room: the event is the leave of the
// user's last connection there.
func (e Event) UserLeft() bool {
	return e.Type == EventLeave && e.UserID != "" && e.UserConnections == 0
}

// RoomOccupied reports whether the event is a join into an empty room.
func (e Event) RoomOccupied() bool { return e.Type == EventJoin && e.Connections == 1 }

// RoomVacated reports whether the event is a leave that empties the room.
func (e Event) RoomVacated() bool { return e.Type == EventLeave && e.Connections == 0 }

// Snapshot holds the members of a room at one moment, in no particular order.
type Snapshot struct {
	Room string
	// Members lists at most Options.Limits.SnapshotMembers in an answer to a client or
	// a subscription.
	Members []Member
	// Total is the number of members in the room.
	Total int
	// Users is the number of users in the room. Each connection without a user counts as
	// one. It is 0 if users are not counted.
	Users int
	// Stale reports whether Redis does not answer, so that this is the last known
	// state.
	Stale bool
	Seq   uint64
	Epoch string
}

// eventOf converts an update of the hub.
func eventOf(u *wire.Update) Event {
	connections, _ := u.Connections.Get()
	users, _ := u.Users.Get()
	return Event{
		Type: EventType(u.Type), Room: u.RoomName, ConnectionID: u.ConnectionID, Metadata: u.Metadata, State: u.State,
		Time: time.UnixMilli(u.Timestamp), UserID: u.UserID, UserConnections: u.UserConnections, Connections: connections, Users: users,
		Reason: LeaveReason(u.Reason), Replaces: u.Replaces, EntryID: u.EntryID, JoinedAt: timeOf(u.JoinedAt), Seq: u.Seq, Epoch: u.Epoch,
		Repair: u.Repair, newUser: u.NewUser,
	}
}

// timeOf converts a time in unix ms. 0 means that it is unknown.
func timeOf(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// millisOf is the inverse of timeOf.
func millisOf(at time.Time) int64 {
	if at.IsZero() {
		return 0
	}
	return at.UnixMilli()
}

// snapshotOf converts a mirror's view.
func snapshotOf(room string, v hub.View) *Snapshot {
	s := &Snapshot{Room: room, Total: v.Total, Stale: v.Stale, Seq: v.Seq, Epoch: v.Epoch}
	s.Users, _ = v.Users.Get()
	list := v.Members()
	s.Members = make([]Member, len(list))
	for i, m := range list {
		s.Members[i] = Member{
			ID: m.Conn, UserID: m.User, Metadata: m.Meta(), State: m.State, EntryID: m.Entry, JoinedAt: timeOf(m.JoinedAt),
			Disconnected: m.Disconnected(),
		}
	}
	return s
}

// membersOf converts records of Redis.
func membersOf(records []store.Record) []Member {
	members := make([]Member, len(records))
	for i, r := range records {
		members[i] = Member{
			ID: r.Conn, UserID: r.User, Metadata: r.Meta, State: r.State, EntryID: r.Entry, JoinedAt: timeOf(r.JoinedAt), Disconnected: r.Kept(),
		}
	}
	return members
}

// usersIn counts the users of members.
func usersIn(members []Member) (n int) {
	users := make(map[string]struct{})
	for _, m := range members {
		if m.UserID == "" {
			n++
		} else {
			users[m.UserID] = struct{}{}
		}
	}
	return n + len(users)
}

// extentOf returns the position of a listing, and the number of members if it does not
// list all of them.
func extentOf(l hub.Listing) wire.Extent {
	e := wire.Extent{Stale: l.Stale, Epoch: l.Epoch, Seq: l.Seq}
	if l.Bounded {
		e.Total = wire.CountOf(l.Total)
	}
	return e
}

// subscribeExtent is extentOf for the answer to a subscription.
func subscribeExtent(l hub.Listing) wire.Extent {
	e := extentOf(l)
	e.Total, e.Users = wire.CountOf(l.Total), l.Users
	return e
}

// joinExtent is extentOf for the answer to a join.
func joinExtent(l hub.Listing) wire.Extent {
	e := extentOf(l)
	e.Connections, e.Users = wire.CountOf(l.Total), l.Users
	return e
}
