// Command whoshere serves a page that shows the people in a room, live: their names, the
// marks of those that type, and their pointers. Each tab is a connection of its own. The page shows the
// tabs of one user as one person.
//
//	go run github.com/meshpresence/mesh/examples/whoshere@latest
//
// Without -redis the program runs a Redis in its own process. With -redis, any number of
// servers share their rooms:
//
//	whoshere -redis redis://localhost:6379 -addr 127.0.0.1:8081
//	whoshere -redis redis://localhost:6379 -addr 127.0.0.1:8082
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

const (
	// startTimeout limits the wait for Redis at the start.
	startTimeout = 10 * time.Second
	// shutdownTimeout limits the shutdown of sockets and requests.
	shutdownTimeout = 10 * time.Second
)

func main() {
	os.Exit(run(os.Args[1:], os.Stderr))
}

// run returns the exit code. It is 2 if the flags are invalid.
func run(args []string, stderr io.Writer) int {
	cfg, err := parseFlags(args, stderr)
	switch {
	case errors.Is(err, errHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "whoshere: %v\nwhoshere -h lists the flags\n", err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // the second signal ends the process at once
	err = serve(ctx, cfg, slog.New(slog.NewTextHandler(stderr, nil)))
	switch {
	case errors.Is(err, mesh.ErrInvalidOptions):
		fmt.Fprintf(stderr, "whoshere: %v\n", err)
		return 2
	case err != nil:
		fmt.Fprintf(stderr, "whoshere: %v\n", err)
		return 1
	}
	return 0
}

// serve runs until ctx ends. It closes everything in reverse order, Redis last, because
// the last leaves are still written to it.
func serve(ctx context.Context, cfg config, logger *slog.Logger) (err error) {
	client, closeRedis, err := openRedis(cfg, logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeRedis()) }()
	srv, err := newServer(cfg, client, logger)
	if err != nil {
		return err
	}
	page, err := newHandler(cfg, srv)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return err
	}
	if err := start(ctx, srv); err != nil {
		return errors.Join(err, ln.Close())
	}
	hs := &http.Server{
		Handler:           page,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10, // the default is a megabyte
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- hs.Serve(ln) }()
	logger.Info("ready", "visit", visitURL(ln.Addr()), "rooms", cfg.track.String())

	select {
	case <-ctx.Done():
		logger.Info("shutting down")
		err = shutdown(ctx, srv, hs)
		<-served // http.ErrServerClosed
		return err
	case err := <-served:
		return errors.Join(err, shutdown(ctx, srv, hs))
	}
}

// start waits for Redis, with a time limit, so that the user learns of a wrong URL.
func start(ctx context.Context, srv *mesh.Server) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	err := srv.Start(ctx)
	if err != nil {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		err = errors.Join(err, srv.Shutdown(stop))
	}
	return err
}

// shutdown ends the presence server with its sockets, and then HTTP. In the other order
// it would not work, because http.Server.Shutdown does not track upgraded connections.
// ctx may have ended. Only its values are used.
func shutdown(ctx context.Context, srv *mesh.Server, hs *http.Server) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	err := srv.Shutdown(ctx)
	if httpErr := hs.Shutdown(ctx); httpErr != nil {
		err = errors.Join(err, httpErr, hs.Close())
	}
	return err
}

// newServer makes the presence server. It tracks every room that -track matches.
func newServer(cfg config, client *redis.Client, logger *slog.Logger) (*mesh.Server, error) {
	opts := mesh.Options{
		Redis:        client,
		Logger:       logger,
		PingInterval: cfg.ping,
		LeaseTTL:     cfg.lease,
		Authenticate: authenticate,
		UserID:       mesh.UserIDField("userId"),
	}
	if cfg.clientMetadata {
		opts.ClientMetadata = acceptPerson
	}
	srv, err := mesh.NewServer(opts)
	if err != nil {
		return nil, err
	}
	return srv, srv.TrackPresence(mesh.Regexp(cfg.track), mesh.PresenceOptions{
		TTL: cfg.ttl, Grace: cfg.grace, MaxUsers: cfg.maxUsers,
	})
}

// openRedis connects to -redis, or starts a Redis in this process. It also returns a
// function that closes it.
func openRedis(cfg config, logger *slog.Logger) (*redis.Client, func() error, error) {
	if cfg.redis != nil {
		client := redis.NewClient(cfg.redis)
		return client, client.Close, nil
	}
	logger.Info("redis runs in this process: its data ends with it, and other servers cannot use it")
	r, err := meshtest.NewRedis()
	if err != nil {
		return nil, nil, fmt.Errorf("start redis: %w", err)
	}
	return r.Client(), r.Close, nil
}

// visitURL returns the URL for a browser. For a listener on all addresses it uses
// localhost.
func visitURL(addr net.Addr) string {
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return "http://" + addr.String() + "/"
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, port) + "/"
}
