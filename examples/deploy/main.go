// Command deploy is a presence server in the form in which you would deploy it. It reads
// its settings from the environment, answers probes, and shuts down without an outage for
// clients. The file deployment.yaml in this directory runs it on Kubernetes. settings.go
// lists the environment variables.
//
//	REDIS_URL=redis://localhost:6379 go run ./examples/deploy
package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"

	"github.com/meshpresence/mesh"
)

func main() {
	logger := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	cfg, err := settingsFrom(os.Getenv)
	if err != nil {
		logger.Error("settings", "error", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // the second signal ends the process at once
	if err := run(ctx, cfg, logger); err != nil {
		logger.Error("ended", "error", err)
		os.Exit(1)
	}
}

// run serves until ctx ends. It listens before it has reached Redis, so that the probes
// can report what it waits for.
func run(ctx context.Context, cfg settings, logger *slog.Logger) (err error) {
	client := cfg.redis()
	defer func() { err = errors.Join(err, client.Close()) }() // last, because leaves are still written to it
	srv, err := mesh.NewServer(mesh.Options{
		Redis:          client,
		AllowedOrigins: cfg.origins,
		Logger:         logger,
		// An app adds Authenticate and guards here.
	})
	if err != nil {
		return err
	}
	if err := srv.TrackPresence(mesh.Regexp(regexp.MustCompile(`.`)), mesh.PresenceOptions{TTL: time.Minute}); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", cfg.listen)
	if err != nil {
		return err
	}
	web := &http.Server{
		Handler:           handler(srv),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10, // the default is a megabyte
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { // ends when web is shut down, at the end of stop
		defer close(served)
		served <- web.Serve(ln)
	}()
	logger.Info("listening", "addr", ln.Addr().String(), "stopsWithin", cfg.stopTime().String())

	// This waits until Redis answers. The readiness probe fails until then.
	err = srv.Start(ctx)
	switch {
	case ctx.Err() != nil: // stopped before it was ready
		err = nil
	case err == nil:
		logger.Info("ready")
		select {
		case <-ctx.Done():
		case err = <-served:
		}
	}
	err = errors.Join(err, stop(cfg, srv, web, logger))
	<-served
	return err
}

// handler mounts the socket and the probes. Neither probe depends on Redis. Sockets stay
// open while Redis is away, and otherwise all pods would fail their probes at once.
func handler(srv *mesh.Server) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/ws", srv)
	mux.Handle("/readyz", srv.ReadyHandler())
	mux.HandleFunc("/livez", func(http.ResponseWriter, *http.Request) {}) // 200 as long as the process answers
	return mux
}

// stop shuts everything down in an order that loses nothing. First it closes the sockets,
// while the probes still answer and Redis still accepts leaves. Then it ends the rest of
// presence, and then HTTP. It uses deadlines of its own, because the signal has ended the
// context. They add up to cfg.stopTime at most.
func stop(cfg settings, srv *mesh.Server, web *http.Server, logger *slog.Logger) error {
	logger.Info("draining", "spread", cfg.spread.String())
	ctx, cancel := context.WithTimeout(context.Background(), cfg.spread+cutOff)
	defer cancel()
	if err := srv.Drain(ctx, cfg.spread); err != nil && !errors.Is(err, mesh.ErrNotStarted) {
		logger.Warn("not drained", "error", err) // Shutdown closes the remaining sockets
	}
	logger.Info("shutting down")
	ctx, cancel = context.WithTimeout(context.Background(), cfg.shutdown)
	defer cancel()
	err := srv.Shutdown(ctx)
	if httpErr := web.Shutdown(ctx); httpErr != nil {
		err = errors.Join(err, httpErr, web.Close())
	}
	return err
}
