package mesh

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// childEnv makes the test binary run as a server in a process of its own,
// which can be killed and paused: it holds a childConfig as JSON.
const childEnv = "MESH_TEST_CHILD"

type childConfig struct {
	Redis  string        // address; empty: the world's
	Nodes  []string      // addresses of a cluster's nodes instead
	Prefix string        // Options.Prefix
	Lease  time.Duration // Options.LeaseTTL
	TTL    time.Duration // of every room
	Events bool          // Options.EnablePresenceExpirationEvents
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
	orphaned := make(chan struct{})
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(orphaned)
	}()
	var client redis.UniversalClient = redis.NewClient(&redis.Options{Addr: c.Redis})
	if len(c.Nodes) > 0 {
		client = redis.NewClusterClient(&redis.ClusterOptions{Addrs: c.Nodes})
	}
	srv, err := NewServer(Options{
		Redis: client, Prefix: c.Prefix, LeaseTTL: c.Lease, EnablePresenceExpirationEvents: &c.Events, LatencyInterval: -1,
	})
	if err != nil {
		return err
	}
	if err := srv.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{TTL: c.TTL}); err != nil {
		return err
	}
	if err := srv.Start(context.Background()); err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go func() { _ = http.Serve(l, srv) }() // ends with the process
	fmt.Println(l.Addr(), srv.Stats().Incarnation)
	<-orphaned
	return nil
}

// child is a server in another process.
type child struct {
	w           *world
	cmd         *exec.Cmd
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
	case w.cluster != nil:
		c.Nodes = w.cluster.Addrs()
	case c.Redis == "":
		c.Redis = w.real.Addr()
	}
	conf, err := json.Marshal(c)
	require.NoError(w.t, err)
	exe, err := os.Executable()
	require.NoError(w.t, err)
	p := &child{w: w, cmd: exec.Command(exe)}
	p.cmd.Env = append(os.Environ(), childEnv+"="+string(conf))
	p.cmd.Stderr = &p.stderr
	in, err := p.cmd.StdinPipe()
	require.NoError(w.t, err)
	out, err := p.cmd.StdoutPipe()
	require.NoError(w.t, err)
	require.NoError(w.t, p.cmd.Start())
	w.t.Cleanup(func() {
		p.die()
		_ = in.Close()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		p.die()
		require.NoError(w.t, err, "child: %s", p.stderr.String())
	}
	_, err = fmt.Sscan(line, &p.addr, &p.incarnation)
	require.NoError(w.t, err)
	return p
}

// die ends the process at once and waits for its end.
func (c *child) die() {
	c.kill.Do(func() {
		_ = c.cmd.Process.Kill() // fails only if it has ended
		_ = c.cmd.Wait()         // says that it was killed
		if s := c.stderr.String(); strings.Contains(s, "DATA RACE") || strings.Contains(s, "panic:") {
			c.w.t.Errorf("child: %s", s)
		}
	})
}

// dial connects a peer over TCP.
func (c *child) dial() *peer {
	c.w.t.Helper()
	ws, _, err := websocket.DefaultDialer.DialContext(c.w.t.Context(), "ws://"+c.addr+"/ws", nil)
	require.NoError(c.w.t, err)
	p := &peer{t: c.w.t, w: c.w, ws: ws, waiting: make(map[string]chan json.RawMessage), ended: make(chan struct{})}
	var first frame
	require.NoError(c.w.t, ws.ReadJSON(&first))
	require.NoError(c.w.t, json.Unmarshal(first.Payload, &p.id))
	go p.read()
	c.w.t.Cleanup(p.close)
	return p
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
