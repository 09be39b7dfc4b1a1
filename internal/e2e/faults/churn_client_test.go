//go:build unix

package faults

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// churnClient is a client that uses one room. It joins, publishes states, leaves, and
// reconnects under another id. A goroutine may access the fields if it holds
// churnTest.stepLock: the client's own goroutine for one step, or the test's goroutine.
type churnClient struct {
	ct     *churnTest
	slot   *serverSlot
	room   string
	steady bool // joins, publishes one state and stays
	rng    *rand.Rand

	p       *harness.Peer       // nil if not connected
	process int                 // number of the server's process
	now     harness.WantedEntry // the expected entry
	states  int                 // number of published states
	refused bool                // the server has refused the state
}

// pace is the mean time between two steps of a client.
const pace = 300 * time.Millisecond

func (s *churnClient) run() {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-s.ct.quit:
			return
		case <-t.C:
		}
		s.ct.stepLock.RLock()
		s.step()
		s.ct.stepLock.RUnlock()
		t.Reset(pace/2 + rand.N(pace))
	}
}

// step sends one request, connects or disconnects.
func (s *churnClient) step() {
	s.checkEnded()
	switch draw := s.rng.IntN(12); {
	case s.p == nil:
		s.connect()
	case !s.now.In:
		s.call("mesh/join-room", nil, harness.WantedEntry{In: true})
	case s.now.State == "" || !s.steady && draw < 6:
		s.states++
		state := fmt.Sprintf(`{"n":%d}`, s.states)
		s.call("mesh/publish-presence-state", json.RawMessage(state), harness.WantedEntry{In: true, State: state})
	case s.steady:
	case draw < 8:
		s.call("mesh/clear-presence-state", nil, harness.WantedEntry{In: true})
	case draw < 9:
		s.disconnect()
	default:
		s.call("mesh/leave-room", nil, harness.WantedEntry{})
	}
}

// checkEnded finds out whether the connection has ended. It may only end together with
// the process of its server.
func (s *churnClient) checkEnded() {
	if s.p == nil {
		return
	}
	_, process := s.slot.current()
	select {
	case <-s.p.Ended:
		if process == s.process {
			s.ct.violation("a connection of %s has ended: %v", s.slot.name, s.p.Err())
		}
		s.forget()
	default:
		if process != s.process { // the connection is about to end
			s.forget()
		}
	}
}

// disconnect closes the connection.
func (s *churnClient) disconnect() {
	if s.p != nil {
		p := s.p
		s.forget()
		p.Close()
	}
}

// forget records that the connection has ended.
func (s *churnClient) forget() {
	if s.now.In {
		s.ct.allowLeave(s.p.ID)
	}
	s.now = harness.WantedEntry{}
	s.ct.note(s.room, s.p.ID, s.now)
	s.p, s.refused = nil, false
}

func (s *churnClient) connect() {
	h, process := s.slot.current()
	if h == nil {
		return // until the next process has started
	}
	p, err := h.TryDial()
	if err != nil {
		if _, now := s.slot.current(); now == process {
			s.ct.violation("connecting to %s: %v", s.slot.name, err)
		}
		return
	}
	s.p, s.process = p, process
}

// call sends a command. The entry is expected to be as in then, even if there is no
// answer.
func (s *churnClient) call(command string, state json.RawMessage, then harness.WantedEntry) {
	if s.now.In && !then.In {
		s.ct.allowLeave(s.p.ID) // before a watcher can receive it
	}
	payload := map[string]any{"roomName": s.room}
	if state != nil {
		payload["state"] = state
	}
	answer, err := s.p.TryCall(command, payload)
	s.ct.report.calls.Add(1)
	if s.now = then; err != nil {
		select {
		case <-s.p.Ended: // checkEnded finds out the reason
		default:
			s.ct.violation("%s at %s: %v", command, s.slot.name, err)
		}
	}
	s.ct.note(s.room, s.p.ID, s.now)
	var refusal struct{ Code, Error string }
	switch {
	case err != nil:
	case string(answer) == "false":
		s.refused = true
	case json.Unmarshal(answer, &refusal) == nil && refusal.Code == "ENOTFOUND": // the server does not have the entry
		s.refused = true
	case json.Unmarshal(answer, &refusal) == nil && refusal.Code != "" && refusal.Code != "EUNAVAILABLE":
		s.ct.violation("%s at %s: %s %s", command, s.slot.name, refusal.Code, refusal.Error)
	}
}

// repeatState publishes the state again, as a client does after its server has refused
// it. A server does that if it stalled or was declared dead.
func (s *churnClient) repeatState() {
	s.refused = false
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
	s.ct.violation("%s refuses every state in %s", s.slot.name, s.room)
}
