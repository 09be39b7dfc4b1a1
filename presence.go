package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Member is one connection in a room: not a user, who may have several
// connections (tabs, devices).
type Member struct {
	// ID is the connection's id.
	ID string `json:"id"`
	// Metadata is the JSON value stored for the connection; nil: none. It is
	// shared and must not be changed.
	Metadata json.RawMessage `json:"metadata"`
	// State is the JSON object that the connection has published for the room;
	// nil: none. Guards are not given it.
	State json.RawMessage `json:"state,omitempty"`
}

// MetadataOf decodes a member's metadata into a T, as [json.Unmarshal] does; the
// zero T where there are none. Errors wrap [ErrInvalidMetadata].
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

// EventType says what an Event tells.
type EventType string

// The types of events: EventSnapshot comes first and once in every
// subscription; the others are those of the wire protocol.
const (
	EventSnapshot EventType = "snapshot"
	EventJoin     EventType = wire.UpdateJoin
	EventLeave    EventType = wire.UpdateLeave
	EventState    EventType = wire.UpdateState
)

// Event is one thing that a subscriber of a room is told. What it points to is
// shared with other subscribers and must not be changed.
type Event struct {
	Type         EventType
	Room         string
	ConnectionID string          // empty in a snapshot
	Metadata     json.RawMessage // of the connection, in a join; nil: none
	State        json.RawMessage // in a state event; nil: the state has ended
	Time         time.Time       // by Redis's clock
	// Seq never decreases within an Epoch. Numbers missing are changes that
	// subscribers are not told of.
	Seq   uint64
	Epoch string
	// Repair says that the event makes good for missed ones: it is part of the
	// difference between what was told and what is true.
	Repair bool
	// Snapshot is set in a snapshot only.
	Snapshot *Snapshot
}

// Snapshot is who is in a room at one moment. Its members are in no particular
// order.
type Snapshot struct {
	Room string
	// Members are at most Options.Limits.SnapshotMembers where a client or a
	// subscription asked, and all of them where PresenceManager.Members did.
	Members []Member
	// Total is how many there are.
	Total int
	// Stale says that Redis does not answer: this is what was known last.
	Stale bool
	Seq   uint64
	Epoch string
}

// TrackPresence puts a rule in force: the rooms that pattern is about have
// presence. It may be called at any time, and takes hold at once. Entries of
// matching rooms that are in use get the rule's TTL and StateInterval, and guards
// are asked again about subscriptions to them. Other rooms are not affected.
//
// Every matching rule's guard must allow. The TTL and the StateInterval are those
// of the rule with the exact name, otherwise of the pattern that was given first.
// The same name, or the same expression, given again replaces what was given
// before. [Server.UntrackPresence] removes a rule.
//
// Adding a name costs the same however many rules there are. It takes some 100 bytes.
// Rooms whose names follow a scheme are better served by one Regexp, with a guard
// that looks at the name: there is nothing to add and remove as rooms come and go.
// Each Regexp, on the other hand, is tried on every room name that comes up, and
// adding one looks at all rooms in use. A few dozen are fine.
//
// A bad rule is an error that wraps [ErrInvalidPattern] or [ErrInvalidOptions]
// and changes nothing. Safe for concurrent use. Rules hold on this server alone:
// give all servers the same.
//
// The TypeScript server's trackPresence.
func (s *Server) TrackPresence(pattern Pattern, opts PresenceOptions) error {
	return s.n.trackPresence(pattern, opts)
}

// UntrackPresence takes a rule out of force that was given to
// [Server.TrackPresence] with the same name, or the same expression. It takes hold
// at once, in the rooms that the rule was about. False: there is no such rule, and
// nothing has changed.
//
// If another rule still matches a room, that rule decides about it from now on.
// Otherwise the room is not tracked any more:
//
//   - Its subscriptions end, those of clients with the push mesh/presence-ended,
//     those of the app with [ErrNotTracked].
//   - Its members stay in, without a TTL, and without events. A join that waits for
//     the rule's JoinGuard takes place once that has answered, whatever the answer,
//     or after Options.HookTimeout.
//   - Their states stay until they expire or the member leaves, and only the app can
//     read them. No state can be published.
//   - Any client may join it, gets its members in the answer, and may read the room's
//     metadata. To close a room, give it a Guard and a JoinGuard that refuse.
//
// Safe for concurrent use. Rules hold on this server alone.
func (s *Server) UntrackPresence(pattern Pattern) bool { return s.n.untrackPresence(pattern) }

// eventOf converts what the hub tells.
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

// membersOf converts records as Redis holds them.
func membersOf(records []store.Record) []Member {
	members := make([]Member, len(records))
	for i, r := range records {
		members[i] = Member{ID: r.Conn, Metadata: r.Meta, State: r.State}
	}
	return members
}

// readPresent lists who is in a room that has no mirror in order here, for
// somebody who may know: from Redis; where that does not answer, from what a
// mirror knew last. It is at most Limits.SnapshotMembers long.
func (n *node) readPresent(ctx context.Context, room string) (*Snapshot, error) {
	records, total, err := n.store.Some(ctx, room, n.opts.Limits.SnapshotMembers)
	if err != nil {
		if v, ok := n.hub.StaleView(room); ok {
			return snapshotOf(room, v), nil
		}
		return nil, n.errorFor(ctx, err)
	}
	return &Snapshot{Room: room, Members: membersOf(records), Total: total}, nil
}
