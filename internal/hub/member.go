package hub

import (
	"bytes"
	"encoding/json"
	"strings"
	"unique"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Member is one connection in a room. It is immutable: a change makes a new Member.
type Member struct {
	Conn     string
	Entry    string
	User     string          // empty: none
	JoinedAt int64           // unix ms
	State    json.RawMessage // nil: none
	// StateSilent says that the state was stored and not delivered.
	StateSilent bool

	keptCause store.Cause // why its connection ended; 0: it is connected
	restSize  uint8       // bytes after the metadata in listed
	metaSize  uint32      // bytes of the metadata in listed; 0: none
	// listed is the member as a view lists it, after a comma. It is encoded once, so
	// that a view is made by copying. It also holds the metadata, so that a large
	// room does not keep them twice.
	listed []byte
	seq    uint64                // of the last change
	owner  unique.Handle[string] // incarnation that wrote the entry
}

// newMember makes a member of a record. It copies the strings, which share memory
// with the whole message.
func newMember(r *store.Record) *Member {
	ids := r.Conn + r.Entry + r.User
	entry, user := len(r.Conn), len(r.Conn)+len(r.Entry)
	m := &Member{
		Conn:        ids[:entry],
		Entry:       ids[entry:user],
		User:        ids[user:],
		JoinedAt:    r.JoinedAt,
		State:       validJSON(r.State),
		StateSilent: r.StateSilent,
		seq:         r.Seq,
		owner:       unique.Make(r.Incarnation),
	}
	if r.Kept() {
		m.keptCause = r.KeptCause
	}
	m.encode(validJSON(r.Meta))
	return m
}

// encode sets listed. It may only be called on a member that is not shared yet.
func (m *Member) encode(meta json.RawMessage) {
	const around = len(`,{"id":"","metadata":null,"joinedAt":1700000000000}`)
	size := around + len(m.Conn) + len(meta)
	if m.User != "" {
		size += len(`"userId":"",`) + len(m.User)
	}
	if m.Disconnected() {
		size += len(`,"disconnected":true`)
	}
	listed, rest := wire.AppendMember(append(make([]byte, 0, size), ','), &wire.Member{
		ID: m.Conn, UserID: m.User, Metadata: meta, JoinedAt: m.JoinedAt, Disconnected: m.Disconnected(),
	})
	m.listed, m.metaSize, m.restSize = listed, uint32(len(meta)), uint8(rest)
}

// Meta returns the member's metadata, or nil if it has none. The bytes are shared;
// callers must not change them.
func (m *Member) Meta() json.RawMessage {
	if m.metaSize == 0 {
		return nil
	}
	end := len(m.listed) - int(m.restSize)
	return m.listed[end-int(m.metaSize) : end : end]
}

// Disconnected reports whether the connection has ended and its place is kept.
func (m *Member) Disconnected() bool { return m.keptCause != 0 }

// joinTime returns the time of the join, or at if it is unknown.
func (m *Member) joinTime(at int64) int64 {
	if m.JoinedAt > 0 {
		return m.JoinedAt
	}
	return at
}

// endReason returns the reason of a leave whose event is not known.
func (m *Member) endReason() string { return reasonOf(m.keptCause) }

// withState returns the member with the state of a record.
func (m *Member) withState(r *store.Record) *Member {
	next := *m
	next.State, next.StateSilent, next.seq = validJSON(r.State), r.StateSilent, r.Seq
	return &next
}

// withMeta returns the member with the metadata and the user of a record.
func (m *Member) withMeta(r *store.Record) *Member {
	next := *m
	if next.User != r.User {
		next.User = strings.Clone(r.User)
	}
	next.seq = r.Seq
	next.encode(validJSON(r.Meta))
	return &next
}

// keptAs returns the member whose connection has ended, with the cause and the owner of
// a record.
func (m *Member) keptAs(r *store.Record) *Member {
	next := *m
	next.State, next.StateSilent, next.seq = nil, false, r.Seq
	next.keptCause, next.owner = r.KeptCause, unique.Make(r.Incarnation)
	next.encode(m.Meta())
	return &next
}

// validJSON returns b, or nil if b is empty or no JSON. Redis may hold invalid JSON
// that was written by hand. One check here replaces a check at every delivery.
func validJSON(b []byte) json.RawMessage {
	if !wire.Valid(b) {
		return nil
	}
	return b
}

// stateDiffers reports whether a subscriber that knows the old member must get the
// state of the new one. A silent state is never delivered. A state that replaces a
// silent one always is, because subscribers know different states.
func stateDiffers(old, now *Member) bool {
	switch {
	case now.State == nil:
		return old.State != nil
	case now.StateSilent:
		return false
	}
	return old.StateSilent || !bytes.Equal(old.State, now.State)
}
