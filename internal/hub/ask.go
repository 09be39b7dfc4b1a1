package hub

import (
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

const (
	// askAfter is how long members are in doubt before their owners are asked
	// about them, again and again. Most have been written anew by then.
	askAfter = time.Second
	// askedAtOnce is how many members one question is about.
	askedAtOnce = 256
)

// ask asks the owners of the members in doubt. A snapshot of a Redis that lost
// something does not tell who has left meanwhile from who was lost; only owners
// know, and who left while Redis was away would be listed until the doubts end.
func (m *mirror) ask(now time.Time) {
	if m.doubts == nil {
		return
	}
	m.askAt = now.Add(askAfter)
	if m.hub.cfg.Ask == nil || !m.subscribed { // cut off: no answer would arrive
		return
	}
	until := make(map[string]time.Time, len(m.doubts))
	owners := make(map[string][]string)
	for conn, t := range m.doubts {
		if who := m.roster.get(conn); who != nil {
			until[conn] = t
			owner := who.owner.Value()
			owners[owner] = append(owners[owner], conn)
		}
	}
	for owner, conns := range owners {
		for some := range slices.Chunk(conns, askedAtOnce) {
			m.hub.cfg.Ask(m.room, owner, some, func(gone []string) { m.disown(gone, until) })
		}
	}
}

// disown ends the doubt about members whose owner says that they have left. A
// doubt that is another one than was asked about stays: they may have been back
// since.
func (m *mirror) disown(gone []string, until map[string]time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	at := m.hub.cfg.Now()
	for _, conn := range gone {
		t, doubted := m.doubts[conn]
		if !doubted || !t.Equal(until[conn]) {
			continue
		}
		m.confirm(conn)
		if m.roster.remove(conn) == nil {
			continue
		}
		m.hub.counters.disowned.Add(1)
		m.tell(&wire.Update{Type: wire.UpdateLeave, ConnectionID: conn, Timestamp: at, Repair: true})
	}
	m.rejudge()
	m.rearm()
	m.wakeWaiters()
}
