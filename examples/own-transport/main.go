// Command own-transport has presence without WebSockets: a page hears who is in
// a room by Server-Sent Events and says what it does by POST. mesh is used as a
// PresenceManager alone.
//
//	go run ./examples/own-transport        # needs a Redis on localhost:6379; open http://127.0.0.1:8080
//
//	curl -N 'http://127.0.0.1:8080/events?room=lobby&name=Ann'
//	curl -X POST -H 'Authorization: Bearer TOKEN' http://127.0.0.1:8080/join
//	curl -d '{"typing":true}' -H 'Authorization: Bearer TOKEN' http://127.0.0.1:8080/state
//
// What to look at:
//
//   - app.events in events.go: the life of a connection. Connect, the events of
//     PresenceManager.Subscribe as they come, Disconnect when the request ends.
//   - Whose request it is (app.act in posts.go). The connection's id is no
//     secret, everybody in the room sees it; so the stream begins with a token
//     that only its reader learns, and every POST must carry it.
//   - Signs of life. A write that succeeds says only that the kernel, or a
//     proxy, has taken it: for a client that vanished it goes on succeeding for
//     many minutes. So each heartbeat asks the page to answer, the answer is what
//     calls Touch, and the rule's TTL ends what does not answer. A write that
//     fails, or does not get through in time, ends the stream at once.
//   - stream in stream.go: one event after the other, each with a deadline.
//   - shutdown below: streams first, for http.Server.Shutdown waits for them.
//
// Behind several instances a POST must get to the one that has the stream (a
// sticky session, or the instance's own address in the first event): a
// connection's entries are written by the server that it is connected to. Serve
// it by HTTP/2 (TLS): by HTTP/1.1 browsers open at most six streams to a host.
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

// patience is how long Redis may take to answer at the start, and then how long
// each step of the end may take.
const patience = 10 * time.Second

// config is what an instance needs.
type config struct {
	redis   *redis.Client
	beat    time.Duration // between heartbeats
	ttl     time.Duration // whoever has not answered for so long has left; a few beats
	write   time.Duration // how long an event may take to be written
	streams int           // at most
	log     *slog.Logger
}

// rooms are those that there are.
var rooms = mesh.Regexp(regexp.MustCompile(`^[a-z0-9-]{1,40}$`))

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "`host:port` to listen on")
	redisAddr := flag.String("redis", "localhost:6379", "`host:port` of Redis")
	flag.Parse()
	cfg := config{
		redis: redis.NewClient(&redis.Options{Addr: *redisAddr}),
		beat:  15 * time.Second, ttl: 40 * time.Second, write: 10 * time.Second, streams: 10_000,
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
		// No ReadTimeout and no WriteTimeout: either would end every stream when
		// it is over. app.act and stream.send have their own.
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

// start waits for Redis, for a while.
func start(ctx context.Context, presence *mesh.PresenceManager) error {
	begin, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := presence.Start(begin)
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		err = errors.Join(err, presence.Shutdown(end))
	}
	return err
}

// shutdown ends HTTP, then presence; Redis is closed last. http.Server.Shutdown
// takes no new requests, so that pages come back elsewhere, has the streams end
// (RegisterOnShutdown), each with its Disconnect, and waits for them. What it
// did not get done in time presence.Shutdown does. ctx has ended.
func shutdown(ctx context.Context, presence *mesh.PresenceManager, hs *http.Server) error {
	ctx = context.WithoutCancel(ctx)
	step, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := hs.Shutdown(step)
	if err != nil {
		err = errors.Join(err, hs.Close())
	}
	last, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return errors.Join(err, presence.Shutdown(last))
}
