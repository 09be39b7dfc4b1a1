package mesh_test

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

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

func TestConnectionsFitFileDescriptors(t *testing.T) {
	t.Parallel()
	const perNode = 20 + 5 + 2 // the pool, the pipelines, and the subscriptions
	reserved := func(files int) int { return 64 + files/16 + perNode }
	for name, c := range map[string]struct {
		files, limit int // of the process and of the app
		most         int // connections; 0: Start fails
		warns        bool
	}{
		"the default fits":              {1 << 20, 0, mesh.DefaultConnections, false},
		"the default does not fit":      {50_000, 0, 50_000 - reserved(50_000), false},
		"few files":                     {1024, 0, 1024 - reserved(1024), true},
		"a limit that fits":             {1024, 500, 500, false},
		"a limit that just fits":        {1024, 1024 - reserved(1024), 1024 - reserved(1024), false},
		"a limit that does not fit":     {1024, 1025 - reserved(1024), 0, false},
		"the default, set, in few":      {1024, mesh.DefaultConnections, 0, false},
		"no limit":                      {1 << 20, -1, 1<<20 - reserved(1<<20), false},
		"no limit, few files":           {1024, -1, 1024 - reserved(1024), true},
		"hardly any":                    {64, 0, 0, false},
		"unknown":                       {-1, 0, mesh.DefaultConnections, false},
		"unknown, and the app says two": {-1, 2, 2, false},
	} {
		harness.Embedded(t, func(t *testing.T, w *harness.World) {
			redisOptions := w.Mem.Options()
			redisOptions.PoolSize, redisOptions.PipelinePoolSize = 20, 5
			client := redis.NewClient(redisOptions)
			defer func() { _ = client.Close() }()
			var log testlog.Warnings
			opts := mesh.Options{Redis: client, Logger: slog.New(&log), Limits: mesh.Limits{Connections: c.limit}}
			testhook.SetFiles(&opts, func() (int, bool) { return c.files, c.files >= 0 })
			srv, err := mesh.NewServer(opts)
			require.NoError(t, err)
			began := time.Now()
			err = srv.Start(t.Context())
			require.Less(t, time.Since(began), time.Second, name)
			defer func() { require.NoError(t, srv.Shutdown(t.Context())) }()
			if c.most == 0 {
				require.ErrorIs(t, err, mesh.ErrInvalidOptions, name)
				require.ErrorContains(t, err, "ulimit -n", name)
				require.ErrorContains(t, err, fmt.Sprint(c.files), name)
				return
			}
			require.NoError(t, err, name)
			require.Equal(t, c.most, srv.MostConnections(), name)
			require.Equal(t, c.warns, len(log.Texts()) == 1, "%s: %v", name, log.Texts())
			for range c.most {
				require.NoError(t, srv.Enter())
				require.NoError(t, srv.Take())
			}
			require.ErrorIs(t, srv.Take(), mesh.ErrLimit, name)
			for range c.most {
				srv.Leave()
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
		harness.Embedded(t, func(t *testing.T, w *harness.World) {
			redisOptions := w.Mem.Options()
			redisOptions.PoolSize = 10_000
			client := redis.NewClient(redisOptions)
			defer func() { _ = client.Close() }()
			opts := mesh.Options{Redis: client, Limits: mesh.Limits{Connections: limit}}
			testhook.SetFiles(&opts, func() (int, bool) { return 1024, true })
			srv, err := mesh.NewServer(opts)
			require.NoError(t, err)
			require.NoError(t, srv.Start(t.Context()))
			require.NoError(t, srv.Shutdown(t.Context()))
			if limit == 0 {
				require.Equal(t, 1024-64-1024/16-1024/2, srv.MostConnections())
			}
		})
	}
}

// A start that is tried again and again tells of the limit once.
func TestFewFileDescriptorsAreToldOnce(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		opts := w.Options()
		var log testlog.Warnings
		opts.Logger = slog.New(&log)
		testhook.SetFiles(&opts, func() (int, bool) { return 1024, true })
		deaf := new(harness.DeafToLeases)
		deaf.Left.Store(5)
		testhook.SetSeams(&opts, func(s *store.Store) testhook.Seams {
			deaf.Store = s
			return testhook.Seams{Local: s, Lease: deaf, Hub: s}
		})
		srv, err := mesh.NewServer(opts)
		require.NoError(t, err)
		require.NoError(t, srv.Start(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
		told := 0
		for _, text := range log.Texts() {
			if strings.Contains(text, "limit of open files") {
				told++
			}
		}
		require.Equal(t, 1, told, "%v", log.Texts())
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
	w := harness.RealWorld(t)
	c := w.Child(harness.ChildConfig{Lease: 2 * time.Second, Files: 192})
	in := c.Dial()
	in.Join("room")
	answers := make(chan int, clients)
	for range clients {
		conn, err := net.Dial("tcp", c.Addr)
		require.NoError(t, err)
		defer func() { _ = conn.Close() }()
		_, err = fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", c.Addr)
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
	w.Eventually(20*time.Second, answered(20), "clients are answered: %v", got)
	w.Real.Restart(true)
	w.Eventually(20*time.Second, func() bool {
		n, err := w.Client().HLen(t.Context(), w.Keys().Members("room")).Result()
		return err == nil && n == 1
	}, "the member is back")
	in.Join("other")
	w.Eventually(20*time.Second, answered(clients), "clients are answered: %v", got)
	require.Len(t, got, 2, "%v", got)
}
