package mesh

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// childEnv makes the test binary run as a server in a process of its own,
// which can be killed and paused: it holds a childConfig as JSON.
const childEnv = "MESH_TEST_CHILD"

type childConfig struct {
	Redis  string        // address; empty: the world's
	Master string        // its name, where sentinels are to be asked for the address
	Asked  []string      // those sentinels' addresses
	Nodes  []string      // addresses of a cluster's nodes instead
	URL    string        // address with a user and TLS instead
	CA     string        // file of who has signed its certificate
	Prefix string        // Options.Prefix
	Lease  time.Duration // Options.LeaseTTL
	TTL    time.Duration // of every room
	Timed  time.Duration // TTL of the room of that name, 0: as of every other
	Events bool          // Options.EnablePresenceExpirationEvents

	Limits   Limits
	Ping     time.Duration // Options.PingInterval
	Write    time.Duration // Options.WriteTimeout
	Metadata bool          // clients may set their own
	Header   time.Duration // http.Server.ReadHeaderTimeout
	Buffer   int           // of the kernel, for what is written to a client; 0: as it is
	Gauged   bool          // tells at /gauge what it uses up
	Files    int           // that it may have open, 0: as it is
}

// runChild serves until its parent closes standard input or is gone, and
// returns the exit code.
func runChild(conf string) int {
	if err := serveChild(conf); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func serveChild(conf string) error {
	var c childConfig
	if err := json.Unmarshal([]byte(conf), &c); err != nil {
		return err
	}
	if c.Files > 0 {
		if err := limitFiles(c.Files); err != nil {
			return err
		}
	}
	orphaned := make(chan struct{})
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(orphaned)
	}()
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM)
	var client redis.UniversalClient
	switch {
	case c.Master != "":
		client = redis.NewFailoverClient(&redis.FailoverOptions{MasterName: c.Master, SentinelAddrs: c.Asked})
	case len(c.Nodes) > 0:
		client = redis.NewClusterClient(&redis.ClusterOptions{Addrs: c.Nodes})
	case c.URL != "":
		opts, err := optionsOf(c.URL, c.CA)
		if err != nil {
			return err
		}
		client = redis.NewClient(opts)
	default:
		client = redis.NewClient(&redis.Options{Addr: c.Redis})
	}
	var log stalls
	opts := Options{
		Redis: client, Prefix: c.Prefix, LeaseTTL: c.Lease, EnablePresenceExpirationEvents: &c.Events, LatencyInterval: -1,
		Logger: slog.New(&log), Limits: c.Limits, PingInterval: c.Ping, WriteTimeout: c.Write,
	}
	if c.Metadata {
		allowMetadata(&opts)
	}
	srv, err := NewServer(opts)
	if err != nil {
		return err
	}
	if err := srv.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{TTL: c.TTL}); err != nil {
		return err
	}
	if err := srv.trackTimed(c.Timed); err != nil {
		return err
	}
	starting, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := srv.Start(starting); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("/ws", srv)
	mux.HandleFunc("/lives", func(rw http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(rw).Encode(lives{Reborn: srv.Stats().Reborn, Stalled: log.n.Load()})
	})
	if c.Gauged {
		mux.Handle("/gauge", newGauge(srv))
	}
	web := &http.Server{Handler: mux, ReadHeaderTimeout: c.Header}
	go func() { _ = web.Serve(buffered{l, c.Buffer}) }() // ends with the process
	fmt.Println(l.Addr(), srv.Stats().Incarnation)
	select {
	case <-orphaned:
		return nil
	case <-asked:
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		return srv.Shutdown(ctx)
	}
}

// roomTimed is a room whose members have a TTL where others' have none.
const roomTimed = "timed"

// trackTimed gives the room of that name a TTL.
func (s *Server) trackTimed(ttl time.Duration) error {
	if ttl == 0 {
		return nil
	}
	return s.TrackPresence(Exact(roomTimed), PresenceOptions{TTL: ttl})
}

// lives is what has become of a server.
type lives struct {
	Reborn  uint64 // Stats.Reborn
	Stalled int64  // times that its process was found to have stood still past its lease
}

// stalls is a slog.Handler that counts what it says about the process itself.
type stalls struct{ n atomic.Int64 }

func (s *stalls) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

func (s *stalls) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, "process stood still past its lease") {
		s.n.Add(1)
	}
	return nil
}

func (s *stalls) WithAttrs([]slog.Attr) slog.Handler { return s }
func (s *stalls) WithGroup(string) slog.Handler      { return s }

// child is a server in another process.
type child struct {
	t           testing.TB
	w           *world // of whom peers are; nil: it has none
	cmd         *exec.Cmd
	ended       <-chan struct{}
	addr        string
	incarnation string // its first
	stderr      bytes.Buffer
	kill        sync.Once
}

// child starts a server process; it is killed at the end of the test.
func (w *world) child(c childConfig) *child {
	w.t.Helper()
	c.Prefix = w.keys().prefix
	switch {
	case w.watched != nil:
		c.Master, c.Asked = w.watched.MasterName(), w.watched.Addrs()
	case w.cluster != nil:
		c.Nodes = w.cluster.Addrs()
	case w.url != "":
		c.URL, c.CA = w.url, w.ca
	case c.Redis == "":
		c.Redis = w.real.Addr()
	}
	p := startChild(w.t, c)
	p.w = w
	return p
}

func startChild(t testing.TB, c childConfig) *child {
	t.Helper()
	conf, err := json.Marshal(c)
	require.NoError(t, err)
	exe, err := os.Executable()
	require.NoError(t, err)
	p := &child{t: t, cmd: exec.Command(exe)}
	p.cmd.Env = append(os.Environ(), childEnv+"="+string(conf))
	p.cmd.Stderr = &p.stderr
	in, err := p.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	p.ended, err = redistest.StartTied(p.cmd) // paused, it would not notice that its input is closed
	require.NoError(t, err)
	t.Cleanup(func() {
		p.die()
		_ = in.Close()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		p.die()
		require.NoError(t, err, "child: %s", p.stderr.String())
	}
	_, err = fmt.Sscan(line, &p.addr, &p.incarnation)
	require.NoError(t, err)
	return p
}

// die ends the process at once and waits for its end.
func (c *child) die() {
	c.kill.Do(func() {
		_ = c.cmd.Process.Kill() // fails only if it has ended
		<-c.ended
		c.inspect()
	})
}

// inspect looks at what the ended process had to say.
func (c *child) inspect() {
	if s := c.stderr.String(); strings.Contains(s, "DATA RACE") || strings.Contains(s, "panic:") {
		c.t.Errorf("child: %s", s)
	}
}

// stop tells the process to end in an orderly way and waits for its end.
func (c *child) stop() error {
	err := errors.New("it has been ended already")
	c.kill.Do(func() {
		if err = c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return
		}
		<-c.ended
		if s := c.cmd.ProcessState; !s.Success() {
			err = errors.New(s.String())
		}
		c.inspect()
	})
	return err
}

// lives asks what has become of the server.
func (c *child) lives() (l lives, err error) {
	once := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := once.Get("http://" + c.addr + "/lives")
	if err != nil {
		return l, err
	}
	defer func() { _ = resp.Body.Close() }()
	return l, json.NewDecoder(resp.Body).Decode(&l)
}

// dial connects a peer over TCP.
func (c *child) dial() *peer {
	c.w.t.Helper()
	p, err := c.tryDial()
	require.NoError(c.w.t, err)
	return p
}

func (c *child) tryDial() (*peer, error) {
	ws, _, err := websocket.DefaultDialer.DialContext(c.w.t.Context(), "ws://"+c.addr+"/ws", nil)
	if err != nil {
		return nil, err
	}
	p := &peer{t: c.w.t, w: c.w, ws: ws, waiting: make(map[string]chan json.RawMessage), ended: make(chan struct{})}
	var first frame
	if err = ws.ReadJSON(&first); err == nil {
		err = json.Unmarshal(first.Payload, &p.id)
	}
	if err != nil {
		return nil, errors.Join(err, ws.Close())
	}
	go p.read()
	c.w.t.Cleanup(p.close)
	return p, nil
}

// TestChildIsAServer is the shortest use of one.
func TestChildIsAServer(t *testing.T) {
	t.Parallel()
	w := realWorld(t)
	s, c := w.tracked(), w.child(childConfig{Lease: 5 * time.Second, Events: true})
	watcher, p := s.dial(), c.dial()
	watcher.subscribe("lobby")
	p.join("lobby")
	watcher.expect(5*time.Second, "join", p.id)
	p.leave("lobby")
	watcher.expect(5*time.Second, "leave", p.id)
}
