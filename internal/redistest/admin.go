package redistest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// restartTimeout limits how long Restart waits for the port to be free.
const restartTimeout = 10 * time.Second

// Kill ends the server at once (SIGKILL), even if it is paused, and waits for its end. It
// does nothing if the server does not run.
func (s *Server) Kill() { s.stop(os.Kill) }

// Stop shuts the server down (SIGTERM) and waits for its end. With WithRDB it saves
// first.
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

// Saved says which data a server has after a restart.
type Saved int

// The values of Saved.
const (
	Nothing    Saved = iota
	LastSave         // dump.rdb, of the last SAVE; needs WithRDB
	EveryWrite       // the append-only file; needs WithAOF
)

// files lists the files that hold a server's data.
var files = map[Saved][]string{
	LastSave:   {"dump.rdb"},
	EveryWrite: {"appendonlydir", "appendonly.aof"},
}

// Restart starts the server again on the same port and waits until it answers. It kills
// the server first if it runs. If empty is true, the saved data is deleted. Otherwise the
// server loads all data with WithAOF, the last saved data with WithRDB, and none without
// either. It has another run_id.
func (s *Server) Restart(empty bool) {
	s.t.Helper()
	switch {
	case empty:
		s.RestartFrom(Nothing)
	case s.conf.aof:
		s.RestartFrom(EveryWrite)
	case s.conf.rdb:
		s.RestartFrom(LastSave)
	default:
		s.RestartFrom(Nothing)
	}
}

// RestartFrom is Restart for a server that may save in more than one way.
func (s *Server) RestartFrom(saved Saved) {
	s.t.Helper()
	s.Kill()
	for kind, names := range files {
		if kind == saved || saved == EveryWrite {
			continue
		}
		for _, name := range names {
			if err := os.RemoveAll(filepath.Join(s.dir, name)); err != nil {
				s.t.Fatalf("redistest: delete data: %v", err)
			}
		}
	}
	// If there is an append-only file, an empty one would be loaded instead of the dump.
	// So it is begun after the dump has been loaded.
	args := []string{}
	if s.conf.aof && saved == LastSave {
		args = append(args, "--appendonly", "no")
	}
	for began := time.Now(); ; {
		err := s.launch(args...)
		if err == nil {
			break
		}
		if !errors.Is(err, errEnded) || time.Since(began) > restartTimeout {
			s.t.Fatal(err)
		}
	}
	if len(args) > 0 {
		s.append()
	}
}

// append begins an append-only file and waits until it holds all data.
func (s *Server) append() {
	s.t.Helper()
	c := client(s.t, s.Addr())
	if err := c.ConfigSet(s.t.Context(), "appendonly", "yes").Err(); err != nil {
		s.t.Fatalf("redistest: begin append-only file: %v", err)
	}
	for began := time.Now(); time.Since(began) < startTimeout; time.Sleep(probeInterval) {
		info, err := c.Info(s.t.Context(), "persistence").Result()
		if err != nil {
			s.t.Fatalf("redistest: begin append-only file: %v", err)
		}
		if strings.Contains(info, "aof_rewrite_in_progress:0\r\n") && strings.Contains(info, "aof_rewrite_scheduled:0\r\n") &&
			strings.Contains(info, "aof_last_bgrewrite_status:ok\r\n") {
			return
		}
	}
	s.t.Fatal("redistest: append-only file was not begun")
}

// Pause stops the process (SIGSTOP). Connections stay, nothing is answered, and time goes
// on.
func (s *Server) Pause() { s.t.Helper(); s.control("pause", pauseProcess) }

// Resume ends the effect of Pause (SIGCONT).
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
