package redistest

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// once returns a client that tries everything once and obeys its context.
func once(t *testing.T, addr string) *redis.Client {
	t.Helper()
	c := redis.NewClient(&redis.Options{
		Addr: addr, MaxRetries: -1, DialerRetries: 1, ContextTimeoutEnabled: true,
	})
	t.Cleanup(func() { _ = c.Close() }) // some tests have closed it
	return c
}

// soon returns a context for calls that must not be answered.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// unanswered requires that the call timed out.
func unanswered(t *testing.T, err error, msg ...any) {
	t.Helper()
	var timeout interface{ Timeout() bool }
	require.ErrorAs(t, err, &timeout, msg...)
	require.True(t, timeout.Timeout(), msg...)
}

func runID(t *testing.T, c *redis.Client) string {
	t.Helper()
	info, err := c.Info(t.Context(), "server").Result()
	require.NoError(t, err)
	_, rest, ok := strings.Cut(info, "run_id:")
	require.True(t, ok)
	id, _, _ := strings.Cut(rest, "\r\n")
	return id
}

func TestServersAreSeparate(t *testing.T) {
	t.Parallel()
	a, b := Start(t), Start(t, Args("--notify-keyspace-events", "Ex"))
	require.True(t, Available())
	require.NotEqual(t, a.Addr(), b.Addr())
	require.NoError(t, a.Client(t).Set(t.Context(), "k", "a", 0).Err())
	require.Equal(t, int64(0), b.Client(t).Exists(t.Context(), "k").Val())
	got, err := b.Client(t).ConfigGet(t.Context(), "notify-keyspace-events").Result()
	require.NoError(t, err)
	require.ElementsMatch(t, []byte("xE"), []byte(got["notify-keyspace-events"]), "in the order of its version")
}

func TestRestart(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		opts  []Option
		stop  bool
		empty bool
		keeps bool
	}{
		"nothing saved":       {},
		"AOF":                 {opts: []Option{WithAOF()}, keeps: true},
		"AOF deleted":         {opts: []Option{WithAOF()}, empty: true},
		"RDB, killed unsaved": {opts: []Option{WithRDB()}},
		"RDB, stopped":        {opts: []Option{WithRDB()}, stop: true, keeps: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := Start(t, tc.opts...)
			c, addr := s.Client(t), s.Addr()
			require.NoError(t, c.Set(t.Context(), "k", "v", 0).Err())
			id := runID(t, c)
			if tc.stop {
				s.Stop()
				require.Error(t, once(t, addr).Ping(t.Context()).Err())
			}
			s.Restart(tc.empty)
			require.Equal(t, addr, s.Addr())
			require.NotEqual(t, id, runID(t, c))
			require.Equal(t, tc.keeps, c.Exists(t.Context(), "k").Val() == 1)
		})
	}
}

func TestRestartFrom(t *testing.T) {
	t.Parallel()
	s := Start(t, WithRDB(), WithAOF())
	c := s.Client(t)
	has := func() (n int64) { return c.Exists(t.Context(), "saved", "later").Val() }
	for range 2 {
		require.NoError(t, c.Set(t.Context(), "saved", "v", 0).Err())
		require.NoError(t, c.Save(t.Context()).Err())
		require.NoError(t, c.Set(t.Context(), "later", "v", 0).Err())
		s.RestartFrom(EveryWrite)
		require.EqualValues(t, 2, has())
		s.RestartFrom(LastSave)
		require.EqualValues(t, 1, has())
		require.NoError(t, c.Set(t.Context(), "later", "v", 0).Err())
		s.RestartFrom(EveryWrite)
		require.EqualValues(t, 2, has(), "there is a new append-only file")
		s.RestartFrom(Nothing)
		require.Zero(t, has())
	}
}

func TestKill(t *testing.T) {
	t.Parallel()
	s := Start(t)
	c := once(t, s.Addr())
	require.NoError(t, c.Ping(t.Context()).Err())
	s.Pause()
	s.Kill() // also ends a paused one
	s.Kill()
	require.Error(t, c.Ping(t.Context()).Err())
	s.Restart(false)
	require.NoError(t, once(t, s.Addr()).Ping(t.Context()).Err())
}

func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	s := Start(t)
	c := once(t, s.Addr())
	require.NoError(t, c.Ping(t.Context()).Err())
	s.Pause()
	unanswered(t, c.Incr(soon(t), "n").Err())
	s.Resume()
	require.Eventually(t, func() bool {
		return s.Client(t).Get(t.Context(), "n").Val() == "1" // it ran, without an answer
	}, 2*time.Minute, 5*time.Millisecond)
}

func TestPortOfAnotherProcess(t *testing.T) {
	t.Parallel()
	s := Start(t)
	require.NoError(t, probe(s.Addr(), s.proc.pid()))
	other := &Server{t: t, path: s.path, dir: t.TempDir(), port: s.port}
	require.ErrorIs(t, other.launch(), errEnded, "another process answers there")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, l.Close()) }()
	other.port = l.Addr().(*net.TCPAddr).Port
	require.ErrorIs(t, other.launch(), errEnded)
}

func TestFill(t *testing.T) {
	t.Parallel()
	s := Start(t)
	c := s.Client(t)
	require.NoError(t, Fill(t.Context(), c, 2*fillBatch+1))
	info, err := c.Info(t.Context(), "keyspace").Result()
	require.NoError(t, err)
	require.Contains(t, info, fmt.Sprintf("db0:keys=%d,expires=%d", 2*fillBatch+1, 2*fillBatch+1))
	s.Kill()
	require.Error(t, Fill(t.Context(), once(t, s.Addr()), 1))
}

// Without a binary tests are skipped, or fail if Redis is required. Both end a test, so
// they run in a process of their own.
func TestNoBinary(t *testing.T) {
	t.Parallel()
	if os.Getenv("REDISTEST_CHILD") == "1" {
		Start(t)
		t.Fatal("started")
	}
	for required, want := range map[string]string{"": "--- SKIP", "1": "--- FAIL"} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestNoBinary$", "-test.v", "-test.short=false")
		cmd.Env = append(os.Environ(), "REDISTEST_CHILD=1",
			"MESH_REDIS_SERVER=no-such-server", "MESH_REQUIRE_REDIS="+required)
		out, _ := cmd.CombinedOutput() // the exit code of a failed test is an error
		require.Contains(t, string(out), want)
		require.NotContains(t, string(out), "started")
		require.Contains(t, string(out), "no-such-server")
	}
}

// With -short a real server is never started, even if one is required.
func TestShortStartsNoServer(t *testing.T) {
	t.Parallel()
	if os.Getenv("REDISTEST_CHILD") == "1" {
		Start(t)
		t.Fatal("started")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestShortStartsNoServer$", "-test.v", "-test.short")
	cmd.Env = append(os.Environ(), "REDISTEST_CHILD=1", "MESH_REQUIRE_REDIS=1")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "left out by -short")
}

func TestRestartWaitsForLoading(t *testing.T) {
	t.Parallel()
	s := Start(t, WithRDB(), Args("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"))
	c := s.Client(t)
	require.NoError(t, Fill(t.Context(), c, 300))
	s.Stop()
	s.Restart(false)
	require.EqualValues(t, 300, once(t, s.Addr()).DBSize(t.Context()).Val(), "answered at once")
}

func TestTLSAndUsers(t *testing.T) {
	t.Parallel()
	s := Start(t, WithTLS(), WithUser("poor on >secret ~mine:* +get +ping"))
	dial := func(url string) *redis.Client {
		opts, err := redis.ParseURL(url)
		require.NoError(t, err)
		opts.TLSConfig, opts.MaxRetries, opts.DialerRetries = s.TLS(), -1, 1
		return closed(t, redis.NewClient(opts))
	}
	for range 2 {
		poor := dial(s.URL("poor", "secret"))
		require.NoError(t, poor.Ping(t.Context()).Err())
		require.ErrorIs(t, poor.Get(t.Context(), "mine:k").Err(), redis.Nil)
		require.True(t, redis.IsPermissionError(poor.Get(t.Context(), "k").Err()))
		require.True(t, redis.IsAuthError(dial(s.URL("poor", "guess")).Ping(t.Context()).Err()))
		stranger := closed(t, redis.NewClient(&redis.Options{Addr: s.TLSAddr(), TLSConfig: &tls.Config{}, MaxRetries: -1, DialerRetries: 1}))
		require.ErrorContains(t, stranger.Ping(t.Context()).Err(), "certificate", "a client without the authority does not trust it")
		s.Restart(true)
	}
}
