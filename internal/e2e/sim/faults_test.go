package sim

import (
	"slices"
	"strings"
	"time"
)

// simFault is a kind of fault.
type simFault struct {
	name string
	calm bool // time limits hold in spite of the fault
	// begin causes the fault. It returns false if that is not possible now.
	begin func(s *sim) bool
}

func simFaultList() []simFault {
	return []simFault{
		// Faults of servers.
		{"kill", true, (*sim).kill},
		{"start", true, func(s *sim) bool { s.startServer(); return true }},
		{"latekilled", false, (*sim).lateKilled},
		{"stop", true, (*sim).stopServer},
		{"pauseshort", false, func(s *sim) bool { return s.pause(0.2, 0.9) }},
		{"pauselong", false, func(s *sim) bool { return s.pause(1.1, 3) }},
		{"callsfail", false, (*sim).callsFail},
		{"entryrefused", false, (*sim).entriesRefused},
		{"backlog", true, (*sim).backlog},
		// Faults of the network between a server and Redis.
		{"cutshort", false, func(s *sim) bool { return s.partition(true, 0.1, 0.9) }},
		{"cutlong", false, func(s *sim) bool { return s.partition(true, 2, 8) }},
		{"hangshort", false, func(s *sim) bool { return s.partition(false, 0.1, 0.9) }},
		{"hanglong", false, func(s *sim) bool { return s.partition(false, 3, 10) }},
		{"overdue", false, (*sim).overdue},
		{"cutall", false, (*sim).cutAll},
		{"hangall", false, (*sim).hangAll},
		{"replylost", true, (*sim).loseReplies},
		{"latewrite", false, (*sim).holdWrite},
		{"flap", false, (*sim).flap},
		// Faults of messages.
		{"messages", false, (*sim).loseMessages},
		{"hintsaway", true, (*sim).loseHints},
		{"hintsfalse", true, (*sim).falseHints},
		// Faults of Redis.
		{"error", false, (*sim).errors},
		{"scriptflush", true, func(s *sim) bool { return s.admin.ScriptFlush(s.ctx).Err() == nil }},
		{"refused", false, (*sim).refuseWrites},
		{"flushall", false, (*sim).flushAll},
		{"restart", false, (*sim).restart},
		{"rollback", false, (*sim).rollback},
		{"clock", false, (*sim).stepClock},
		{"deletekeys", false, (*sim).deleteKeys},
	}
}

// pickFaults chooses the faults of this run. They differ by seed, so that one fault
// does not always hide another.
func (s *sim) pickFaults() []simFault {
	all := slices.DeleteFunc(simFaultList(), func(f simFault) bool { return f.name == "refused" && *simFaults == "" })
	calm := s.rng.IntN(4) == 0
	var faults []simFault
	for _, f := range all {
		chosen := s.rng.IntN(3) == 0
		switch {
		case *simFaults != "":
			chosen = slices.Contains(strings.Split(*simFaults, ","), f.name)
		case calm:
			chosen = f.calm
		}
		if chosen {
			faults = append(faults, f)
		}
	}
	return faults
}

// disturb records that time limits do not hold until some time after undo. undo is
// called after d, or at once if it is nil.
func (s *sim) disturb(d time.Duration, undo func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if undo == nil {
		s.calmAfter(d)
		return
	}
	s.active++
	s.later = append(s.later, simLater{time.Now().Add(d + time.Duration(len(s.later))), func() {
		undo()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.active--
		s.calmAfter(s.recovery())
	}})
}

// recovery is the time limit for the recovery from a fault. It contains the time
// without contact, the time until a dead server is declared dead, and the comparison
// every ten seconds.
func (s *sim) recovery() time.Duration { return 3*s.lease + 15*time.Second }

func (s *sim) calmAfter(d time.Duration) {
	if at := time.Now().Add(d); at.After(s.disturbed) {
		s.disturbed = at
	}
}
