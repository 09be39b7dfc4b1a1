// Command own-upgrade offers presence and a protocol of the app's own on one WebSocket.
// The app authenticates the client, upgrades the connection itself and passes it to
// mesh.Server.ServeConn. Frames that are not of the Mesh protocol go to a function of the
// app.
//
//	go run ./examples/own-upgrade        # needs a Redis on localhost:6379
//
//	curl -i -d name=Ann http://127.0.0.1:8080/login          # sets a cookie
//	websocat -H 'Cookie: desk=…' ws://127.0.0.1:8080/ws      # or any other client
//	ECHO hello                                               # the app's protocol
//	{"id":1,"command":"mesh/join-room","payload":{"roomName":"lobby"}}
//
// These parts matter most:
//
//   - app.connect in app.go authenticates, upgrades with the app's own Upgrader and its
//     check of the origin, and calls ServeConn. ServeConn owns the socket from there on
//     and returns when the connection has ended.
//   - talk.handle in talk.go is the app's protocol. It answers with
//     Connection.SendMessage. It must not block, because nothing is read from the socket
//     until it returns. It limits the rate itself, because Limits.CommandsPerSecond
//     counts only commands of the Mesh protocol.
//   - passes in pass.go identifies the user. The name becomes the connection's metadata.
//     All members of the room see it, and clients cannot set it.
//   - shutdown in this file ends presence first, then HTTP, then Redis.
//
// Options.AllowedOrigins, Options.Authenticate and Limits.UpgradesPerSecond apply to
// upgrades by mesh. They have no effect here.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/redis/go-redis/v9"
)

// timeout limits the start and the shutdown.
const timeout = 10 * time.Second

// minKey is the shortest key for passes, in bytes.
const minKey = 16

// config holds the settings of an instance.
type config struct {
	redis   *redis.Client
	key     []byte   // signs passes; the same on all instances
	origins []string // of pages that may connect; none: the page's host must be the server's
	log     *slog.Logger
}

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "`host:port` to listen on")
	redisAddr := flag.String("redis", "localhost:6379", "`host:port` of Redis")
	origins := flag.String("origins", "", "comma-separated `list` of the origins of pages, such as https://app.example.com")
	flag.Parse()
	cfg := config{
		redis: redis.NewClient(&redis.Options{Addr: *redisAddr}),
		key:   []byte(os.Getenv("DESK_KEY")),
		log:   slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	if *origins != "" {
		cfg.origins = strings.Split(*origins, ",")
	}
	switch {
	case len(cfg.key) > 0 && len(cfg.key) < minKey: // an attacker could guess it offline, from any pass
		cfg.log.Error("DESK_KEY is too short", "bytes", len(cfg.key), "least", minKey)
		os.Exit(2)
	case len(cfg.key) == 0:
		cfg.log.Info("DESK_KEY is not set: passes are valid until this process ends, on this instance only")
		cfg.key = []byte(rand.Text())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ln, err := net.Listen("tcp", *addr)
	if err == nil {
		err = serve(ctx, cfg, ln)
	}
	if err = errors.Join(err, cfg.redis.Close()); err != nil {
		cfg.log.Error("ended", "error", err)
		os.Exit(1)
	}
}

// serve runs an instance on ln until ctx ends. It leaves the Redis client open.
func serve(ctx context.Context, cfg config, ln net.Listener) error {
	srv, err := mesh.NewServer(mesh.Options{Redis: cfg.redis, Logger: cfg.log})
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	if err := errors.Join(srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}), start(ctx, srv)); err != nil {
		return errors.Join(err, ln.Close())
	}
	hs := &http.Server{
		Handler:           newApp(cfg, srv),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10, // headers are kept for as long as a socket lives
		ErrorLog:          slog.NewLogLogger(cfg.log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- hs.Serve(ln) }()
	cfg.log.Info("ready", "addr", ln.Addr())
	select {
	case <-ctx.Done():
		err = shutdown(ctx, srv, hs)
		<-served // http.ErrServerClosed
	case err = <-served:
		err = errors.Join(err, shutdown(ctx, srv, hs))
	}
	return err
}

// start waits for Redis, with a time limit.
func start(ctx context.Context, srv *mesh.Server) error {
	begin, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := srv.Start(begin)
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		err = errors.Join(err, srv.Shutdown(end))
	}
	return err
}

// shutdown ends the sockets, with code 1012, and then HTTP. In the other order
// http.Server.Shutdown would return with every socket still open, because it does not
// track upgraded connections. ctx has ended.
func shutdown(ctx context.Context, srv *mesh.Server, hs *http.Server) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	err := srv.Shutdown(ctx)
	if httpErr := hs.Shutdown(ctx); httpErr != nil {
		err = errors.Join(err, httpErr, hs.Close())
	}
	return err
}
