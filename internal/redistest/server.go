package redistest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"
)

const (
	startAttempts = 20 // ports tried
	// Ports are picked below those that the system uses for outgoing connections. So no
	// connection takes a server's port while the server is down.
	firstPort, lastPort = 12_000, 32_000
	configFile          = "redis.conf"
)

// Server is a redis-server that this process started. Its methods may be called from any
// goroutine of the test. They end the test if they fail, so call those without a
// testing.TB from the test's own goroutine.
type Server struct {
	t    testing.TB
	path string
	dir  string
	conf config
	port int
	bus  int // of the cluster bus; 0: not a node of a cluster
	tls  int // port for TLS; 0: none
	ca   *authority

	mu   sync.Mutex // guards proc, and is held while it changes
	proc *process   // nil: not running
}

// config holds the values that the options set.
type config struct {
	rdb, aof bool
	node     bool // of a cluster
	tls      bool
	args     []string
	file     string // content of its configuration file, which it may rewrite; "": no file
}

// Option changes how a server is started.
type Option func(*config)

// Args adds arguments of the command line, which override the defaults: Args("--hz",
// "100", "--notify-keyspace-events", "Ex").
func Args(args ...string) Option {
	return func(c *config) { c.args = append(c.args, args...) }
}

// WithRDB makes the server load dump.rdb when it starts. It writes dump.rdb only on SAVE,
// or in Stop.
func WithRDB() Option { return func(c *config) { c.rdb = true } }

// WithAOF makes the server keep every acknowledged write (appendfsync always).
func WithAOF() Option { return func(c *config) { c.aof = true } }

// WithTLS makes the server also listen for TLS, on a port of its own: see Server.TLSAddr
// and Server.TLS.
func WithTLS() Option { return func(c *config) { c.tls = true } }

// WithUser gives the server one more user, which is also known after a restart. rules are
// those of ACL SETUSER after the name: WithUser("poor on >secret ~mesh:* +get"). Clients
// without a user name still have all rights.
func WithUser(rules string) Option {
	return func(c *config) { c.file += "user " + rules + "\n" }
}

// binary finds the server's executable.
func binary() (string, error) {
	name := os.Getenv("MESH_REDIS_SERVER")
	if name == "" {
		name = "redis-server"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("redistest: no server binary: %w", err)
	}
	return path, nil
}

// Available reports whether Start would start a server: there is a binary, and -short is
// not set.
func Available() bool {
	_, err := binary()
	return err == nil && !testing.Short()
}

// Start starts a server on a free port of 127.0.0.1, waits until it answers, and stops it
// when the test is over. It saves nothing, unless options say so. If there is no binary
// the test is skipped, or fails with MESH_REQUIRE_REDIS=1. With -short the test is always
// skipped.
func Start(t testing.TB, opts ...Option) *Server {
	t.Helper()
	if testing.Short() {
		t.Skip("left out by -short: needs a real redis-server")
	}
	path, err := binary()
	if err != nil {
		if os.Getenv("MESH_REQUIRE_REDIS") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	s := &Server{t: t, path: path, dir: t.TempDir()}
	for _, o := range opts {
		o(&s.conf)
	}
	if s.conf.file != "" {
		if err := os.WriteFile(filepath.Join(s.dir, configFile), []byte(s.conf.file), 0o600); err != nil {
			t.Fatalf("redistest: configuration: %v", err)
		}
	}
	if s.conf.tls {
		if s.ca, err = newAuthority(s.dir); err != nil {
			t.Fatalf("redistest: certificates: %v", err)
		}
	}
	t.Cleanup(s.Kill)
	if err := s.launchOnFreePorts(); err != nil {
		t.Fatal(err)
	}
	return s
}

// launchOnFreePorts picks ports and starts the server. If another process has taken a
// port, it tries others.
func (s *Server) launchOnFreePorts() error {
	var errs []error
	for range startAttempts {
		var err error
		s.port, err = freePort()
		if err == nil && s.conf.node {
			s.bus, err = freePort()
		}
		if err == nil && s.conf.tls {
			s.tls, err = freePort()
		}
		if err == nil {
			err = s.launch()
		}
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		if !errors.Is(err, errEnded) {
			break
		}
	}
	return errors.Join(errs...)
}

// freePort returns a port that was free a moment ago.
func freePort() (int, error) {
	var err error
	for range startAttempts {
		port := firstPort + rand.IntN(lastPort-firstPort)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("redistest: no free port: %w", err)
}

// launch starts the server, with additional arguments, and waits until it answers.
func (s *Server) launch(more ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	args := []string{
		"--port", strconv.Itoa(s.port), "--bind", "127.0.0.1", "--dir", s.dir,
		"--daemonize", "no", "--save", "", "--appendonly", "no", "--logfile", "redis.log",
	}
	if s.conf.aof {
		args = append(args, "--appendonly", "yes", "--appendfsync", "always")
	}
	if s.conf.file != "" {
		args = append([]string{configFile}, args...)
	}
	if s.conf.node {
		args = append(args, clusterArgs(s.bus)...)
	}
	if s.conf.tls {
		args = append(args, tlsArgs(s.tls)...)
	}
	proc, err := startProcess(s.path, slices.Concat(args, s.conf.args, more), s.dir)
	if err != nil {
		return err
	}
	if err := s.answers(proc); err != nil {
		proc.signal(os.Kill)
		return fmt.Errorf("%w; its log: %s", err, s.log())
	}
	s.proc = proc
	return nil
}

// log returns the end of the server's log.
func (s *Server) log() string {
	b, err := os.ReadFile(filepath.Join(s.dir, "redis.log"))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// Addr returns the address, 127.0.0.1:port. It stays the same over restarts.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// Dir returns the server's directory, which is the test's own.
func (s *Server) Dir() string { return s.dir }

// Client returns a new client, closed when the test is over.
func (s *Server) Client(t testing.TB) *redis.Client { return client(t, s.Addr()) }

func client(t testing.TB, addr string) *redis.Client {
	t.Helper()
	return closed(t, redis.NewClient(&redis.Options{Addr: addr}))
}

// closed closes a client when the test is over.
func closed(t testing.TB, c *redis.Client) *redis.Client {
	t.Helper()
	t.Cleanup(func() {
		if err := c.Close(); err != nil && !errors.Is(err, redis.ErrClosed) {
			t.Error(err)
		}
	})
	return c
}
