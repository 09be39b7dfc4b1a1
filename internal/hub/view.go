package hub

import (
	"sync"

	"github.com/meshpresence/mesh/internal/wire"
)

// View is what a room looked like at one moment. It does not change, and is
// safe for concurrent use; copies are cheap.
type View struct {
	Epoch string // as updates carry it; empty: nothing ever happened here
	Seq   uint64 // updates with a higher one come later
	Total int    // members of the room
	Stale bool   // something may have been missed

	image *image
	// self is a member that the view lists first, in the place of the last of
	// image; nil: it lists what is in image.
	self *Member
}

// view returns a view of the mirror as it is.
func (m *mirror) view(stale bool) View {
	v := View{Total: m.roster.len(), Stale: stale, image: m.roster.picture(m.hub.cfg.Listed)}
	v.Epoch, v.Seq = m.past.shown()
	return v
}

// viewFor returns a view that lists the connection even where there are too
// many members to list them all, as long as it is one.
func (m *mirror) viewFor(conn string) View {
	v := m.view(false)
	if i, ok := m.roster.at[conn]; ok && !v.image.shows(i) {
		v.self = m.roster.list[i]
	}
	return v
}

// Bounded reports whether there are more members than the view lists.
func (v View) Bounded() bool { return v.image != nil && v.Total > len(v.image.members) }

// Members returns the members that the view lists. The list is shared:
// callers must not change it.
func (v View) Members() []*Member {
	switch {
	case v.image == nil:
		return nil
	case v.self == nil:
		return v.image.members
	}
	return append([]*Member{v.self}, v.image.members[:len(v.image.members)-1]...)
}

// Present returns the listed members as JSON, [{"id", "metadata"}]. What
// Present, IDs and States return is made once and shared by all views of the
// same members: callers must not change it.
func (v View) Present() []byte {
	if v.image == nil {
		return []byte("[]")
	}
	all := v.image.present()
	if v.self == nil {
		return all
	}
	dst := make([]byte, 0, len(all)+len(v.self.listed))
	dst = append(append(dst, '['), v.self.listed...)
	last := v.image.members[len(v.image.members)-1]
	if others := all[1 : len(all)-len(last.listed)-1]; len(others) > 0 {
		dst = append(append(dst, ','), others[:len(others)-1]...) // without the comma before the last
	}
	return append(dst, ']')
}

// IDs returns the ids of the members as JSON, ["id"].
func (v View) IDs() []byte {
	if v.image == nil {
		return []byte("[]")
	}
	return v.image.ids()
}

// States returns the states of the members as JSON, {"id": state}; silent ones
// too.
func (v View) States() []byte {
	if v.image == nil {
		return []byte("{}")
	}
	return v.image.states()
}

// image is the members that a view lists, at one moment, and their JSON once
// somebody wanted it.
type image struct {
	members []*Member
	limit   int // how many there would be at most; 0 or less: no limit

	mu       sync.Mutex // guards the following
	encoding struct{ present, ids, states []byte }
}

func newImage(list []*Member, limit int) *image {
	if limit > 0 && len(list) > limit {
		list = list[:limit]
	}
	return &image{members: append([]*Member(nil), list...), limit: limit}
}

// shows reports whether the image shows, or would show, the i-th member.
func (i *image) shows(at int) bool { return i.limit <= 0 || at < i.limit }

// present puts together what each member has encoded already.
func (i *image) present() []byte {
	return i.once(&i.encoding.present, func() []byte {
		size := len(`[]`)
		for _, m := range i.members {
			size += len(m.listed) + len(`,`)
		}
		dst := append(make([]byte, 0, size), '[')
		for n, m := range i.members {
			if n > 0 {
				dst = append(dst, ',')
			}
			dst = append(dst, m.listed...)
		}
		return append(dst, ']')
	})
}

func (i *image) ids() []byte {
	return i.once(&i.encoding.ids, func() []byte {
		ids := make([]string, len(i.members))
		for n, m := range i.members {
			ids[n] = m.Conn
		}
		return wire.AppendIDs(nil, ids)
	})
}

func (i *image) states() []byte {
	return i.once(&i.encoding.states, func() []byte {
		size := len(`{}`)
		for _, m := range i.members {
			if m.State != nil {
				size += len(m.Conn) + len(m.State) + len(`"":,`)
			}
		}
		dst := append(make([]byte, 0, size), '{')
		for _, m := range i.members {
			if m.State == nil {
				continue
			}
			if len(dst) > len(`{`) {
				dst = append(dst, ',')
			}
			dst = wire.AppendState(dst, m.Conn, m.State)
		}
		return append(dst, '}')
	})
}

// once returns a part of the encoding, made by build at the first call.
func (i *image) once(part *[]byte, build func() []byte) []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	if *part == nil {
		*part = build()
	}
	return *part
}
