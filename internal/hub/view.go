package hub

import (
	"sync"

	"github.com/meshpresence/mesh/internal/wire"
)

// Listing is who was in a room at one moment, as clients are told. It does not
// change, and is safe for concurrent use; copies are cheap.
type Listing struct {
	Epoch string // as updates carry it; empty: nothing ever happened here
	Seq   uint64 // updates with a higher one come later
	Total int    // members of the room
	Stale bool   // something may have been missed
	// Bounded says that there are more members than are listed.
	Bounded bool
	// Present is the listed members as JSON, [{"id", "metadata"}]. It is shared:
	// callers must not change it.
	Present wire.Text
}

// View is a Listing, and what else a room looked like at that moment.
type View struct {
	Listing
	image *image
}

// listing returns the mirror as it is. Conn is listed if it is a member.
func (m *mirror) listing(stale bool, conn string) Listing {
	limit := m.hub.cfg.Listed
	l := Listing{Total: m.roster.len(), Stale: stale, Present: m.roster.present(limit, conn)}
	l.Bounded = limit > 0 && l.Total > limit
	l.Epoch, l.Seq = m.past.shown()
	return l
}

// view returns a view of the mirror as it is.
func (m *mirror) view(stale bool) View {
	return View{Listing: m.listing(stale, ""), image: m.roster.picture(m.hub.cfg.Listed)}
}

// Members returns the members that the view lists. The list is shared:
// callers must not change it.
func (v View) Members() []*Member {
	if v.image == nil {
		return nil
	}
	return v.image.members
}

// IDs returns the ids of the listed members as JSON, ["id"]. What IDs and States
// return is made once and shared by all views of the same members: callers must
// not change it.
func (v View) IDs() []byte {
	if v.image == nil {
		return []byte("[]")
	}
	return v.image.ids()
}

// States returns the states of the listed members as JSON, {"id": state};
// silent ones too.
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
	encoding struct{ ids, states []byte }
}

func newImage(list []*Member, limit int) *image {
	if limit > 0 && len(list) > limit {
		list = list[:limit]
	}
	return &image{members: append([]*Member(nil), list...), limit: limit}
}

// shows reports whether the image shows, or would show, the i-th member.
func (i *image) shows(at int) bool { return i.limit <= 0 || at < i.limit }

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
