package hub

import "github.com/meshpresence/mesh/internal/store"

// Standing is where one mirror stands, for whoever looks.
type Standing struct {
	Room     string
	Sinks    int // subscriptions; 0: the last one has ended, and the mirror lingers
	Members  int
	Position store.Position
	Stale    bool // something may have been missed
}

// Standings returns where every mirror stands, in no particular order. It asks
// nobody, and does not wait.
func (h *Hub) Standings() []Standing {
	mirrors := h.all()
	list := make([]Standing, 0, len(mirrors))
	for _, m := range mirrors {
		if s, ok := m.where(); ok {
			list = append(list, s)
		}
	}
	return list
}

// Standing returns where the mirror of one room stands; false: there is none.
func (h *Hub) Standing(room string) (Standing, bool) {
	m := h.mirror(room)
	if m == nil {
		return Standing{}, false
	}
	return m.where()
}

func (m *mirror) where() (Standing, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Standing{
		Room: m.room, Sinks: len(m.sinks.list), Members: m.roster.len(), Position: m.past.pos, Stale: m.stale(),
	}, !m.closed
}
