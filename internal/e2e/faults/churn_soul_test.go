//go:build unix

package faults

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// soul is somebody who uses one room: comes, goes, says something, loses the
// connection and comes again under another id. Its fields belong to whoever
// holds storm.held: its own goroutine for a step, or the test's.
type soul struct {
	st     *storm
	post   *post
	room   string
	steady bool // joins, says one thing, and stays
	rng    *rand.Rand

	p      *harness.Peer // nil: not connected
	life   int           // of the post
	now    harness.Wish  // what it has asked for
	asked  int
	unsure bool // it was told that its state was not taken
}

// pace is how often a soul does something.
const pace = 300 * time.Millisecond

func (s *soul) live() {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-s.st.quit:
			return
		case <-t.C:
		}
		s.st.held.RLock()
		s.step()
		s.st.held.RUnlock()
		t.Reset(pace/2 + rand.N(pace))
	}
}

// step does one thing.
func (s *soul) step() {
	s.sync()
	switch draw := s.rng.IntN(12); {
	case s.p == nil:
		s.connect()
	case !s.now.In:
		s.ask("mesh/join-room", nil, harness.Wish{In: true})
	case s.now.State == "" || !s.steady && draw < 6:
		s.asked++
		state := fmt.Sprintf(`{"n":%d}`, s.asked)
		s.ask("mesh/publish-presence-state", json.RawMessage(state), harness.Wish{In: true, State: state})
	case s.steady:
	case draw < 8:
		s.ask("mesh/clear-presence-state", nil, harness.Wish{In: true})
	case draw < 9:
		s.end()
	default:
		s.ask("mesh/leave-room", nil, harness.Wish{})
	}
}

// sync finds out whether the connection still is one. One that ended with its
// server's process has departed.
func (s *soul) sync() {
	if s.p == nil {
		return
	}
	_, life := s.post.now()
	select {
	case <-s.p.Ended:
		if life == s.life {
			s.st.wrong("a connection of %s has ended: %v", s.post.name, s.p.Err)
		}
		s.depart()
	default:
		if life != s.life { // it is going to
			s.depart()
		}
	}
}

// end closes the connection.
func (s *soul) end() {
	if s.p != nil {
		p := s.p
		s.depart()
		p.Close()
	}
}

// depart notes that the connection is gone.
func (s *soul) depart() {
	if s.now.In {
		s.st.departing(s.p.ID)
	}
	s.now = harness.Wish{}
	s.st.note(s.room, s.p.ID, s.now)
	s.p, s.unsure = nil, false
}

func (s *soul) connect() {
	h, life := s.post.now()
	if h == nil {
		return // there will be another process
	}
	p, err := h.TryDial()
	if err != nil {
		if _, now := s.post.now(); now == life {
			s.st.wrong("connecting to %s: %v", s.post.name, err)
		}
		return
	}
	s.p, s.life = p, life
}

// ask sends a command after which the wish holds, answered or not.
func (s *soul) ask(command string, state json.RawMessage, then harness.Wish) {
	if s.now.In && !then.In {
		s.st.departing(s.p.ID) // before anybody can be told
	}
	payload := map[string]any{"roomName": s.room}
	if state != nil {
		payload["state"] = state
	}
	answer, err := s.p.TryCall(command, payload)
	s.st.report.calls.Add(1)
	if s.now = then; err != nil {
		select {
		case <-s.p.Ended: // sync finds out why
		default:
			s.st.wrong("%s at %s: %v", command, s.post.name, err)
		}
	}
	s.st.note(s.room, s.p.ID, s.now)
	var refusal struct{ Code, Error string }
	switch {
	case err != nil:
	case string(answer) == "false":
		s.unsure = true
	case json.Unmarshal(answer, &refusal) == nil && refusal.Code == "ENOTFOUND": // it is not in the room
		s.unsure = true
	case json.Unmarshal(answer, &refusal) == nil && refusal.Code != "" && refusal.Code != "EUNAVAILABLE":
		s.st.wrong("%s at %s: %s %s", command, s.post.name, refusal.Code, refusal.Error)
	}
}

// assure says once more what its state is, as a client does that was told it
// could not be taken: its server had stood still, or was taken for dead.
func (s *soul) assure() {
	s.unsure = false
	if s.p == nil || !s.now.In {
		return
	}
	for until := time.Now().Add(5 * time.Second); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		if s.now.State == "" {
			_, _ = s.p.TryCall("mesh/noop", map[string]any{}) // a sign of life
			return
		}
		answer, err := s.p.TryCall("mesh/publish-presence-state", map[string]any{
			"roomName": s.room, "state": json.RawMessage(s.now.State),
		})
		if err != nil || string(answer) == "true" {
			return
		}
	}
	s.st.wrong("%s takes no state in %s", s.post.name, s.room)
}
