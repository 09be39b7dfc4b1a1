package mesh_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// status sends a request without an upgrade to a handler.
func status(s http.Handler) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	s.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "http://127.0.0.1/ws", nil))
	return rec
}

func TestStartWaitsForRedis(t *testing.T) {
	t.Parallel()
	// Not on a cluster, because nodes that were paused replace each other as masters.
	harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
		var log testlog.Logbook
		opts := w.Options()
		opts.Logger = slog.New(&log)
		srv, err := mesh.NewServer(opts)
		require.NoError(t, err)
		require.ErrorIs(t, srv.Ready(t.Context()), mesh.ErrNotStarted)
		require.ErrorIs(t, srv.Connections().SetMetadata(t.Context(), "x", 1, mesh.MetadataOptions{}), mesh.ErrNotStarted)
		rec := status(srv)
		assert.Equal(t, http.StatusServiceUnavailable, rec.Code)
		assert.NotEmpty(t, rec.Header().Get("Retry-After"))

		w.Away()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		begun := time.Now()
		require.ErrorIs(t, srv.Start(ctx), mesh.ErrUnavailable)
		assert.Less(t, time.Since(begun), w.Unhurried(2*time.Second), "bounded by its context")
		require.ErrorIs(t, srv.Ready(t.Context()), mesh.ErrNotStarted)

		started := make(chan error, 1)
		go func() { started <- srv.Start(t.Context()) }()
		w.Sleep(300 * time.Millisecond)
		assert.Equal(t, http.StatusServiceUnavailable, status(srv).Code)
		select {
		case err := <-started:
			require.FailNow(t, "started without Redis", "%v", err)
		default:
		}
		w.Eventually(10*time.Second, func() bool { return log.Told("start waits for redis") > 0 }, "the log says that Start waits for Redis")
		w.Back()
		require.NoError(t, <-started)
		require.NoError(t, srv.Start(t.Context()), "a second Start does nothing")
		require.NoError(t, srv.Ready(t.Context()))
		assert.Equal(t, http.StatusBadRequest, status(srv).Code, "a request without an upgrade")

		require.NoError(t, srv.Shutdown(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
		require.ErrorIs(t, srv.Ready(t.Context()), mesh.ErrClosed)
		require.ErrorIs(t, srv.Start(t.Context()), mesh.ErrClosed)
		assert.Equal(t, http.StatusServiceUnavailable, status(srv).Code)
	})
}

func TestBadOptions(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		for field, o := range map[string]mesh.Options{
			"Redis":             {},
			"Prefix":            {Redis: w.Client(), Prefix: "a{b}"},
			"LeaseTTL":          {Redis: w.Client(), LeaseTTL: time.Millisecond},
			"PingInterval":      {Redis: w.Client(), PingInterval: -1},
			"AllowedOrigins":    {Redis: w.Client(), AllowedOrigins: []string{"https://*"}},
			"Limits.StateBytes": {Redis: w.Client(), Limits: mesh.Limits{StateBytes: 1 << 40}},
		} {
			_, err := mesh.NewServer(o)
			require.ErrorIs(t, err, mesh.ErrInvalidOptions, field)
			assert.ErrorContains(t, err, field)
			_, err = mesh.NewPresenceManager(o)
			require.ErrorIs(t, err, mesh.ErrInvalidOptions, field)
		}
		s := w.Server()
		require.ErrorIs(t, s.TrackPresence(mesh.Pattern{}, mesh.PresenceOptions{}), mesh.ErrInvalidPattern)
		require.ErrorIs(t, s.TrackPresence(mesh.Exact("x"), mesh.PresenceOptions{TTL: time.Millisecond}), mesh.ErrInvalidOptions)
	})
}

func TestTwoPrefixesOnOneRedis(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		a, b := w.Tracked(), w.Tracked(func(o *mesh.Options) { o.Prefix += "other:" })
		pa, pb := a.Dial(), b.Dial()
		pa.Subscribe("lobby")
		pb.Subscribe("lobby")
		assert.Equal(t, []string{pa.ID}, pa.Join("lobby").IDs(t))
		assert.Equal(t, []string{pb.ID}, pb.Join("lobby").IDs(t))
		pa.Expect(time.Second, "join", pa.ID)
		pb.Expect(time.Second, "join", pb.ID)
		require.ErrorIs(t, a.Connections().SetMetadata(t.Context(), pb.ID, 1, mesh.MetadataOptions{}), mesh.ErrUnknownConnection)
		w.Sleep(100 * time.Millisecond)
		assert.Len(t, pa.Got(), 1)
		assert.Len(t, pb.Got(), 1)
	})
}

func TestForeignKeysUnderThePrefix(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		c := w.Client()
		ctx := t.Context()
		under := func(prefix string) store.Keys { return w.KeysUnder(w.KeyPrefix() + prefix) }
		for name, put := range map[string]func() error{
			"a newer format": func() error { return c.Set(ctx, under("newer:").Format(), "99", 0).Err() },
			"no format":      func() error { return c.Set(ctx, under("odd:").Format(), "x", 0).Err() },
			"another type":   func() error { return c.SAdd(ctx, under("type:").Format(), "x").Err() },
			"foreign lists":  func() error { return c.SAdd(ctx, under("foreign:").Instances(), "x").Err() },
			// The keys of the TypeScript server while it runs, and those that it leaves.
			"TypeScript instances":   func() error { return c.SAdd(ctx, w.KeyPrefix()+"ts:instances", "x").Err() },
			"TypeScript connections": func() error { return c.HSet(ctx, w.KeyPrefix()+"ts2:connections", "c", "x").Err() },
			"TypeScript metadata":    func() error { return c.HSet(ctx, w.KeyPrefix()+"ts3:connection-meta", "c", "{}").Err() },
		} {
			require.NoError(t, put(), name)
		}
		for prefix, key := range map[string]string{
			"newer:": "format", "odd:": "format", "type:": "format", "foreign:": "instances",
			"ts:": "instances", "ts2:": "connections", "ts3:": "connection-meta",
		} {
			srv, err := mesh.NewServer(mesh.Options{Redis: c, Prefix: w.KeyPrefix() + prefix})
			require.NoError(t, err)
			begun := time.Now()
			err = srv.Start(ctx)
			require.ErrorIs(t, err, mesh.ErrIncompatible, prefix)
			assert.ErrorContains(t, err, "Prefix", "the error names the option to change")
			assert.Regexp(t, regexp.QuoteMeta(w.KeyPrefix()+prefix)+`\S*`+key+" ", err.Error(), "the error names the key")
			assert.Less(t, time.Since(begun), w.Unhurried(time.Second), "Start does not retry")
			require.NoError(t, srv.Shutdown(ctx))
		}
	})
}

func TestReadyWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, p := w.Tracked(), w.Manager()
		quick := func() {
			t.Helper()
			begun := time.Now()
			require.NoError(t, s.Ready(t.Context()))
			require.NoError(t, p.Ready(t.Context()))
			assert.Zero(t, time.Since(begun), "Ready returns at once")
		}
		quick()
		for _, fault := range []struct{ begin, end func() }{{w.Mem.Cut, w.Mem.Heal}, {w.Mem.Hang, w.Mem.Resume}} {
			fault.begin()
			for range 60 {
				w.Sleep(time.Second)
				quick()
			}
			fault.end()
			w.Sleep(time.Minute)
			quick()
		}
		require.NoError(t, p.Shutdown(t.Context()))
		require.ErrorIs(t, p.Ready(t.Context()), mesh.ErrClosed)
	})
}

func TestReadyHandler(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		srv, err := mesh.NewServer(w.Options())
		require.NoError(t, err)
		probe := func() (int, string) {
			rec := httptest.NewRecorder()
			srv.ReadyHandler().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/readyz", nil))
			return rec.Code, rec.Body.String()
		}
		expect := func(code int, text string) {
			t.Helper()
			gotCode, gotText := probe()
			assert.Equal(t, code, gotCode)
			assert.Equal(t, text, gotText)
		}
		expect(http.StatusServiceUnavailable, mesh.ErrNotStarted.Error()+"\n")
		require.NoError(t, srv.Start(t.Context()))
		expect(http.StatusOK, "ok\n")
		require.NoError(t, srv.Drain(t.Context(), time.Second))
		expect(http.StatusServiceUnavailable, mesh.ErrClosed.Error()+"\n")
		require.NoError(t, srv.Shutdown(t.Context()))
		expect(http.StatusServiceUnavailable, mesh.ErrClosed.Error()+"\n")
	})
}

// TestCountsOfConnections ends requests and connections in many ways, also during a
// shutdown. Each must release its place exactly once.
func TestCountsOfConnections(t *testing.T) {
	t.Parallel()
	hijacks := []func() (net.Conn, error){
		func() (net.Conn, error) { panic("no") },
		func() (net.Conn, error) { panic(http.ErrAbortHandler) },
		func() (net.Conn, error) { return nil, errors.New("no") },
		func() (net.Conn, error) { // closes before the answer is written
			a, b := net.Pipe()
			return a, errors.Join(a.Close(), b.Close())
		},
		func() (net.Conn, error) { // closes after the answer
			a, b := net.Pipe()
			go func() {
				_, _ = b.Read(make([]byte, 4096))
				_ = b.Close()
			}()
			return a, nil
		},
	}
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.Connections, l.UpgradesPerSecond = 20, 1000 }), func(o *mesh.Options) {
			o.HookTimeout = time.Second
			o.Authenticate = func(ctx context.Context, r *http.Request) (any, error) {
				time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
				switch rand.IntN(10) {
				case 0:
					return nil, errors.New("no")
				case 1:
					panic("no")
				case 2:
					time.Sleep(4 * time.Second) // ignores its context
				}
				return nil, nil
			}
		})
		var all sync.WaitGroup
		start := func() {
			all.Go(func() {
				defer func() { _ = recover() }() // as net/http does
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if rand.IntN(4) == 0 {
					time.AfterFunc(5*time.Millisecond, cancel)
				}
				rec := brokenResponse{httptest.NewRecorder(), hijacks[rand.IntN(len(hijacks))]}
				s.ServeHTTP(rec, harness.Handshake(t).WithContext(ctx))
			})
		}
		for range 300 {
			start()
			w.Sleep(time.Duration(rand.IntN(4)) * time.Millisecond)
			places := s.Places()
			open, taken := places[0], places[1]
			require.True(t, 0 <= taken && taken <= 20 && taken <= open, "%d of %d", taken, open)
		}
		all.Wait()
		w.Sleep(30 * time.Second)
		assert.Equal(t, [2]int{}, s.Places())
		assert.Zero(t, s.Authenticating())
		for range 50 {
			start()
		}
		w.Sleep(time.Millisecond)
		require.NoError(t, s.Shutdown(t.Context()))
		all.Wait()
		w.Sleep(30 * time.Second)
		assert.Equal(t, [2]int{}, s.Places())
		assert.Zero(t, s.Authenticating())
	})
}

func TestConnectionsFitFileDescriptors(t *testing.T) {
	t.Parallel()
	const perNode = 20 + 5 + 2 // the pool, the pool of pipelines and the subscriptions
	reserved := func(files int) int { return 64 + files/16 + perNode }
	for name, c := range map[string]struct {
		files, limit int  // open files of the process, and Limits.Connections
		most         int  // number of connections; 0 if Start fails
		warns        bool // whether Start logs a warning
	}{
		"default that fits":               {1 << 20, 0, mesh.DefaultConnections, false},
		"default that does not fit":       {50_000, 0, 50_000 - reserved(50_000), false},
		"few files":                       {1024, 0, 1024 - reserved(1024), true},
		"limit that fits":                 {1024, 500, 500, false},
		"limit that just fits":            {1024, 1024 - reserved(1024), 1024 - reserved(1024), false},
		"limit that does not fit":         {1024, 1025 - reserved(1024), 0, false},
		"default as the limit, few files": {1024, mesh.DefaultConnections, 0, false},
		"no limit":                        {1 << 20, -1, 1<<20 - reserved(1<<20), false},
		"no limit, few files":             {1024, -1, 1024 - reserved(1024), true},
		"hardly any files":                {64, 0, 0, false},
		"unknown files":                   {-1, 0, mesh.DefaultConnections, false},
		"unknown files, limit":            {-1, 2, 2, false},
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

// TestALargePoolLeavesFileDescriptors checks that Start does not fail if the pool of the
// Redis client is larger than the limit of open files. The client only opens the
// connections that it needs.
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

// TestFewFileDescriptorsAreLoggedOnce checks that Start logs the limit of open files
// once, although it retries.
func TestFewFileDescriptorsAreLoggedOnce(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		opts := w.Options()
		var log testlog.Warnings
		opts.Logger = slog.New(&log)
		testhook.SetFiles(&opts, func() (int, bool) { return 1024, true })
		leases := new(harness.DeafToLeases)
		leases.Left.Store(5)
		testhook.SetSeams(&opts, func(s *store.Store) testhook.Seams {
			leases.Store = s
			return testhook.Seams{Local: s, Lease: leases, Hub: s}
		})
		srv, err := mesh.NewServer(opts)
		require.NoError(t, err)
		require.NoError(t, srv.Start(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
		warnings := 0
		for _, text := range log.Texts() {
			if strings.Contains(text, "limit of open files") {
				warnings++
			}
		}
		require.Equal(t, 1, warnings, "%v", log.Texts())
	})
}

// TestRedisAtTheLimitOfFileDescriptors opens more client connections than the process
// has file descriptors. After a restart of Redis, the server must be able to connect to
// it again, and every client must get an answer.
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
