package browsertest

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/redistest"
)

const (
	// leaseTTL is the lease of both servers. It is short, but longer than a busy machine
	// keeps a process waiting.
	leaseTTL = 4 * time.Second
	// timeLimit is the limit of a wait for which there is no promise.
	timeLimit     = 30 * time.Second
	startAttempts = 20
)

// build builds whoshere once, from the module that this one replaces.
var build = sync.OnceValues(func() (string, error) {
	path := filepath.Join(tempDir, "whoshere")
	cmd := exec.Command("go", "build", "-o", path, ".")
	cmd.Dir = ".."
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build whoshere: %w\n%s", err, out)
	}
	return path, nil
})

// server is a whoshere process. It keeps its address over restarts.
type server struct {
	t     testing.TB
	redis *redistest.Server
	flags []string
	addr  string
	cmd   *exec.Cmd
	ended <-chan struct{}

	mu  sync.Mutex
	log strings.Builder // guarded by mu
}

// newServer starts a server on a port outside the range of outgoing connections, so that
// the port is still free after a restart.
func newServer(t testing.TB, redis *redistest.Server, flags ...string) *server {
	t.Helper()
	s := &server{t: t, redis: redis, flags: flags}
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			s.mu.Lock()
			defer s.mu.Unlock()
			t.Logf("whoshere at %s said:\n%s", s.addr, s.log.String())
		}
	})
	var err error
	for range startAttempts {
		s.addr = fmt.Sprintf("127.0.0.1:%d", 12_000+rand.IntN(20_000))
		if err = s.launch(); err == nil {
			return s
		}
	}
	t.Fatal(err)
	return nil
}

func (s *server) url(query string) string { return "http://" + s.addr + "/?" + query }

// start starts the server again after kill.
func (s *server) start() {
	s.t.Helper()
	if err := s.launch(); err != nil {
		s.t.Fatal(err)
	}
}

// launch starts the process and returns when it serves.
func (s *server) launch() error {
	path, err := build()
	if err != nil {
		return err
	}
	s.cmd = exec.Command(path, append([]string{
		"-addr", s.addr, "-redis", "redis://" + s.redis.Addr() + "/0", "-lease", leaseTTL.String(), "-grace", "3s",
	}, s.flags...)...)
	logs, out, err := os.Pipe()
	if err != nil {
		return err
	}
	s.cmd.Stderr = out
	s.ended, err = redistest.StartTied(s.cmd)
	if err != nil {
		return err
	}
	if err := out.Close(); err != nil { // the process has its own
		return err
	}
	ready := make(chan bool, 1)
	go s.read(logs, ready) // ends with the process
	select {
	case ok := <-ready:
		if ok {
			return nil
		}
	case <-time.After(timeLimit):
		s.kill()
	}
	return fmt.Errorf("whoshere did not start at %s", s.addr)
}

func (s *server) read(logs io.ReadCloser, ready chan<- bool) {
	pattern := regexp.MustCompile(`msg=ready visit=`)
	lines := bufio.NewScanner(logs)
	for lines.Scan() {
		s.mu.Lock()
		s.log.WriteString(lines.Text() + "\n")
		s.mu.Unlock()
		if pattern.MatchString(lines.Text()) {
			ready <- true
		}
	}
	_ = logs.Close()
	select {
	case ready <- false:
	default: // launch has its answer already
	}
}

// kill ends the process like kill -9, and returns when it has ended.
func (s *server) kill() {
	if s.cmd == nil || s.ended == nil {
		return
	}
	_ = s.cmd.Process.Kill() // fails only if it has ended
	<-s.ended
}
