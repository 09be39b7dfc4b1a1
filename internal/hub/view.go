package hub

import (
	"sync"

	"github.com/meshpresence/mesh/internal/wire"
)

// Listing is the list of a room's members at one moment, in the form that clients
// get. It is immutable and safe for concurrent use. Copies are cheap.
type Listing struct {
	Epoch string // as in updates; empty: the room has never had an event
	Seq   uint64 // later updates have a higher one
	Total int    // members of the room
	// Users is the number of users, or missing if users are not counted.
	Users wire.Count
	Stale bool // the list may lack changes
	// Bounded says that the room has more members than the list.
	Bounded bool
	// Present is the listed members as a JSON array, see wire.AppendMember. It is shared;
	// callers must not change it.
	Present wire.Text
}

// View is a Listing together with the members and their states.
type View struct {
	Listing
	encoded *encodedView
}

// Members returns the members that the view lists. The list is shared; callers
// must not change it.
func (v View) Members() []*Member {
	if v.encoded == nil {
		return nil
	}
	return v.encoded.members
}

// IDs returns the ids of the listed members as JSON, ["id"]. The results of IDs and
// States are encoded once and shared by all views of the same members; callers must
// not change them.
func (v View) IDs() []byte {
	if v.encoded == nil {
		return []byte("[]")
	}
	return v.encoded.ids()
}

// States returns the states of the listed members as JSON, {"id": state}. Silent
// states are included.
func (v View) States() []byte {
	if v.encoded == nil {
		return []byte("{}")
	}
	return v.encoded.states()
}

// encodedView is the members that a view lists, at one moment. Their JSON is
// encoded on demand.
type encodedView struct {
	members []*Member
	limit   int // the most members that it would list; 0 or less: no limit

	mu       sync.Mutex // guards encoding
	encoding struct{ ids, states []byte }
}

func newEncodedView(list []*Member, limit int) *encodedView {
	if limit > 0 && len(list) > limit {
		list = list[:limit]
	}
	return &encodedView{members: append([]*Member(nil), list...), limit: limit}
}

// shows reports whether the view lists, or would list, the member at index i.
func (v *encodedView) shows(i int) bool { return v.limit <= 0 || i < v.limit }

func (v *encodedView) ids() []byte {
	return v.once(&v.encoding.ids, func() []byte {
		ids := make([]string, len(v.members))
		for i, m := range v.members {
			ids[i] = m.Conn
		}
		return wire.AppendIDs(nil, ids)
	})
}

func (v *encodedView) states() []byte {
	return v.once(&v.encoding.states, func() []byte { return encodeStates(v.members) })
}

// encodeStates encodes the states of members as a JSON object.
func encodeStates(list []*Member) []byte {
	size := len(`{}`)
	for _, m := range list {
		if m.State != nil {
			size += len(m.Conn) + len(m.State) + len(`"":,`)
		}
	}
	dst := append(make([]byte, 0, size), '{')
	for _, m := range list {
		if m.State == nil {
			continue
		}
		if len(dst) > len(`{`) {
			dst = append(dst, ',')
		}
		dst = wire.AppendState(dst, m.Conn, m.State)
	}
	return append(dst, '}')
}

// once returns a part of the encoding. The first call builds it.
func (v *encodedView) once(part *[]byte, build func() []byte) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	if *part == nil {
		*part = build()
	}
	return *part
}
