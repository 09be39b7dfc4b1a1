package harness

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Sight is who is in a room, with the state of each, "" for none.
type Sight map[string]string

// Differs describes the differences between s and want. It returns "" if there are none.
func (s Sight) Differs(want Sight) string {
	var list []string
	for id, state := range want {
		if got, ok := s[id]; !ok {
			list = append(list, "lacks "+id)
		} else if got != state {
			list = append(list, fmt.Sprintf("%s has state %q, not %q", id, got, state))
		}
	}
	for id := range s {
		if _, ok := want[id]; !ok {
			list = append(list, "still has "+id)
		}
	}
	if len(list) > 5 {
		list = append(list[:5], fmt.Sprintf("… %d more", len(list)-5))
	}
	return strings.Join(list, ", ")
}

func (s Sight) Take(u Update) error {
	state, in := s[u.ConnectionID]
	switch {
	case u.Type == "join" && in:
		return fmt.Errorf("is in already")
	case u.Type == "join":
		s[u.ConnectionID] = ""
	case !in:
		return fmt.Errorf("is not in")
	case u.Type == "leave":
		delete(s, u.ConnectionID)
	case u.Type == "metadata", u.Type == "disconnect", u.Type == "reconnect":
	case u.Type != "state":
		return fmt.Errorf("unknown type")
	case string(u.State) == "null" && state == "":
		return fmt.Errorf("had no state")
	case string(u.State) == "null":
		s[u.ConnectionID] = ""
	default:
		s[u.ConnectionID] = string(u.State)
	}
	return nil
}

// InRedis returns who is in a room as Redis holds it.
func (s *Server) InRedis(room string) (Sight, error) {
	members, err := s.Presence().Members(s.W.T.Context(), room)
	if err != nil {
		return nil, err
	}
	now := Sight{}
	for _, m := range members {
		now[m.ID] = string(m.State)
	}
	return now, nil
}

// Wish is what a peer has asked for in one room.
type Wish struct {
	In    bool
	State string
}

// In joins a room, and States publishes states. While Redis is away both fail, and take
// effect when it is back.
func (p *Peer) In(room string) Wish {
	_, _ = p.TryCall("mesh/join-room", map[string]any{"roomName": room})
	return Wish{In: true}
}

func (p *Peer) States(room string, n int) Wish {
	state := fmt.Sprintf(`{"n":%d}`, n)
	_, _ = p.TryCall("mesh/publish-presence-state", map[string]any{"roomName": room, "state": json.RawMessage(state)})
	return Wish{In: true, State: state}
}

func (p *Peer) Out(room string) Wish {
	_, _ = p.TryCall("mesh/leave-room", map[string]any{"roomName": room})
	return Wish{}
}
