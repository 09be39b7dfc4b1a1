package hub

import (
	"bytes"
	"encoding/json"
	"strings"
	"unique"

	"github.com/meshpresence/mesh/internal/store"
)

// Member is one connection that is present in a room. It does not change:
// what happens to a member makes another one.
type Member struct {
	Conn     string
	JoinedAt int64           // unix ms
	Meta     json.RawMessage // nil: none
	State    json.RawMessage // nil: none
	// StateSilent says that the state was stored and told nobody.
	StateSilent bool

	seq   uint64                // of its last change
	owner unique.Handle[string] // incarnation that wrote it
}

// newMember makes a member of a record. It copies the strings, which share
// memory with the whole message.
func newMember(r *store.Record) *Member {
	return &Member{
		Conn:        strings.Clone(r.Conn),
		JoinedAt:    r.JoinedAt,
		Meta:        raw(r.Meta),
		State:       raw(r.State),
		StateSilent: r.StateSilent,
		seq:         r.Seq,
		owner:       unique.Make(r.Incarnation),
	}
}

// raw returns b, nil if it is empty.
func raw(b []byte) json.RawMessage {
	if len(b) == 0 {
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

// roster is the members of a room, in an order that stays while they do.
type roster struct {
	list  []*Member
	at    map[string]int // connection id -> index in list
	image *image         // of list, nil: not made since the last change
}

func (r *roster) len() int { return len(r.list) }

// get returns the member of that connection, nil if it is not present.
func (r *roster) get(conn string) *Member {
	if i, ok := r.at[conn]; ok {
		return r.list[i]
	}
	return nil
}

// put adds m, or puts it in place of its former self.
func (r *roster) put(m *Member) {
	r.image = nil
	if i, ok := r.at[m.Conn]; ok {
		r.list[i] = m
		return
	}
	if r.at == nil {
		r.at = make(map[string]int)
	}
	r.at[m.Conn] = len(r.list)
	r.list = append(r.list, m)
}

// remove takes off the member of that connection and returns it.
func (r *roster) remove(conn string) *Member {
	i, ok := r.at[conn]
	if !ok {
		return nil
	}
	r.image = nil
	gone, last := r.list[i], len(r.list)-1
	r.list[i] = r.list[last]
	r.at[r.list[i].Conn] = i
	r.list[last] = nil
	r.list = r.list[:last]
	delete(r.at, conn)
	return gone
}

// change does to the roster what the event says, and returns the member
// before and after it (nil: absent). A state or metadata of someone who is
// absent changes nothing.
func (r *roster) change(ev *store.Event) (old, now *Member) {
	old = r.get(ev.Conn)
	switch ev.Type {
	case store.Joined, store.Replaced:
		now = newMember(&ev.Record)
	case store.Left:
		r.remove(ev.Conn)
		return old, nil
	case store.State, store.Meta:
		if old == nil {
			return nil, nil
		}
		next := *old
		if ev.Type == store.State {
			next.State, next.StateSilent = raw(ev.State), ev.StateSilent
		} else {
			next.Meta = raw(ev.Record.Meta)
		}
		next.seq = ev.Seq
		now = &next
	default:
		return old, old
	}
	r.put(now)
	return old, now
}
