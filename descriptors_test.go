package mesh

import (
	"bufio"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
)

func TestConnectionsFitFileDescriptors(t *testing.T) {
	t.Parallel()
	const perNode = 20 + 5 + subscriptionConns
	reserved := func(files int) int { return spareFiles + files/spareShare + perNode }
	for name, c := range map[string]struct {
		files, limit int // of the process and of the app
		most         int // connections; 0: Start fails
		warns        bool
	}{
		"the default fits":              {1 << 20, 0, defaultConnections, false},
		"the default does not fit":      {50_000, 0, 50_000 - reserved(50_000), false},
		"few files":                     {1024, 0, 1024 - reserved(1024), true},
		"a limit that fits":             {1024, 500, 500, false},
		"a limit that just fits":        {1024, 1024 - reserved(1024), 1024 - reserved(1024), false},
		"a limit that does not fit":     {1024, 1025 - reserved(1024), 0, false},
		"the default, set, in few":      {1024, defaultConnections, 0, false},
		"no limit":                      {1 << 20, -1, 1<<20 - reserved(1<<20), false},
		"no limit, few files":           {1024, -1, 1024 - reserved(1024), true},
		"hardly any":                    {64, 0, 0, false},
		"unknown":                       {-1, 0, defaultConnections, false},
		"unknown, and the app says two": {-1, 2, 2, false},
	} {
		embedded(t, func(t *testing.T, w *world) {
			redisOptions := w.mem.Options()
			redisOptions.PoolSize, redisOptions.PipelinePoolSize = 20, 5
			client := redis.NewClient(redisOptions)
			defer func() { _ = client.Close() }()
			var log warnings
			srv, err := NewServer(Options{
				Redis: client, Logger: slog.New(&log), Limits: Limits{Connections: c.limit},
				files: func() (int, bool) { return c.files, c.files >= 0 },
			})
			require.NoError(t, err)
			began := time.Now()
			err = srv.Start(t.Context())
			require.Less(t, time.Since(began), time.Second, name)
			defer func() { require.NoError(t, srv.Shutdown(t.Context())) }()
			if c.most == 0 {
				require.ErrorIs(t, err, ErrInvalidOptions, name)
				require.ErrorContains(t, err, "ulimit -n", name)
				require.ErrorContains(t, err, fmt.Sprint(c.files), name)
				return
			}
			require.NoError(t, err, name)
			require.Equal(t, c.most, srv.most, name)
			require.Equal(t, c.warns, len(log.texts()) == 1, "%s: %v", name, log.texts())
			for range c.most {
				require.NoError(t, srv.reserve())
				require.NoError(t, srv.take(false))
			}
			require.ErrorIs(t, srv.take(false), ErrLimit, name)
			for range c.most {
				srv.release(true)
			}
		})
	}
	if runtime.GOOS == "linux" {
		files, known := limit.OpenFiles()
		require.True(t, known)
		require.Positive(t, files)
	}
}

// A client that may have more connections than there are descriptors makes only
// those that it needs: Start does not fail on account of them.
func TestALargePoolLeavesFileDescriptors(t *testing.T) {
	t.Parallel()
	for _, limit := range []int{0, 300} {
		embedded(t, func(t *testing.T, w *world) {
			redisOptions := w.mem.Options()
			redisOptions.PoolSize = 10_000
			client := redis.NewClient(redisOptions)
			defer func() { _ = client.Close() }()
			srv, err := NewServer(Options{
				Redis: client, Limits: Limits{Connections: limit}, files: func() (int, bool) { return 1024, true },
			})
			require.NoError(t, err)
			require.NoError(t, srv.Start(t.Context()))
			require.NoError(t, srv.Shutdown(t.Context()))
			if limit == 0 {
				require.Equal(t, 1024-spareFiles-1024/spareShare-1024/redisShare, srv.most)
			}
		})
	}
}

// A start that is tried again and again tells of the limit once.
func TestFewFileDescriptorsAreToldOnce(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		opts := w.options()
		var log warnings
		opts.Logger = slog.New(&log)
		opts.files = func() (int, bool) { return 1024, true }
		deaf := new(deafToLeases)
		deaf.left.Store(5)
		opts.edge = func(s *store.Store) edge {
			deaf.Store = s
			return edge{owner: s, lease: deaf, hub: s}
		}
		srv, err := NewServer(opts)
		require.NoError(t, err)
		require.NoError(t, srv.Start(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
		told := 0
		for _, text := range log.texts() {
			if strings.Contains(text, "limit of open files") {
				told++
			}
		}
		require.Equal(t, 1, told, "%v", log.texts())
	})
}

// TestRedisAtTheLimitOfFileDescriptors: more clients come, and stay, than the
// process has file descriptors for. When Redis restarts, the server connects to
// it again, and no client is left without an answer.
func TestRedisAtTheLimitOfFileDescriptors(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("there is no such limit")
	}
	const clients = 250
	w := realWorld(t)
	c := w.child(childConfig{Lease: 2 * time.Second, Files: 192})
	in := c.dial()
	in.join("room")
	answers := make(chan int, clients)
	for range clients {
		conn, err := net.Dial("tcp", c.addr)
		require.NoError(t, err)
		defer func() { _ = conn.Close() }()
		_, err = fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", c.addr)
		require.NoError(t, err)
		go func() { // ends with the connection
			if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
				answers <- resp.StatusCode
			}
		}()
	}
	got := make(map[int]int)
	answered := func(n int) func() bool {
		return func() bool {
			for len(answers) > 0 {
				got[<-answers]++
			}
			return got[http.StatusSwitchingProtocols]+got[http.StatusServiceUnavailable] >= n
		}
	}
	w.eventually(20*time.Second, answered(20), "clients are answered: %v", got)
	w.real.Restart(true)
	w.eventually(20*time.Second, func() bool {
		n, err := w.client().HLen(t.Context(), w.keys().Members("room")).Result()
		return err == nil && n == 1
	}, "the member is back")
	in.join("other")
	w.eventually(20*time.Second, answered(clients), "clients are answered: %v", got)
	require.Len(t, got, 2, "%v", got)
}
