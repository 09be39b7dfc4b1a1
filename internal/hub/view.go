package hub

import (
	"sync"

	"github.com/meshpresence/mesh/internal/wire"
)

// keptEncodings is for how many different limits a view's JSON is kept.
const keptEncodings = 4

// View is what a room looked like at one moment. It does not change, and is
// safe for concurrent use; copies are cheap.
type View struct {
	Epoch string // as updates carry it; empty: nothing ever happened here
	Seq   uint64 // updates with a higher one come later
	Total int    // members of the room
	Stale bool   // something may have been missed

	image *image
	limit int
}

// view returns a view of the mirror as it is.
func (m *mirror) view(stale bool, limit int) View {
	if m.roster.image == nil {
		m.roster.image = newImage(m.roster.list)
	}
	v := View{Total: m.roster.len(), Stale: stale, image: m.roster.image, limit: limit}
	v.Epoch, v.Seq = m.past.shown()
	return v
}

// Limited returns the same view with at most limit members (0 or less: all).
func (v View) Limited(limit int) View {
	v.limit = limit
	return v
}

// Bounded reports whether there are more members than the view lists.
func (v View) Bounded() bool { return v.Total > len(v.Members()) }

// Members returns the members that the view lists. The list is shared:
// callers must not change it.
func (v View) Members() []*Member {
	if v.image == nil {
		return nil
	}
	list := v.image.members
	if v.limit > 0 && v.limit < len(list) {
		list = list[:v.limit:v.limit]
	}
	return list
}

// Present returns the listed members as JSON, [{"id", "metadata"}]. What
// Present, IDs and States return is made once and shared by all views of the
// same moment: callers must not change it.
func (v View) Present() []byte {
	return v.encoding(func(e *encoding) *[]byte { return &e.present }, func(list []*Member) []byte {
		members := make([]wire.Member, len(list))
		for i, m := range list {
			members[i] = wire.Member{ID: m.Conn, Metadata: m.Meta}
		}
		return wire.AppendMembers(nil, members)
	})
}

// IDs returns the ids of the listed members as JSON, ["id"].
func (v View) IDs() []byte {
	return v.encoding(func(e *encoding) *[]byte { return &e.ids }, func(list []*Member) []byte {
		ids := make([]string, len(list))
		for i, m := range list {
			ids[i] = m.Conn
		}
		return wire.AppendIDs(nil, ids)
	})
}

// States returns the states of the listed members as JSON, {"id": state};
// silent ones too.
func (v View) States() []byte {
	return v.encoding(func(e *encoding) *[]byte { return &e.states }, func(list []*Member) []byte {
		states := make([]wire.StateOf, 0, len(list))
		for _, m := range list {
			if m.State != nil {
				states = append(states, wire.StateOf{ID: m.Conn, State: m.State})
			}
		}
		return wire.AppendStates(nil, states)
	})
}

// image is the members of a room at one moment, and their JSON once somebody
// wanted it.
type image struct {
	members []*Member

	mu        sync.Mutex        // guards the following
	encodings map[int]*encoding // by how many members
}

// encoding is the JSON of the first so many members.
type encoding struct {
	present, ids, states []byte
}

func newImage(members []*Member) *image {
	return &image{members: append([]*Member(nil), members...)}
}

// encoding returns one of the encodings of the listed members, made by build
// at the first call.
func (v View) encoding(which func(*encoding) *[]byte, build func([]*Member) []byte) []byte {
	list := v.Members()
	if v.image == nil {
		return build(list)
	}
	i := v.image
	i.mu.Lock()
	defer i.mu.Unlock()
	e := i.encodings[len(list)]
	if e == nil {
		e = new(encoding)
		if i.encodings == nil {
			i.encodings = make(map[int]*encoding)
		}
		if len(i.encodings) < keptEncodings {
			i.encodings[len(list)] = e
		}
	}
	part := which(e)
	if *part == nil {
		*part = build(list)
	}
	return *part
}
