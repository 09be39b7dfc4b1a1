package hub

import "time"

// install makes the completed merge the mirror, and delivers the difference to the
// sinks.
func (m *mirror) install(now time.Time) {
	p := m.read.merge
	m.hub.counters.snapshots[m.read.want].Add(1)
	if m.read.outage {
		// Owners could not write their members while Redis was away.
		m.extendUnconfirmed(now)
		m.read.outage = false
	}
	old, known := m.members, m.live
	var left []*Member
	if known {
		left = m.missing(p, now)
	}
	for _, member := range p.members.list {
		if old.get(member.Conn) == nil || m.unconfirmed.empty() {
			continue
		}
		if _, still := p.unconfirmed[member.Conn]; !still {
			m.unconfirmed.remove(member.Conn)
		}
	}
	m.past.jump(p.pos)
	m.members, m.generation = p.members, p.generation
	m.live, m.sub.compared, m.read.want = true, true, causeNone
	m.read.installedAt = now
	rest := m.pending.takeAll()
	m.read.stop()
	m.early.clear()
	m.sub.checkpoint = checkpoint{}
	m.unconfirmed.schedule()
	if known {
		m.deliverDifference(&old, left)
	} else {
		m.deliverListed()
	}
	for _, e := range rest {
		m.receive(e.ev, e.size, now)
	}
	m.wakeWaiters()
}

// missing goes through the members that the snapshot lacks. It returns those that
// have left, and adds the others to the snapshot as unconfirmed.
func (m *mirror) missing(p *pagedMerge, now time.Time) (left []*Member) {
	lost := m.mayHaveLostMembers(p)
	for _, member := range m.members.list {
		if p.members.get(member.Conn) != nil {
			continue
		}
		until, unconfirmed := m.unconfirmed.has(member.Conn)
		switch {
		case unconfirmed && until.After(p.readAt):
		case !unconfirmed && lost:
			m.markUnconfirmed(member.Conn, now)
		default:
			// If it was unconfirmed, its time was over before this snapshot was read,
			// and the snapshot still lacks it.
			m.unconfirmed.remove(member.Conn)
			left = append(left, member)
			continue
		}
		p.addUnconfirmed(member)
	}
	return left
}

// mayHaveLostMembers reports whether the snapshot may lack members because Redis
// lost acknowledged writes. The signs are another epoch (or none), a position that
// went back or shows other tags, another generation, or fewer records than Redis
// counts.
func (m *mirror) mayHaveLostMembers(p *pagedMerge) bool {
	pos := m.past.pos
	switch {
	case p.began.Epoch != pos.Epoch, p.began.Seq < pos.Seq:
		return true
	case p.began.Seq == pos.Seq && p.began.Tag != pos.Tag, m.read.want == CauseFork:
		return true
	}
	return p.incomplete || p.generation.mayDifferFrom(m.generation)
}

// deliverDifference delivers the changes from the old members to the present ones. Joins
// come before leaves: a user who has moved to another connection does not leave the room.
func (m *mirror) deliverDifference(old *members, left []*Member) {
	at := m.hub.cfg.Now()
	var other []*Member // belong to another user now
	for _, member := range m.members.list {
		before := old.get(member.Conn)
		switch {
		case before == member:
		case before == nil:
			m.deliverJoin(member, "", member.joinTime(at), at, true)
		case otherUser(before, member):
			other = append(other, member)
		default:
			m.deliverChanges(before, member, at, true)
		}
	}
	for _, member := range other {
		m.deliverChanges(old.get(member.Conn), member, at, true)
	}
	for _, member := range left {
		m.deliverLeave(member, member.endReason(), at, true)
	}
}

// deliverListed delivers the members that a view lists, with their silent states,
// to the sinks of WatchNow, which have seen an empty room. It does not deliver all
// members of a large room, because those might exceed a socket's queue. The members that
// it does not deliver count from the beginning, so that the last numbers are the true
// ones.
func (m *mirror) deliverListed() {
	all := numbersOf(m.members.list, m.numbers.counted)
	if len(m.sinks.list) > 0 {
		list := m.members.encodedView(m.hub.cfg.Listed).members
		listed := numbersOf(list, all.counted)
		m.numbers = numbers{
			connections: all.connections - listed.connections, counted: all.counted, alone: all.users() - listed.users(),
		}
		at := m.hub.cfg.Now()
		for _, member := range list {
			m.deliverJoin(member, "", member.joinTime(at), at, true)
			if member.State != nil && member.StateSilent {
				m.deliverState(member, at, true)
			}
		}
	}
	m.numbers = all
}
