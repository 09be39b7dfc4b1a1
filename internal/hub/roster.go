package hub

import (
	"unique"

	"github.com/meshpresence/mesh/internal/store"
)

// roster is the members of a room, in an order that stays while they do.
type roster struct {
	list  []*Member
	at    map[string]int // connection id -> index in list
	image *image         // of the first of list; nil: not made since one of them changed
	run   run            // of the first of list
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
	if i, ok := r.at[m.Conn]; ok {
		r.touch(i)
		r.list[i] = m
		return
	}
	if r.at == nil {
		r.at = make(map[string]int)
	}
	r.touch(len(r.list))
	r.at[m.Conn] = len(r.list)
	r.list = append(r.list, m)
}

// remove takes off the member of that connection and returns it.
func (r *roster) remove(conn string) *Member {
	i, ok := r.at[conn]
	if !ok {
		return nil
	}
	r.touch(i)
	gone, last := r.list[i], len(r.list)-1
	r.list[i] = r.list[last]
	r.at[r.list[i].Conn] = i
	r.list[last] = nil
	r.list = r.list[:last]
	delete(r.at, conn)
	return gone
}

// touch is called before the list changes at index i, and perhaps after it.
func (r *roster) touch(i int) {
	r.run.cut(r.list, i)
	if r.image != nil && r.image.shows(i) {
		r.image = nil
	}
}

// picture returns an image of the first limit members (0 or less: of all). In a
// larger room it outlives most changes: they are of members that it does not
// show.
func (r *roster) picture(limit int) *image {
	if r.image == nil {
		r.image = newImage(r.list, limit)
	}
	return r.image
}

// outlives reports whether a member stays though the event says that it left with
// its dead owner: the connection belongs to another incarnation by now. The event
// is then about an entry whose record was lost.
func (r *roster) outlives(ev *store.Event) bool {
	if ev.Type != store.Left || ev.Cause != store.CauseLost {
		return false
	}
	who := r.get(ev.Conn)
	return who != nil && who.owner != unique.Make(ev.Incarnation)
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
			next.describe(ev.Record.Meta)
		}
		next.seq = ev.Seq
		now = &next
	default:
		return old, old
	}
	r.put(now)
	return old, now
}
