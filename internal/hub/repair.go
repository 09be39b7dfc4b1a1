package hub

import (
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

// install makes the finished fold the mirror, and tells the sinks the
// difference.
func (m *mirror) install(now time.Time) {
	f := m.fold
	m.hub.counters.snapshots[m.want].Add(1)
	if m.outage {
		// Redis was away: owners could not write their members either.
		m.putOffDoubts(now)
		m.outage = false
	}
	old, known := m.roster, m.live
	var left []*Member
	if known {
		left = m.missing(f, now)
	}
	for _, who := range f.roster.list {
		if old.get(who.Conn) == nil || m.doubts == nil {
			continue
		}
		if _, kept := f.kept[who.Conn]; !kept {
			m.confirm(who.Conn)
		}
	}
	m.past.jump(f.pos)
	m.roster, m.era = f.roster, f.era
	m.live, m.compared, m.want = true, true, causeNone
	m.landedAt = now
	rest := m.pending.take()
	m.stage, m.fold, m.foldUntil, m.spoiled = idle, nil, time.Time{}, false
	m.held.clear()
	m.checkpoint = checkpoint{}
	m.rejudge()
	if known {
		m.tellDifference(&old, left)
	}
	for _, p := range rest {
		m.receive(p.ev, p.size, now)
	}
	m.wakeWaiters()
}

// missing goes through the members that the snapshot lacks. It returns those
// who have left, and puts the others into the snapshot, in doubt.
func (m *mirror) missing(f *fold, now time.Time) (left []*Member) {
	lost := m.lost(f)
	for _, who := range m.roster.list {
		if f.roster.get(who.Conn) != nil {
			continue
		}
		until, doubted := m.doubts[who.Conn]
		switch {
		case doubted && until.After(f.readAt):
		case !doubted && lost:
			m.doubt(who.Conn, now)
		default:
			// Where it was in doubt, this snapshot was read after its time
			// was up, and still lacks it.
			m.confirm(who.Conn)
			left = append(left, who)
			continue
		}
		f.keep(who)
	}
	return left
}

// keep lists a member that Redis does not have.
func (f *fold) keep(who *Member) {
	if f.kept == nil {
		f.kept = make(map[string]struct{})
	}
	f.kept[who.Conn] = struct{}{}
	f.roster.put(who)
}

// lost reports whether the snapshot may lack members because Redis lost
// acknowledged writes, not because they left: another epoch (or none), a
// history that went back or shows other tags, another Redis process, or fewer
// records than are counted.
func (m *mirror) lost(f *fold) bool {
	pos := m.past.pos
	switch {
	case f.began.Epoch != pos.Epoch, f.began.Seq < pos.Seq:
		return true
	case f.began.Seq == pos.Seq && f.began.Tag != pos.Tag, m.want == CauseFork:
		return true
	}
	return f.lost || f.era.since(m.era)
}

// tellDifference tells the sinks how the roster differs from the old one.
func (m *mirror) tellDifference(old *roster, left []*Member) {
	at := m.hub.cfg.Now()
	for _, who := range left {
		m.tell(&wire.Update{Type: wire.UpdateLeave, ConnectionID: who.Conn, Timestamp: at, Repair: true})
	}
	for _, who := range m.roster.list {
		before := old.get(who.Conn)
		switch {
		case before == who:
		case before == nil && who.JoinedAt > 0:
			m.welcome(who, who.JoinedAt, at, true)
		case before == nil:
			m.welcome(who, at, at, true)
		case stateNews(before, who):
			m.tellState(who, at, true)
		}
	}
}

// doubtAll puts every member in doubt, for the full time.
func (m *mirror) doubtAll(now time.Time) {
	for _, who := range m.roster.list {
		m.doubt(who.Conn, now)
	}
	m.rejudge()
}

// doubt notes that Redis lost a member whose owner may write it again. The
// caller has rejudge called.
func (m *mirror) doubt(conn string, now time.Time) {
	if m.doubts == nil {
		m.doubts = make(map[string]time.Time)
	}
	if m.askAt.IsZero() {
		m.askAt = now.Add(askAfter)
	}
	m.doubts[conn] = now.Add(m.hub.cfg.Unconfirmed)
	m.hub.counters.unconfirmed.Add(1)
}

// confirm ends a member's doubt, if there was one.
func (m *mirror) confirm(conn string) {
	if m.doubts == nil {
		return
	}
	delete(m.doubts, conn)
	if len(m.doubts) == 0 {
		m.doubts = nil
		m.judgeAt, m.askAt = time.Time{}, time.Time{}
	}
}

// putOffDoubts gives every doubted member the full time again.
func (m *mirror) putOffDoubts(now time.Time) {
	for conn := range m.doubts {
		m.doubts[conn] = now.Add(m.hub.cfg.Unconfirmed)
	}
	m.rejudge()
}

// rejudge notes when the first doubt's time is up.
func (m *mirror) rejudge() {
	m.judgeAt = time.Time{}
	for _, until := range m.doubts {
		if m.judgeAt.IsZero() || until.Before(m.judgeAt) {
			m.judgeAt = until
		}
	}
}
