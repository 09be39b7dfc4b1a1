package peer

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"regexp"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
)

// MemberConfig configures a member of a group of servers. For options of the library,
// zero means the library's default.
type MemberConfig struct {
	Redis           string // address
	LeaseTTL        time.Duration
	LatencyInterval time.Duration
	Rules           []Rule
	Warn            bool // write the library's warnings to standard error
}

// Rule is a rule for mesh's TrackPresence.
type Rule struct {
	Expr string
	TTL  time.Duration
}

// Member is one of several servers that share a Redis, with the library's defaults except
// as configured.
type Member struct {
	Addr     string // of its /ws, if it has sockets
	Server   *mesh.Server
	Presence *mesh.PresenceManager
	redis    *redis.Client
	web      *http.Server
}

func (cfg MemberConfig) options(client *redis.Client) mesh.Options {
	logger := slog.New(slog.DiscardHandler)
	if cfg.Warn {
		logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	return mesh.Options{
		Logger: logger, Redis: client, LeaseTTL: cfg.LeaseTTL, LatencyInterval: cfg.LatencyInterval,
		Authenticate: func(context.Context, *http.Request) (any, error) { return person, nil },
	}
}

func (cfg MemberConfig) track(do func(mesh.Pattern, mesh.PresenceOptions) error) error {
	for _, r := range cfg.Rules {
		re, err := regexp.Compile(r.Expr)
		if err != nil {
			return err
		}
		if err := do(mesh.Regexp(re), mesh.PresenceOptions{TTL: r.TTL}); err != nil {
			return err
		}
	}
	return nil
}

// NewMember starts a server for sockets, on a free port of the loopback interface.
func NewMember(ctx context.Context, cfg MemberConfig) (*Member, error) {
	client := redis.NewClient(&redis.Options{Addr: cfg.Redis})
	srv, err := mesh.NewServer(cfg.options(client))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(cfg.track(srv.TrackPresence), srv.Start(ctx)); err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, srv.Shutdown(ctx))
	}
	mux := http.NewServeMux()
	mux.Handle("/ws", srv)
	m := &Member{Addr: ln.Addr().String(), Server: srv, Presence: srv.Presence(), redis: client, web: &http.Server{Handler: mux}}
	go func() { _ = m.web.Serve(ln) }() // ends with Stop
	return m, nil
}

// NewBareMember starts a server without sockets, for a transport of its own.
func NewBareMember(ctx context.Context, cfg MemberConfig) (*Member, error) {
	client := redis.NewClient(&redis.Options{Addr: cfg.Redis})
	p, err := mesh.NewPresenceManager(cfg.options(client))
	if err != nil {
		return nil, err
	}
	return &Member{Presence: p, redis: client}, errors.Join(cfg.track(p.TrackPresence), p.Start(ctx))
}

// Stop shuts the member down. A server first drains its sockets evenly over spread.
func (m *Member) Stop(ctx context.Context, spread time.Duration) error {
	if m.Server == nil {
		return errors.Join(m.Presence.Shutdown(ctx), m.redis.Close())
	}
	return errors.Join(m.Server.Drain(ctx, spread), m.Server.Shutdown(ctx), m.web.Shutdown(ctx), m.redis.Close())
}
