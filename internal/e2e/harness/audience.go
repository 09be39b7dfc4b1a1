package harness

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/meshpresence/mesh"
)

// Audience is the state of the one room that a peer watches. It follows from the frames
// that the peer received.
type Audience struct {
	Members  map[string]string // state by connection id; "" without a state
	epoch    string
	seq      uint64
	watching bool
	Repairs  int
}

// Follow applies all updates that a peer received. It returns an error at the first one
// that does not fit those before it.
func (p *Peer) Follow(room string) (a Audience, err error) {
	p.Mu.Lock()
	frames := slices.Clone(p.Frames)
	p.Mu.Unlock()
	for i, f := range frames {
		switch f.Command {
		case "mesh/subscribe-presence":
			err = a.answer(f.Payload)
		case "mesh/unsubscribe-presence":
			a.watching = false
		case "mesh/presence-update":
			u, ok := updateOf(f)
			if !ok {
				return a, fmt.Errorf("frame %d of %s is no update: %s", i, p.ID, f.Payload)
			}
			err = a.apply(room, u)
		}
		if err != nil {
			return a, fmt.Errorf("frame %d of %s: %w: %s", i, p.ID, err, f.Payload)
		}
	}
	return a, nil
}

func (a *Audience) answer(payload json.RawMessage) error {
	var v View
	var members []mesh.Member
	if err := json.Unmarshal(payload, &v); err != nil {
		return err
	}
	if err := json.Unmarshal(v.Present, &members); err != nil {
		return err
	}
	if v.Epoch == a.epoch && v.Seq < a.seq {
		return fmt.Errorf("snapshot of seq %d after %d", v.Seq, a.seq)
	}
	a.epoch, a.seq, a.watching = v.Epoch, v.Seq, v.Success
	a.Members = make(map[string]string)
	for _, m := range members {
		if _, twice := a.Members[m.ID]; twice {
			return fmt.Errorf("%s is in the snapshot twice", m.ID)
		}
		a.Members[m.ID] = string(v.States[m.ID])
	}
	return nil
}

func (a *Audience) apply(room string, u Update) error {
	state, present := a.Members[u.ConnectionID]
	switch {
	case !a.watching:
		return fmt.Errorf("update without subscription")
	case u.RoomName != room:
		return fmt.Errorf("update of another room")
	case a.epoch == u.Epoch && u.Seq < a.seq:
		return fmt.Errorf("seq %d after %d", u.Seq, a.seq)
	case u.Type == "join" && present:
		return fmt.Errorf("join of a member")
	case u.Type != "join" && !present:
		return fmt.Errorf("%s of a connection that is no member", u.Type)
	case u.Type == "state" && state == "" && string(u.State) == "null":
		return fmt.Errorf("end of a state that does not exist")
	}
	a.epoch, a.seq = u.Epoch, u.Seq
	if u.Repair {
		a.Repairs++
	}
	switch u.Type {
	case "join":
		a.Members[u.ConnectionID] = ""
	case "leave":
		delete(a.Members, u.ConnectionID)
	case "state":
		if a.Members[u.ConnectionID] = string(u.State); string(u.State) == "null" {
			a.Members[u.ConnectionID] = ""
		}
	}
	return nil
}
