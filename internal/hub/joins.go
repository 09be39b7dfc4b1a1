package hub

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// Who joins a room is answered with who is in it. Where many join, reading the
// room anew for each costs Redis far more than the join itself. So a room is
// mirrored too while connections of this server join it, one soon after the
// other, and as long as it costs little:
//
// A single join in a quiet room is answered from Redis. A mirror for it would
// cost a subscription and its end, and would receive every event of the room
// for seconds; and a server of quiet rooms would receive all that happens,
// although nobody on it watches. For the same reason the second join of a room
// of two or three (a private conversation) starts none: reading those is cheap.
//
// Where the answer is bounded it costs less than a mirror, which has to read all
// members. Such a room is mirrored once joins have cost as much.
const (
	// joinsWithin is how soon after one join another one must come for the
	// room to be mirrored. It may be up to twice as long.
	joinsWithin = 3 * time.Second
	// joinsNoted is of how many rooms a join is remembered.
	joinsNoted = 8192
	// fewest and most are how many members a room may have that is mirrored for
	// joins alone: while a larger one is read too much happens in it.
	fewest, most = 4, 16 << 10
	// callCosts is how many records a call could read for what it costs itself.
	callCosts = 32
	// mostKept is how many members the mirrors may hold together that joins alone
	// keep: what they take is bounded, however many rooms are joined. They count
	// as of the last join, and no mirror counts less than leastShare.
	mostKept, leastShare = 64 << 10, 16
	// hasty is for how long no join waits for its event after vainWaits in a row
	// did so in vain: where events are late, a client that joins many rooms, one
	// after the other, would wait for each.
	hasty, vainWaits = 2 * inFlight, 2
)

// joins knows which rooms were joined lately, and how much is mirrored for
// joins.
type joins struct {
	kept   atomic.Int64 // the sum of all mirrors' shares
	vain   atomic.Int32 // how many have waited in vain since one did not
	vainAt atomic.Int64 // when the last of them gave up, since Hub.born

	mu         sync.Mutex // guards the following
	turned     time.Time  // when young became old
	young, old map[string]int
}

// note notes a join and returns how many there were not long ago.
func (j *joins) note(room string, now time.Time) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	if passed := now.Sub(j.turned); passed > joinsWithin || len(j.young) >= joinsNoted/2 {
		j.old, j.young, j.turned = j.young, nil, now
		if passed > 2*joinsWithin {
			j.old = nil
		}
	}
	if j.young == nil {
		j.young = make(map[string]int)
	}
	earlier := j.young[room] + j.old[room]
	j.young[room]++
	return earlier
}

// Joined returns who is in the room, for a connection of this server that has
// just joined it. At is where the room stood right after, and total how many
// members it had: the room is listed as it was then or later, with whoever
// joined it before, and with the connection itself, also where the list is
// bounded.
//
// It is false where the room is not mirrored, something may have been missed, or
// the connection is not in: it has left meanwhile, or Redis went back to an older
// copy. Redis has to be asked then. It waits, at most 250 ms, for events that
// are on their way.
func (h *Hub) Joined(room, conn string, at store.Position, total int) (Listing, bool) {
	m, watched := h.find(room)
	switch {
	case m != nil:
		m.keep(watched, total)
		return m.await(conn, at)
	case h.worthwhile(room, total):
		m, err := h.hold(room)
		if err != nil {
			break // it is being stopped
		}
		m.keep(false, total)
		h.release(m)
	}
	return Listing{}, false
}

// find returns the room's mirror, and whether somebody watches it.
func (h *Hub) find(room string) (m *mirror, watched bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	m = h.mirrors[room]
	return m, m != nil && m.refs > 0
}

// worthwhile reports whether a room that is being joined is to be mirrored.
func (h *Hub) worthwhile(room string, total int) bool {
	if total < fewest || !h.joins.afford(0, total) {
		return false
	}
	listed := total
	if h.cfg.Listed > 0 {
		listed = min(listed, h.cfg.Listed)
	}
	return h.joins.note(room, time.Now())*(listed+callCosts) >= total
}

// afford reports whether there is room for a mirror of so many members, which
// has a share already.
func (j *joins) afford(share, total int) bool {
	return total <= most && j.kept.Load()-int64(share)+int64(shareOf(total)) <= mostKept
}

// shareOf is what a mirror of so many members counts.
func shareOf(total int) int { return max(total, leastShare) }

// keep lets a mirror linger from now on, because of a join. One that is watched
// does not need it.
func (m *mirror) keep(watched bool, total int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
	case watched:
		m.share(0)
	case m.hub.joins.afford(m.kept, total):
		m.share(shareOf(total))
		m.joined.Store(int64(max(time.Since(m.hub.born), 1)))
	}
}

// share sets the mirror's share of what is kept for joins. m.mu is held.
func (m *mirror) share(n int) {
	m.hub.joins.kept.Add(int64(n - m.kept))
	m.kept = n
}

// lingers returns until when joins keep the mirror; zero: they do not.
func (m *mirror) lingers() time.Time {
	at := m.joined.Load()
	if at == 0 {
		return time.Time{}
	}
	return m.hub.born.Add(time.Duration(at) + m.hub.linger())
}

// await lists who is in, for a connection, once the mirror has come to a position.
func (m *mirror) await(conn string, at store.Position) (Listing, bool) {
	var patience *time.Timer
	for {
		m.mu.Lock()
		if m.closed || m.stale() || at.None() {
			m.mu.Unlock()
			return Listing{}, false
		}
		if pos := &m.past.pos; pos.Epoch == at.Epoch && pos.Seq >= at.Seq {
			in, l := m.roster.get(conn) != nil, Listing{}
			if in {
				l = m.listing(false, conn)
			}
			m.mu.Unlock()
			if patience != nil {
				m.hub.joins.vain.Store(0)
			}
			return l, in
		}
		if patience == nil && m.hub.isHasty() {
			m.mu.Unlock()
			return Listing{}, false
		}
		come := m.arrivals.add(at.Seq)
		m.mu.Unlock()
		if patience == nil {
			patience = time.NewTimer(inFlight)
			defer patience.Stop()
		}
		select {
		case <-come:
		case <-patience.C:
			m.hub.waitedInVain()
			m.checkExpected()
			return Listing{}, false
		case <-m.hub.ctx.Done():
			return Listing{}, false
		}
	}
}

// waitedInVain notes that a join has waited for an event that did not come.
func (h *Hub) waitedInVain() {
	h.joins.vainAt.Store(int64(time.Since(h.born)))
	h.joins.vain.Add(1)
}

// isHasty reports whether joins waited in vain just now.
func (h *Hub) isHasty() bool {
	return h.joins.vain.Load() >= vainWaits && time.Since(h.born)-time.Duration(h.joins.vainAt.Load()) < hasty
}

// arrivals are those who wait for a mirror to come to a position, by seq. Whoever
// has given up is forgotten when it comes there, or when something is amiss: soon.
type arrivals []arrival

// arrival is closed when the mirror has come to a seq.
type arrival struct {
	seq  uint64
	come chan struct{}
}

// add returns what is closed when the mirror has come to seq, or something else
// has happened to it.
func (a *arrivals) add(seq uint64) <-chan struct{} {
	come, i := make(chan struct{}), len(*a)
	for i > 0 && (*a)[i-1].seq > seq { // few: they come about in order
		i--
	}
	*a = slices.Insert(*a, i, arrival{seq, come})
	return come
}

// wake lets those look who wait for a seq up to the given one, and nobody else:
// when many join at once, each waits for an event of his own.
func (a *arrivals) wake(seq uint64) {
	list := *a
	for len(list) > 0 && list[0].seq <= seq {
		close(list[0].come)
		list[0] = arrival{}
		list = list[1:]
	}
	if *a = list; len(list) == 0 {
		*a = nil
	}
}

// wakeAll lets everybody look.
func (a *arrivals) wakeAll() { a.wake(math.MaxUint64) }
