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
	JoinedAt int64           // unix ms
	State    json.RawMessage // nil: none
	// StateSilent says that the state was stored and not delivered.
	StateSilent bool

	metaSize uint32 // bytes of the metadata at the end of listed; 0: none
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
	m := &Member{
		Conn:        strings.Clone(r.Conn),
		JoinedAt:    r.JoinedAt,
		State:       validJSON(r.State),
		StateSilent: r.StateSilent,
		seq:         r.Seq,
		owner:       unique.Make(r.Incarnation),
	}
	m.encode(r.Meta)
	return m
}

// encode sets listed. It may only be called on a member that is not shared yet.
func (m *Member) encode(meta []byte) {
	const around = len(`,{"id":"","metadata":null}`)
	meta = validJSON(meta)
	dst := append(make([]byte, 0, around+len(m.Conn)+len(meta)), ',')
	m.listed, m.metaSize = wire.AppendMember(dst, m.Conn, meta), uint32(len(meta))
}

// Meta returns the member's metadata, or nil if it has none. The bytes are shared;
// callers must not change them.
func (m *Member) Meta() json.RawMessage {
	if m.metaSize == 0 {
		return nil
	}
	end := len(m.listed) - len(`}`)
	return m.listed[end-int(m.metaSize) : end : end]
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
