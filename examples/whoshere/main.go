// Command whoshere serves a page that shows who is in a room, live: names, who
// is typing, where everybody's pointer is. Each tab is a connection of its own;
// the page shows the tabs of one user as one.
//
//	go run github.com/meshpresence/mesh/examples/whoshere@latest
//
// Without -redis it runs a Redis of its own, in this process. With it, any
// number of these share their rooms:
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
	// startTimeout is how long Redis may take to answer.
	startTimeout = 10 * time.Second
	// shutdownTimeout is how long sockets and requests get to end in peace.
	shutdownTimeout = 10 * time.Second
)

func main() {
	os.Exit(run(os.Args[1:], os.Stderr))
}

// run returns the exit status: 2 for flags that cannot be.
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

// serve runs until ctx ends. What it opens it closes in reverse order, Redis
// last: the leaves of those who were here are still written to it.
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

// start waits for Redis, but not for ever: whoever typed the command should
// learn of a wrong URL.
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

// shutdown ends the presence server, sockets and all, then HTTP: the other way
// round does not work, since http.Server.Shutdown knows nothing of the sockets
// that were taken from it. ctx may have ended; only its values are used.
func shutdown(ctx context.Context, srv *mesh.Server, hs *http.Server) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	err := srv.Shutdown(ctx)
	if httpErr := hs.Shutdown(ctx); httpErr != nil {
		err = errors.Join(err, httpErr, hs.Close())
	}
	return err
}

// newServer makes the presence server: every room that -track matches.
func newServer(cfg config, client *redis.Client, logger *slog.Logger) (*mesh.Server, error) {
	opts := mesh.Options{
		Redis:        client,
		Logger:       logger,
		PingInterval: cfg.ping,
		LeaseTTL:     cfg.lease,
		Authenticate: authenticate,
	}
	if cfg.clientMetadata {
		opts.ClientMetadata = acceptPerson
	}
	srv, err := mesh.NewServer(opts)
	if err != nil {
		return nil, err
	}
	return srv, srv.TrackPresence(mesh.Regexp(cfg.track), mesh.PresenceOptions{TTL: cfg.ttl})
}

// openRedis connects to -redis, or starts one in this process. The function it
// returns closes what it opened.
func openRedis(cfg config, logger *slog.Logger) (*redis.Client, func() error, error) {
	if cfg.redis != nil {
		client := redis.NewClient(cfg.redis)
		return client, client.Close, nil
	}
	logger.Info("redis runs in this process: nothing is kept, and nobody else sees it")
	r, err := meshtest.NewRedis()
	if err != nil {
		return nil, nil, fmt.Errorf("start redis: %w", err)
	}
	return r.Client(), r.Close, nil
}

// visitURL is what to type into a browser: an address that listens everywhere
// is visited as localhost.
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
