package harness

import (
	"encoding/json"
	"fmt"
	"strings"
)

// MemberStates has the members of a room, each with its state, or "" without one.
type MemberStates map[string]string

// Diff describes the differences between s and want. It returns "" if there are none.
func (s MemberStates) Diff(want MemberStates) string {
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

func (s MemberStates) Apply(u Update) error {
	state, in := s[u.ConnectionID]
	switch {
	case u.Type == "join" && in:
		return fmt.Errorf("is already a member")
	case u.Type == "join":
		s[u.ConnectionID] = ""
	case !in:
		return fmt.Errorf("is not a member")
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

// InRedis returns the members of a room in Redis.
func (s *Server) InRedis(room string) (MemberStates, error) {
	members, err := s.Presence().Members(s.W.T.Context(), room)
	if err != nil {
		return nil, err
	}
	now := MemberStates{}
	for _, m := range members {
		now[m.ID] = string(m.State)
	}
	return now, nil
}

// WantedEntry is the entry that a peer has requested in a room.
type WantedEntry struct {
	In    bool
	State string
}

// In joins a room, States publishes a state, and Out leaves the room. They ignore
// errors: while Redis is away, the calls may fail and take effect later.
func (p *Peer) In(room string) WantedEntry {
	_, _ = p.TryCall("mesh/join-room", map[string]any{"roomName": room})
	return WantedEntry{In: true}
}

func (p *Peer) States(room string, n int) WantedEntry {
	state := fmt.Sprintf(`{"n":%d}`, n)
	_, _ = p.TryCall("mesh/publish-presence-state", map[string]any{"roomName": room, "state": json.RawMessage(state)})
	return WantedEntry{In: true, State: state}
}

func (p *Peer) Out(room string) WantedEntry {
	_, _ = p.TryCall("mesh/leave-room", map[string]any{"roomName": room})
	return WantedEntry{}
}
