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
	// Metadata is the JSON value stored for the connection, or nil if there is none. It
	// is shared and must not be changed.
	Metadata json.RawMessage `json:"metadata"`
	// State is the JSON object that the connection has published for the room, or nil
	// if there is none. It is not set for guards.
	State json.RawMessage `json:"state,omitempty"`
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
// others are those of the wire protocol.
const (
	EventSnapshot EventType = "snapshot"
	EventJoin     EventType = wire.UpdateJoin
	EventLeave    EventType = wire.UpdateLeave
	EventState    EventType = wire.UpdateState
)

// Event is a snapshot or an update of a subscribed room. Its metadata and state are
// shared with other subscribers and must not be changed.
type Event struct {
	Type         EventType
	Room         string
	ConnectionID string          // empty in a snapshot
	Metadata     json.RawMessage // of the connection, in a join; nil if there is none
	State        json.RawMessage // in a state event; nil if the state has ended
	Time         time.Time       // by Redis's clock
	// Seq never decreases within an Epoch. Missing numbers are changes that are not
	// delivered to subscribers.
	Seq   uint64
	Epoch string
	// Repair reports whether the event makes up for missed ones: it is part of the
	// difference between the delivered updates and the true state of the room.
	Repair bool
	// Snapshot is set in a snapshot only.
	Snapshot *Snapshot
}

// Snapshot holds the members of a room at one moment, in no particular order.
type Snapshot struct {
	Room string
	// Members lists at most Options.Limits.SnapshotMembers in an answer to a client or
	// a subscription.
	Members []Member
	// Total is the number of members in the room.
	Total int
	// Stale reports whether Redis does not answer, so that this is the last known
	// state.
	Stale bool
	Seq   uint64
	Epoch string
}

// eventOf converts an update of the hub.
func eventOf(u *wire.Update) Event {
	return Event{
		Type: EventType(u.Type), Room: u.RoomName, ConnectionID: u.ConnectionID, Metadata: u.Metadata, State: u.State,
		Time: time.UnixMilli(u.Timestamp), Seq: u.Seq, Epoch: u.Epoch, Repair: u.Repair,
	}
}

// snapshotOf converts a mirror's view.
func snapshotOf(room string, v hub.View) *Snapshot {
	s := &Snapshot{Room: room, Total: v.Total, Stale: v.Stale, Seq: v.Seq, Epoch: v.Epoch}
	list := v.Members()
	s.Members = make([]Member, len(list))
	for i, m := range list {
		s.Members[i] = Member{ID: m.Conn, Metadata: m.Meta(), State: m.State}
	}
	return s
}

// membersOf converts records of Redis.
func membersOf(records []store.Record) []Member {
	members := make([]Member, len(records))
	for i, r := range records {
		members[i] = Member{ID: r.Conn, Metadata: r.Meta, State: r.State}
	}
	return members
}

func extentOf(l hub.Listing) wire.Extent {
	e := wire.Extent{Stale: l.Stale, Epoch: l.Epoch, Seq: l.Seq}
	if l.Bounded {
		e.Total = l.Total
	}
	return e
}
