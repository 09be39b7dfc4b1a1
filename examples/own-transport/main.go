// Command own-transport offers presence without WebSockets. A page receives the members
// of a room as Server-Sent Events, and sends its actions with POST. The program uses a
// mesh.PresenceManager alone.
//
//	go run ./examples/own-transport        # needs a Redis on localhost:6379; open http://127.0.0.1:8080
//
//	curl -N 'http://127.0.0.1:8080/events?room=lobby&name=Ann'
//	curl -X POST -H 'Authorization: Bearer TOKEN' http://127.0.0.1:8080/join
//	curl -d '{"typing":true}' -H 'Authorization: Bearer TOKEN' http://127.0.0.1:8080/state
//
// These parts matter most:
//
//   - app.events in events.go is the life of a connection: Connect, then the events of
//     PresenceManager.Subscribe as they come, then Disconnect when the request ends.
//   - app.post in posts.go checks the sender of a request. The connection's id is visible
//     to all members of the room, so it is not a secret. Therefore the stream begins with
//     a token that only its reader learns, and every POST must carry it.
//   - app.ping in events.go keeps connections alive. A successful write only means that
//     the kernel or a proxy has accepted the data. If a client has vanished, writes still
//     succeed for many minutes. So the server sends pings, the page answers each with a
//     POST, and the answer calls Touch. The rule's TTL ends entries of clients that do
//     not answer. If a write fails or takes too long, the stream ends at once.
//   - stream in stream.go writes one event after the other, each with a deadline.
//   - shutdown in this file ends the streams first, because http.Server.Shutdown waits
//     for them.
//
// With several instances, a POST must reach the instance that has the stream, for example
// with sticky sessions, or with the instance's own address in the first event. Only the
// server that a connection is connected to writes its entries. Serve the streams over
// HTTP/2 (TLS), because browsers open at most six HTTP/1.1 connections to a host.
package main

import (
	"context"
	"errors"
	"flag"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/redis/go-redis/v9"
)

// timeout limits the start, and each step of the shutdown.
const timeout = 10 * time.Second

// config holds the settings of an instance.
type config struct {
	redis   *redis.Client
	ping    time.Duration // between two pings
	ttl     time.Duration // entries of connections that do not answer end after this time; a few pings
	write   time.Duration // time limit for writing an event
	streams int           // at most
	log     *slog.Logger
}

// rooms matches the names of all rooms.
var rooms = mesh.Regexp(regexp.MustCompile(`^[a-z0-9-]{1,40}$`))

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "`host:port` to listen on")
	redisAddr := flag.String("redis", "localhost:6379", "`host:port` of Redis")
	flag.Parse()
	cfg := config{
		redis: redis.NewClient(&redis.Options{Addr: *redisAddr}),
		ping:  15 * time.Second, ttl: 40 * time.Second, write: 10 * time.Second, streams: 10_000,
		log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
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
	presence, err := mesh.NewPresenceManager(mesh.Options{Redis: cfg.redis, Logger: cfg.log})
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	rule := mesh.PresenceOptions{TTL: cfg.ttl}
	if err := errors.Join(presence.TrackPresence(rooms, rule), start(ctx, presence)); err != nil {
		return errors.Join(err, ln.Close())
	}
	a := newApp(cfg, presence)
	hs := &http.Server{
		Handler:           a.handler(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		// ReadTimeout and WriteTimeout would end every stream, so they are not set.
		// app.post and stream.send set deadlines of their own.
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       slog.NewLogLogger(cfg.log.Handler(), slog.LevelWarn),
	}
	hs.RegisterOnShutdown(a.endStreams)
	served := make(chan error, 1)
	go func() { served <- hs.Serve(ln) }()
	cfg.log.Info("ready", "addr", ln.Addr())
	select {
	case <-ctx.Done():
		err = shutdown(ctx, presence, hs)
		<-served // http.ErrServerClosed
	case err = <-served:
		err = errors.Join(err, shutdown(ctx, presence, hs))
	}
	return err
}

// start waits for Redis, with a time limit.
func start(ctx context.Context, presence *mesh.PresenceManager) error {
	begin, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := presence.Start(begin)
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		err = errors.Join(err, presence.Shutdown(end))
	}
	return err
}

// shutdown ends HTTP first and then presence. The caller closes Redis last.
// http.Server.Shutdown accepts no new requests, so that pages reconnect elsewhere. It
// ends the streams (RegisterOnShutdown), each with its Disconnect, and waits for them. If
// the time was not enough, presence.Shutdown does the rest. ctx has ended.
func shutdown(ctx context.Context, presence *mesh.PresenceManager, hs *http.Server) error {
	ctx = context.WithoutCancel(ctx)
	step, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := hs.Shutdown(step)
	if err != nil {
		err = errors.Join(err, hs.Close())
	}
	last, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return errors.Join(err, presence.Shutdown(last))
}
