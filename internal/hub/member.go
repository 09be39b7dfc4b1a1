package hub

import (
	"bytes"
	"encoding/json"
	"strings"
	"unique"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Member is one connection that is present in a room. It does not change:
// what happens to a member makes another one.
type Member struct {
	Conn     string
	JoinedAt int64           // unix ms
	State    json.RawMessage // nil: none
	// StateSilent says that the state was stored and told nobody.
	StateSilent bool

	metaSize uint32 // of the metadata at the end of listed; 0: none
	// listed is the member as a view lists it, after a comma. It is encoded once,
	// so that a view is put together by copying, and holds the metadata, so that a
	// room of many members does not keep them twice.
	listed []byte
	seq    uint64                // of its last change
	owner  unique.Handle[string] // incarnation that wrote it
}

// newMember makes a member of a record. It copies the strings, which share
// memory with the whole message.
func newMember(r *store.Record) *Member {
	m := &Member{
		Conn:        strings.Clone(r.Conn),
		JoinedAt:    r.JoinedAt,
		State:       raw(r.State),
		StateSilent: r.StateSilent,
		seq:         r.Seq,
		owner:       unique.Make(r.Incarnation),
	}
	m.describe(r.Meta)
	return m
}

// describe sets what views list of a member that nobody else knows yet.
func (m *Member) describe(meta []byte) {
	const around = len(`,{"id":"","metadata":null}`)
	meta = raw(meta)
	dst := append(make([]byte, 0, around+len(m.Conn)+len(meta)), ',')
	m.listed, m.metaSize = wire.AppendMember(dst, m.Conn, meta), uint32(len(meta))
}

// Meta returns the member's metadata; nil: none. They are shared: callers must
// not change them.
func (m *Member) Meta() json.RawMessage {
	if m.metaSize == 0 {
		return nil
	}
	end := len(m.listed) - len(`}`)
	return m.listed[end-int(m.metaSize) : end : end]
}

// raw returns b; nil where it is empty, or no JSON because somebody wrote to
// Redis by hand. It is asked once, for the many times that b is sent.
func raw(b []byte) json.RawMessage {
	if !wire.Valid(b) {
		return nil
	}
	return b
}

// stateNews reports whether who knows the old member has to be told the
// state of the new one. A silent state is told nobody; the state that
// replaces a silent one always, for not everybody knew that one.
func stateNews(old, now *Member) bool {
	switch {
	case now.State == nil:
		return old.State != nil
	case now.StateSilent:
		return false
	}
	return old.StateSilent || !bytes.Equal(old.State, now.State)
}
