package redistest

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// restartTimeout is how long Restart waits for the port to be free.
const restartTimeout = 10 * time.Second

// Kill ends the server at once, paused or not (SIGKILL), and waits for its
// end. A server that does not run is left alone.
func (s *Server) Kill() { s.stop(os.Kill) }

// Stop ends the server in an orderly way (SIGTERM) and waits for its end. With
// WithRDB it saves first.
func (s *Server) Stop() {
	s.t.Helper()
	if s.conf.rdb {
		c := client(s.t, s.Addr())
		if err := c.Save(s.t.Context()).Err(); err != nil {
			s.t.Fatalf("redistest: save: %v", err)
		}
	}
	s.stop(syscall.SIGTERM)
}

func (s *Server) stop(sig os.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc != nil {
		s.proc.signal(sig)
		s.proc = nil
	}
}

// Restart starts the server again on the same port, after killing it if it
// runs, and waits until it answers. empty deletes what it had saved; otherwise
// it comes back with that: everything with WithAOF, what was last saved with
// WithRDB, nothing with neither. Its run_id is another one.
func (s *Server) Restart(empty bool) {
	s.t.Helper()
	s.Kill()
	if empty || !s.conf.rdb && !s.conf.aof {
		for _, name := range []string{"dump.rdb", "appendonlydir", "appendonly.aof"} {
			if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
				s.t.Fatalf("redistest: delete data: %v", err)
			}
		}
	}
	for began := time.Now(); ; {
		err := s.launch()
		if err == nil {
			return
		}
		if !errors.Is(err, errEnded) || time.Since(began) > restartTimeout {
			s.t.Fatal(err)
		}
	}
}

// Pause stops the process as it stands (SIGSTOP): connections stay, nothing is
// answered, time goes on.
func (s *Server) Pause() { s.t.Helper(); s.control("pause", pauseProcess) }

// Resume ends what Pause began (SIGCONT).
func (s *Server) Resume() { s.t.Helper(); s.control("resume", resumeProcess) }

func (s *Server) control(what string, do func(pid int) error) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc == nil || s.proc.ended() {
		s.t.Fatalf("redistest: %s: server is not running", what)
	}
	if err := do(s.proc.pid()); err != nil {
		s.t.Fatalf("redistest: %s: %v", what, err)
	}
}
