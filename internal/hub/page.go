package hub

import (
	"context"
	"crypto/rand"
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

// pageBytes is the size from which a page has no further members.
const pageBytes = 256 << 10

// PageCursor is the place from which to continue a list in pages. The zero PageCursor is the
// beginning.
type PageCursor struct {
	// List identifies one order of the members of one mirror. See Hub.PageList.
	List uint64
	// Left is the number of members that the pages before have left.
	Left int
}

// Page is a part of the members of a room at one moment.
type Page struct {
	Listing
	States []byte // as JSON, {"id": state}
	Next   PageCursor
	More   bool // there are more members
	// Restart says that the cursor was not one of this mirror, or that the mirror has read
	// the room again since. So this is the first page.
	Restart bool
}

// Page calls ready with a page of at most limit members, for a sink that watches the room.
// The sink gets the updates that the page includes before ready is called, and all others
// after it. Like Sink.Deliver, ready must not block and must not call the hub. Page returns
// false if the sink does not watch the room, or if the room has not been read yet.
//
// A member that is present all the time is on at least one of the pages: pages go through
// the list from its end. New members are appended, and the last member takes the place of
// a removed one. So a member that a page has passed may come once more, but none moves
// from the part that is left to the part that pages have passed.
func (h *Hub) Page(room string, sink Sink, at PageCursor, limit int, ready func(Page)) bool {
	m := h.mirror(room)
	if m == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.live || !m.sinks.has(sink) {
		return false
	}
	ready(m.page(at, limit))
	return true
}

// page returns a page of the mirror. The caller holds m.mu.
func (m *mirror) page(at PageCursor, limit int) Page {
	ms := &m.members
	if ms.order == 0 {
		ms.order = m.hub.orders.Add(1)
	}
	end := ms.len()
	p := Page{Restart: at != PageCursor{} && at.List != ms.order}
	if at.List == ms.order {
		end = min(max(at.Left, 0), end)
	}
	start, size := end, 0
	for start > 0 && end-start < limit && size < pageBytes {
		start--
		size += len(ms.list[start].listed) + len(ms.list[start].State)
	}
	p.Total, p.Stale, p.Users = ms.len(), !m.upToDate(time.Now()), m.numbers.shown().Users
	p.Epoch, p.Seq = m.past.shown()
	p.Present, p.States = encodePage(ms.list[start:end])
	if p.More = start > 0; p.More {
		p.Next = PageCursor{List: ms.order, Left: start}
	}
	return p
}

// encodePage encodes members as a JSON array, and their states as an object.
func encodePage(list []*Member) (present wire.Text, states []byte) {
	present = append(make(wire.Text, 0, len(list)+2), listOpen)
	for _, m := range list {
		present = append(present, m.listed)
	}
	if len(list) > 0 {
		present[1] = present[1][len(`,`):]
	}
	return append(present, listClose), encodeStates(list)
}

// PageList identifies this hub in the cursors of clients, which may bring them to another
// server.
func (h *Hub) PageList() string { return h.pageList }

func newPageList() string { return rand.Text()[:10] }

// Generation returns the identity of the Redis process as of notBefore or later. The zero
// time accepts any answer. It is empty if Redis never tells it. It returns false if it is
// unknown now.
func (h *Hub) Generation(ctx context.Context, notBefore time.Time) (id string, ok bool) {
	g := h.generation.learn(ctx, notBefore)
	return g.id, g.id != "" || g.neverKnown
}
