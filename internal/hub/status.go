package hub

import "github.com/meshpresence/mesh/internal/store"

// RoomStatus describes one mirror for inspection.
type RoomStatus struct {
	Room     string
	Sinks    int // subscriptions; 0: the last one has ended, and the mirror lingers
	Members  int
	Position store.Position
	Stale    bool // the mirror may have missed something
}

// RoomStatuses returns the status of every mirror, in no particular order. It
// neither asks Redis nor waits.
func (h *Hub) RoomStatuses() []RoomStatus {
	mirrors := h.allMirrors()
	list := make([]RoomStatus, 0, len(mirrors))
	for _, m := range mirrors {
		if s, ok := m.status(); ok {
			list = append(list, s)
		}
	}
	return list
}

// RoomStatus returns the status of one room's mirror, or false if there is none.
func (h *Hub) RoomStatus(room string) (RoomStatus, bool) {
	m := h.mirror(room)
	if m == nil {
		return RoomStatus{}, false
	}
	return m.status()
}

func (m *mirror) status() (RoomStatus, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return RoomStatus{
		Room: m.room, Sinks: len(m.sinks.list), Members: m.members.len(), Position: m.past.pos, Stale: m.stale(),
	}, !m.closed
}
