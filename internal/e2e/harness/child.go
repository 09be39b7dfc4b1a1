package harness

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// Child is a server in another process.
type Child struct {
	t           testing.TB
	w           *World // the world of its peers, or nil
	Cmd         *exec.Cmd
	ended       <-chan struct{}
	Addr        string
	Incarnation string // the first one
	stderr      bytes.Buffer
	kill        sync.Once
}

// Child starts a server process, and kills it at the end of the test.
func (w *World) Child(c ChildConfig) *Child {
	w.T.Helper()
	c.Prefix = w.KeyPrefix()
	switch {
	case w.Watched != nil:
		c.Master, c.Asked = w.Watched.MasterName(), w.Watched.Addrs()
	case w.Cluster != nil:
		c.Nodes = w.Cluster.Addrs()
	case w.URL != "":
		c.URL, c.CA = w.URL, w.CA
	case c.Redis == "":
		c.Redis = w.Real.Addr()
	}
	p := StartChild(w.T, c)
	p.w = w
	return p
}

func StartChild(t testing.TB, c ChildConfig) *Child {
	t.Helper()
	conf, err := json.Marshal(c)
	require.NoError(t, err)
	exe, err := os.Executable()
	require.NoError(t, err)
	p := &Child{t: t, Cmd: exec.Command(exe)}
	p.Cmd.Env = append(os.Environ(), childEnv+"="+string(conf))
	p.Cmd.Stderr = &p.stderr
	in, err := p.Cmd.StdinPipe()
	require.NoError(t, err)
	out, err := p.Cmd.StdoutPipe()
	require.NoError(t, err)
	p.ended, err = redistest.StartTied(p.Cmd) // ends with its parent even if it is paused
	require.NoError(t, err)
	t.Cleanup(func() {
		p.Die()
		_ = in.Close()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		p.Die()
		require.NoError(t, err, "child: %s", p.stderr.String())
	}
	_, err = fmt.Sscan(line, &p.Addr, &p.Incarnation)
	require.NoError(t, err)
	return p
}

// Die ends the process at once and waits for its end.
func (c *Child) Die() {
	c.kill.Do(func() {
		_ = c.Cmd.Process.Kill() // fails only if it has ended
		<-c.ended
		c.inspect()
	})
}

// inspect fails the test if the process reported a race or a panic.
func (c *Child) inspect() {
	if s := c.stderr.String(); strings.Contains(s, "DATA RACE") || strings.Contains(s, "panic:") {
		c.t.Errorf("child: %s", s)
	}
}

// Stop makes the server shut down, and waits for the end of the process.
func (c *Child) Stop() error {
	err := errors.New("the process has already ended")
	c.kill.Do(func() {
		if err = c.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return
		}
		<-c.ended
		if s := c.Cmd.ProcessState; !s.Success() {
			err = errors.New(s.String())
		}
		c.inspect()
	})
	return err
}

// Interruptions returns how often the server was interrupted.
func (c *Child) Interruptions() (l Interruptions, err error) {
	once := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := once.Get("http://" + c.Addr + "/interruptions")
	if err != nil {
		return l, err
	}
	defer func() { _ = resp.Body.Close() }()
	return l, json.NewDecoder(resp.Body).Decode(&l)
}

// Dial connects a peer over TCP.
func (c *Child) Dial() *Peer {
	c.w.T.Helper()
	p, err := c.TryDial()
	require.NoError(c.w.T, err)
	return p
}

func (c *Child) TryDial() (*Peer, error) {
	c.w.T.Helper()
	return c.w.dial("ws://"+c.Addr+"/ws", meshtest.WithLevel(2))
}

// TryDialAs connects a peer of a user. It may be called on any goroutine.
func (c *Child) TryDialAs(user string) (*Peer, error) {
	c.w.T.Helper()
	return c.w.dial("ws://"+c.Addr+"/ws?user="+user, meshtest.WithLevel(2))
}
