package faults

import (
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// TestChildIsAServer checks a child process with a single join and leave.
func TestChildIsAServer(t *testing.T) {
	t.Parallel()
	w := harness.RealWorld(t)
	s, c := w.Tracked(), w.Child(harness.ChildConfig{Lease: 5 * time.Second, Events: true})
	watcher, p := s.Dial(), c.Dial()
	watcher.Subscribe("lobby")
	p.Join("lobby")
	watcher.Expect(5*time.Second, "join", p.ID)
	p.Leave("lobby")
	watcher.Expect(5*time.Second, "leave", p.ID)
}
