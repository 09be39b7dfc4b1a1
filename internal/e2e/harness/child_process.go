package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
)

// childEnv makes the test binary run as a server, in a process that can be killed and
// paused. It holds a ChildConfig as JSON.
const childEnv = "MESH_TEST_CHILD"

type ChildConfig struct {
	Redis  string        // address; empty: the world's
	Master string        // name of the master, if sentinels know its address
	Asked  []string      // addresses of the sentinels
	Nodes  []string      // addresses of the nodes of a cluster
	URL    string        // address with a user and TLS
	CA     string        // file of the authority that signed the certificate
	Prefix string        // Options.Prefix
	Lease  time.Duration // Options.LeaseTTL
	TTL    time.Duration // TTL of every room
	Timed  time.Duration // TTL of RoomTimed; 0: that of every room
	Events bool          // Options.EnablePresenceExpirationEvents
	Users  bool          // connections belong to users, as with WithUsers
	Grace  time.Duration // Grace of every room except RoomPlain
	Drain  time.Duration // on SIGTERM, the server drains for that time before it shuts down

	Limits   mesh.Limits
	Ping     time.Duration // Options.PingInterval
	Write    time.Duration // Options.WriteTimeout
	Metadata bool          // clients may set their metadata
	Header   time.Duration // http.Server.ReadHeaderTimeout
	Buffer   int           // send buffer of sockets; 0: the default
	Gauged   bool          // serves its use of memory at /gauge
	Files    int           // limit of open files; 0: the default
}

// runChild serves until the parent process closes standard input or ends. It returns the
// exit code.
func runChild(conf string) int {
	if err := serveChild(conf); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func serveChild(conf string) error {
	var c ChildConfig
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
	var log Stalls
	opts := mesh.Options{
		Redis: client, Prefix: c.Prefix, LeaseTTL: c.Lease, EnablePresenceExpirationEvents: &c.Events, LatencyInterval: -1,
		Logger: slog.New(&log), Limits: c.Limits, PingInterval: c.Ping, WriteTimeout: c.Write,
	}
	if c.Metadata {
		AllowMetadata(&opts)
	}
	if c.Users {
		WithUsers(&opts)
	}
	srv, err := mesh.NewServer(opts)
	if err != nil {
		return err
	}
	if err := srv.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{TTL: c.TTL, Grace: c.Grace}); err != nil {
		return err
	}
	if err := TrackTimed(srv, c.Timed); err != nil {
		return err
	}
	if c.Grace > 0 {
		if err := srv.TrackPresence(mesh.Exact(RoomPlain), mesh.PresenceOptions{TTL: c.TTL}); err != nil {
			return err
		}
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
	mux.HandleFunc("/interruptions", func(rw http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(rw).Encode(Interruptions{Reregistered: srv.Stats().Reregistered, Stalled: log.N.Load()})
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
		ctx, cancel := context.WithTimeout(context.Background(), c.Drain+10*time.Second)
		defer cancel()
		if c.Drain > 0 {
			if err := srv.Drain(ctx, c.Drain); err != nil {
				return err
			}
		}
		return srv.Shutdown(ctx)
	}
}

const (
	// RoomTimed is a room with a TTL of its own.
	RoomTimed = "timed"
	// RoomPlain is a room without Grace, of a server whose other rooms may have it.
	RoomPlain = "plain"
)

// TrackTimed gives RoomTimed a TTL.
func TrackTimed(s *mesh.Server, ttl time.Duration) error {
	if ttl == 0 {
		return nil
	}
	return s.TrackPresence(mesh.Exact(RoomTimed), mesh.PresenceOptions{TTL: ttl})
}

// Interruptions counts the interruptions of a server.
type Interruptions struct {
	Reregistered uint64 // Stats.Reregistered
	Stalled      int64  // log lines about a process that stood still past its lease
}

// Stalls is a slog.Handler that counts the log lines for Interruptions.Stalled.
type Stalls struct{ N atomic.Int64 }

func (s *Stalls) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

func (s *Stalls) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, "process stood still past its lease") {
		s.N.Add(1)
	}
	return nil
}

func (s *Stalls) WithAttrs([]slog.Attr) slog.Handler { return s }

func (s *Stalls) WithGroup(string) slog.Handler { return s }
