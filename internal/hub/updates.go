package hub

import (
	"bytes"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// deliver delivers an update to every sink.
func (m *mirror) deliver(u *wire.Update) {
	if len(m.sinks.list) == 0 || m.hub.ctx.Err() != nil {
		return
	}
	m.hub.counters.countUpdate(u, len(m.sinks.list))
	u.RoomName = m.room
	u.Epoch, u.Seq = m.past.shown()
	u.Numbers, u.UserConnections = m.numbers.shown(), m.numbers.of[u.UserID]
	for _, s := range m.sinks.list {
		s.Deliver(u)
	}
}

// about returns an update about a member.
func about(member *Member, kind string, at int64, repair bool) *wire.Update {
	return &wire.Update{
		Type: kind, ConnectionID: member.Conn, UserID: member.User, EntryID: member.Entry, JoinedAt: member.JoinedAt,
		Timestamp: at, Repair: repair,
	}
}

// deliverJoin delivers a join, which took the place of the connection replaces (if it is
// not empty), and the member's state unless it is silent. joined is the time of the join.
func (m *mirror) deliverJoin(member *Member, replaces string, joined, at int64, repair bool) {
	m.numbers.add(member.User)
	u := about(member, wire.UpdateJoin, joined, repair)
	u.Metadata = member.Meta()
	if replaces != member.Conn {
		u.Replaces = replaces
	}
	m.deliver(u)
	if member.State != nil && !member.StateSilent {
		m.deliverState(member, at, repair)
	}
	if member.Disconnected() {
		m.deliverDisconnect(member, at, repair)
	}
}

// deliverLeave delivers the leave of a member.
func (m *mirror) deliverLeave(member *Member, reason string, at int64, repair bool) {
	m.numbers.remove(member.User)
	u := about(member, wire.UpdateLeave, at, repair)
	u.Metadata, u.Reason = member.Meta(), reason
	m.deliver(u)
}

// deliverState delivers a member's state, or null if it has none.
func (m *mirror) deliverState(member *Member, at int64, repair bool) {
	u := about(member, wire.UpdateState, at, repair)
	u.State = member.State
	m.deliver(u)
}

// deliverDisconnect delivers the end of a member's connection.
func (m *mirror) deliverDisconnect(member *Member, at int64, repair bool) {
	u := about(member, wire.UpdateDisconnect, at, repair)
	u.Reason = reasonOf(member.keptCause)
	m.deliver(u)
}

// deliverMetadata delivers a member's metadata. newUser says that they brought its user.
func (m *mirror) deliverMetadata(member *Member, newUser bool, at int64, repair bool) {
	if newUser {
		m.numbers.remove("")
		m.numbers.add(member.User)
	}
	u := about(member, wire.UpdateMetadata, at, repair)
	u.Metadata, u.NewUser = member.Meta(), newUser
	m.deliver(u)
}

// deliverChanges delivers the changes from an old to the present version of a member. If
// it belongs to another user now, subscribers see a leave and a join.
func (m *mirror) deliverChanges(old, now *Member, at int64, repair bool) {
	if otherUser(old, now) {
		m.deliverLeave(old, old.endReason(), at, repair)
		m.deliverJoin(now, "", at, at, repair)
		return
	}
	if old.Disconnected() && !now.Disconnected() {
		m.deliver(about(now, wire.UpdateReconnect, at, repair))
	}
	if newUser := old.User != now.User; newUser || !bytes.Equal(old.Meta(), now.Meta()) {
		m.deliverMetadata(now, newUser, at, repair)
	}
	if stateDiffers(old, now) {
		m.deliverState(now, at, repair)
	}
	if !old.Disconnected() && now.Disconnected() {
		m.deliverDisconnect(now, at, repair)
	}
}

// otherUser reports whether a connection belongs to another user than before. A
// connection that had no user and gets one stays the same member.
func otherUser(old, now *Member) bool { return old.User != "" && old.User != now.User }

// reasonOf returns the reason that subscribers get for a cause.
func reasonOf(cause store.Cause) string {
	switch cause {
	case store.CauseLeft:
		return wire.ReasonLeft
	case store.CauseRemoved:
		return wire.ReasonRemoved
	case store.CauseLost:
		return wire.ReasonLost
	case store.CauseSilent:
		return wire.ReasonSilent
	case store.CauseServerLost:
		return wire.ReasonServerLost
	case store.CauseReplaced:
		return wire.ReasonReplaced
	}
	return wire.ReasonClosed
}
