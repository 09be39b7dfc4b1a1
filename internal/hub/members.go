package hub

import (
	"unique"

	"github.com/meshpresence/mesh/internal/store"
)

// members are the members of a room. Their order does not change, except that the
// last member takes the place of a removed one.
type members struct {
	list []*Member
	at   map[string]int // connection id -> index in list
	view *encodedView   // of the first members; nil: none since one of them changed
	head encodedMembers // the first members
	// order identifies the list in the cursors of pages. 0: there was no page.
	order uint64
	kept  map[string]int64 // disconnected members -> end of their places (Redis time, unix ms)
}

func (ms *members) len() int { return len(ms.list) }

// get returns the member of that connection, or nil if there is none.
func (ms *members) get(conn string) *Member {
	if i, ok := ms.at[conn]; ok {
		return ms.list[i]
	}
	return nil
}

// put adds m, or replaces the member of the same connection. keptUntil is the end of its
// place if it is disconnected.
func (ms *members) put(m *Member, keptUntil int64) {
	if !m.Disconnected() {
		delete(ms.kept, m.Conn)
	} else if ms.kept == nil {
		ms.kept = map[string]int64{m.Conn: keptUntil}
	} else {
		ms.kept[m.Conn] = keptUntil
	}
	if i, ok := ms.at[m.Conn]; ok {
		ms.beforeChange(i)
		ms.list[i] = m
		return
	}
	if ms.at == nil {
		ms.at = make(map[string]int)
	}
	ms.beforeChange(len(ms.list))
	ms.at[m.Conn] = len(ms.list)
	ms.list = append(ms.list, m)
}

// remove removes the member of that connection and returns it.
func (ms *members) remove(conn string) *Member {
	i, ok := ms.at[conn]
	if !ok {
		return nil
	}
	ms.beforeChange(i)
	removed, last := ms.list[i], len(ms.list)-1
	ms.list[i] = ms.list[last]
	ms.at[ms.list[i].Conn] = i
	ms.list[last] = nil
	ms.list = ms.list[:last]
	delete(ms.at, conn)
	delete(ms.kept, conn)
	return removed
}

// beforeChange drops the encodings that show index i. It is called before the list
// changes there. The list may then also change after i.
func (ms *members) beforeChange(i int) {
	ms.head.cut(ms.list, i)
	if ms.view != nil && ms.view.shows(i) {
		ms.view = nil
	}
}

// encodedView returns a view of the first limit members (0 or less: of all). In a
// room with more members it survives most changes, because they concern members
// that it does not show.
func (ms *members) encodedView(limit int) *encodedView {
	if ms.view == nil {
		ms.view = newEncodedView(ms.list, limit)
	}
	return ms.view
}

// newerThan reports whether the event is a leave with a dead owner, while the
// member is already another entry of another incarnation. The event then concerns an
// entry whose record was lost, and the member stays. A kept place still is the entry
// of its former owner.
func (ms *members) newerThan(ev *store.Event) bool {
	if ev.Type != store.Left || ev.Cause != store.CauseServerLost {
		return false
	}
	member := ms.get(ev.Conn)
	return member != nil && member.owner != unique.Make(ev.Incarnation) && member.Entry != ev.Entry
}

// change applies the event and returns the member before and after it (nil:
// absent). An event that changes an absent connection changes nothing.
func (ms *members) change(ev *store.Event) (old, now *Member) {
	old = ms.get(ev.Conn)
	switch ev.Type {
	case store.Joined, store.Replaced:
		now = newMember(&ev.Record)
	case store.Left:
		ms.remove(ev.Conn)
		return old, nil
	case store.State, store.Meta, store.Disconnected:
		if old == nil {
			return nil, nil
		}
		switch ev.Type {
		case store.State:
			now = old.withState(&ev.Record)
		case store.Meta:
			now = old.withMeta(&ev.Record)
		default:
			now = old.keptAs(&ev.Record)
		}
	default:
		return old, old
	}
	ms.put(now, ev.Record.KeptUntil)
	return old, now
}

// overdue returns the disconnected members whose places should have ended before a time
// (Redis time, unix ms).
func (ms *members) overdue(before int64) (list []Overdue) {
	for conn, until := range ms.kept {
		if until < before {
			list = append(list, Overdue{Conn: conn, Entry: ms.get(conn).Entry, Until: until})
		}
	}
	return list
}
