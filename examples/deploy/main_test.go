package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

var web = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Minute}

// built is the directory for the program. It is removed after the tests.
var built string

// binary builds the program as it is deployed and returns its path.
var binary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(built, "deploy")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	var err error
	if built, err = os.MkdirTemp("", "deploy"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(built)
	os.Exit(code)
}

// long skips a test of the whole program if -short is set.
func long(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("left out by -short: builds the program")
	}
}

// pod is the program in a process of its own.
type pod struct {
	t     *testing.T
	cmd   *exec.Cmd
	addr  string
	ended <-chan struct{}
	lines chan string // lines of its log
}

func startPod(t *testing.T, env ...string) *pod {
	t.Helper()
	long(t)
	path, err := binary()
	require.NoError(t, err)
	p := &pod{t: t, cmd: exec.Command(path), lines: make(chan string, 1000)}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Env = append(p.cmd.Env, "LISTEN_ADDR=127.0.0.1:0")
	logs, out, err := os.Pipe()
	require.NoError(t, err)
	p.cmd.Stderr = out
	p.ended, err = redistest.StartTied(p.cmd)
	require.NoError(t, out.Close())
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // fails if it has ended, which is expected
		<-p.ended
		for range p.lines {
		}
		_ = logs.Close()
	})
	go func() { // ends with the child
		defer close(p.lines)
		for s := bufio.NewScanner(logs); s.Scan(); {
			p.lines <- s.Text()
		}
	}()
	p.addr = p.awaitLog(regexp.MustCompile(`"msg":"listening","addr":"([^"]+)"`))
	return p
}

// awaitLog waits for a log line that matches a pattern, and returns its last group.
func (p *pod) awaitLog(pattern *regexp.Regexp) string {
	p.t.Helper()
	for line := range p.lines {
		if m := pattern.FindStringSubmatch(line); m != nil {
			return m[len(m)-1]
		}
	}
	require.FailNow(p.t, "it ended without the log line "+pattern.String())
	return ""
}

// probe returns the status and text of an answer, or 0 if there is none.
func (p *pod) probe(path string) (int, string) {
	resp, err := web.Get("http://" + p.addr + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, strings.TrimSpace(string(body))
}

func (p *pod) awaitProbe(code int) string {
	p.t.Helper()
	var text string
	require.Eventually(p.t, func() bool {
		var got int
		got, text = p.probe("/readyz")
		return got == code
	}, 2*time.Minute, 10*time.Millisecond)
	return text
}

func (p *pod) url() string { return "ws://" + p.addr + "/ws" }

// exits waits for the end of the process and returns its exit code.
func (p *pod) exits() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		require.FailNow(p.t, "the process has not ended")
	}
	return p.cmd.ProcessState.ExitCode()
}

// present counts the joins and leaves in a room.
func present(t *testing.T, r *meshtest.Redis, room string) (joined, left func() int, p *mesh.PresenceManager) {
	t.Helper()
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: r.Client()})
	require.NoError(t, err)
	require.NoError(t, p.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{}))
	require.NoError(t, p.Start(t.Context()))
	var mu sync.Mutex
	counts := map[mesh.EventType]int{}
	ctx, cancel := context.WithCancel(t.Context())
	var following sync.WaitGroup
	following.Go(func() {
		for e, err := range p.Subscribe(ctx, room, mesh.SubscribeOptions{}) {
			if err != nil {
				return
			}
			mu.Lock()
			counts[e.Type]++
			mu.Unlock()
		}
	})
	t.Cleanup(func() {
		cancel()
		following.Wait()
	})
	of := func(kind mesh.EventType) func() int {
		return func() int {
			mu.Lock()
			defer mu.Unlock()
			return counts[kind]
		}
	}
	require.Eventually(t, func() bool { return of(mesh.EventSnapshot)() == 1 }, 2*time.Minute, 5*time.Millisecond)
	return of(mesh.EventJoin), of(mesh.EventLeave), p
}

func TestDeploy(t *testing.T) {
	t.Parallel()
	const sockets, spread = 30, 4 * time.Second
	r := meshtest.StartRedis(t, meshtest.WithAddr("127.0.0.1:0"))
	joined, left, manager := present(t, r, "lobby")
	p := startPod(t, "REDIS_URL=redis://"+r.Addr(), "DRAIN_SPREAD="+spread.String())
	assert.Equal(t, "ok", p.awaitProbe(http.StatusOK))

	ends := make(chan time.Time, sockets)
	var reading sync.WaitGroup
	for range sockets {
		c := meshtest.Connect(t, p.url(), meshtest.WithTimeout(2*time.Minute))
		c.Join("lobby")
		reading.Go(func() {
			<-c.Done()
			ends <- time.Now()
			assert.Equal(t, websocket.CloseServiceRestart, c.AwaitClose().Code)
		})
	}
	require.Eventually(t, func() bool { return joined() == sockets }, 2*time.Minute, 5*time.Millisecond)

	begun := time.Now()
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
	assert.Contains(t, p.awaitProbe(http.StatusServiceUnavailable), "closed")
	assert.Less(t, len(ends), sockets, "before the sockets")
	_, err := meshtest.Dial(p.url())
	refused, ok := errors.AsType[*meshtest.HandshakeError](err)
	require.True(t, ok, "%v", err)
	assert.Equal(t, http.StatusServiceUnavailable, refused.Status)
	assert.NotEmpty(t, refused.Header.Get("Retry-After"))
	code, _ := p.probe("/livez")
	assert.Equal(t, http.StatusOK, code, "the process lives")

	reading.Wait()
	close(ends)
	var at []time.Duration
	for end := range ends {
		at = append(at, end.Sub(begun))
	}
	slices.Sort(at)
	for i, d := range at { // none is early, even on a slow machine
		turn := spread * time.Duration(i+1) / (sockets + 1)
		assert.GreaterOrEqual(t, d, turn-time.Millisecond, "socket %d", i)
	}
	assert.Zero(t, p.exits())
	assert.Equal(t, sockets, left(), "one leave each")

	require.NoError(t, manager.Shutdown(t.Context()))
	client := r.Client()
	defer client.Close()
	keys, err := client.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	require.NotEmpty(t, keys)
	for _, key := range keys {
		ttl, err := client.TTL(t.Context(), key).Result()
		require.NoError(t, err)
		assert.True(t, ttl > 0 || key == "mesh:format", "%s has no TTL", key)
	}
}

// Without Redis the program waits and says so. It still ends on a signal.
func TestDeployWithoutRedis(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t, meshtest.WithAddr("127.0.0.1:0"))
	r.Hang()
	defer r.Resume()
	p := startPod(t, "REDIS_URL=redis://"+r.Addr())
	assert.Contains(t, p.awaitProbe(http.StatusServiceUnavailable), "not started")
	code, _ := p.probe("/livez")
	assert.Equal(t, http.StatusOK, code)
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
	assert.Zero(t, p.exits())
}

func TestDeployWithBadSettings(t *testing.T) {
	t.Parallel()
	long(t)
	path, err := binary()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), path)
	cmd.Env = []string{"REDIS_URL=http://:secret@localhost", "DRAIN_SPREAD=-1s"}
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	assert.Equal(t, 2, cmd.ProcessState.ExitCode())
	assert.Contains(t, string(out), "REDIS_URL")
	assert.Contains(t, string(out), "DRAIN_SPREAD")
	assert.NotContains(t, string(out), "secret")
}
