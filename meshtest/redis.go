package meshtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// ErrClosed is returned if a [Redis] has been closed.
var ErrClosed = errors.New("meshtest: redis is closed")

// Redis is an in-process Redis with a running clock and expired events. Its methods are
// safe for concurrent use.
type Redis struct {
	cfg     config
	mini    *miniredis.Miniredis
	srv     *server.Server
	started time.Time

	// cmdMu is held while a command runs and while the clock moves, so that neither sees
	// the other half done. It guards time, index and failure. It is taken before mu and
	// before miniredis's own lock.
	cmdMu   sync.Mutex
	time    clock
	index   index
	failure string // what every command answers; "": none

	// mu guards the fields below. It is never held across an operation that could wait.
	mu       sync.Mutex
	closed   bool
	cut      bool
	hung     chan struct{} // non-nil while commands wait; closed when they may go on
	events   string        // notify-keyspace-events, canonical
	runID    string
	restarts uint64 // counts restarts
	peers    map[*server.Peer]*peer
	conns    map[*memConn]*link
	clients  map[*redis.Client]*link // made by Client
	links    []*link                 // of all options

	listener net.Listener
	stop     chan struct{}
	wg       sync.WaitGroup // the ticker and the goroutines that serve TCP
}

// TB is the part of [testing.TB] that this package uses. It keeps package testing out of
// programs that only call [NewRedis].
type TB interface {
	Helper()
	Cleanup(func())
	Fatalf(format string, args ...any)
}

// StartRedis is [NewRedis] for a test. If it fails, it ends the test. The Redis is closed
// when the test is over.
func StartRedis(t TB, opts ...Option) *Redis {
	t.Helper()
	r, err := NewRedis(opts...)
	if err != nil {
		t.Fatalf("%v", err)
		return nil
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Fatalf("%v", err)
		}
	})
	return r
}

// NewRedis starts an empty Redis. Call [Redis.Close] when done. The error wraps
// [ErrOption], or says why the Redis cannot listen (see [WithAddr]).
func NewRedis(opts ...Option) (*Redis, error) {
	cfg, err := newConfig(opts)
	if err != nil {
		return nil, err
	}
	r := &Redis{
		cfg:     cfg,
		mini:    miniredis.NewMiniRedis(),
		started: time.Now(),
		events:  cfg.events,
		runID:   newRunID(),
		peers:   map[*server.Peer]*peer{},
		conns:   map[*memConn]*link{},
		clients: map[*redis.Client]*link{},
		stop:    make(chan struct{}),
	}
	if cfg.addr != "" {
		if r.listener, err = net.Listen("tcp", cfg.addr); err != nil {
			return nil, fmt.Errorf("meshtest: listen: %w", err)
		}
	}
	if err := r.boot(); err != nil {
		r.mini.Close()
		if r.listener != nil {
			err = errors.Join(err, r.listener.Close())
		}
		return nil, err
	}
	r.wg.Go(r.runTicker)
	if r.listener != nil {
		r.wg.Go(r.accept)
	}
	return r, nil
}

// boot starts miniredis without a listener, which only its Dial can do, and registers
// this package's commands in front of miniredis's own.
func (r *Redis) boot() error {
	conn, err := r.mini.Dial()
	if err != nil {
		return fmt.Errorf("meshtest: start miniredis: %w", err)
	}
	if err := conn.Close(); err != nil {
		return fmt.Errorf("meshtest: start miniredis: %w", err)
	}
	r.srv = r.mini.Server()
	r.time.init(r.mini, r.started)
	r.index.init()
	if !r.cfg.noConfig {
		if err := r.srv.Register("CONFIG", r.cmdConfig); err != nil {
			return fmt.Errorf("meshtest: register CONFIG: %w", err)
		}
	}
	r.srv.SetPreHook(r.hook)
	return nil
}

// Client returns a new go-redis client of this Redis, connected in memory. Redis.Close
// closes it. The caller may close it before. Give each server a client of its own,
// because [Redis.CutClient] and [Server.Kill] cut all users of a client.
func (r *Redis) Client() *redis.Client {
	opts, l := r.options()
	c := redis.NewClient(opts)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.clients[c] = l
	}
	return c
}

// link is the path of one client's connections. Redis.mu guards its fields.
type link struct {
	opts     *redis.Options // as the caller has changed them
	cut      bool           // by CutClient
	refusals int            // number of refused connections
	refused  time.Time      // time of the last one
}

// probePause is the time for which go-redis sleeps before it dials again after as many
// refusals as the pool is large. Only then does it notice that its client has been
// closed.
const probePause = time.Second

// retryPause returns the time after a refusal by which a client has dialled again, if it
// does. Only then does it notice that it has been closed.
func retryPause(opts *redis.Options) time.Duration {
	pause := 100 * time.Millisecond // the default of go-redis
	if opts.DialerRetryTimeout > 0 {
		pause = opts.DialerRetryTimeout
	}
	return pause + 50*time.Millisecond
}

// awaitProbe waits until a closed client has noticed that it is closed, so that none of
// its goroutines is left. A synctest bubble would report a deadlock otherwise.
func (r *Redis) awaitProbe(l *link) {
	poolSize := l.opts.PoolSize
	if poolSize <= 0 {
		poolSize = 10 * runtime.GOMAXPROCS(0) // the default of go-redis
	}
	for {
		r.mu.Lock()
		left := time.Duration(0)
		switch since := time.Since(l.refused); {
		case l.refusals >= poolSize:
			left = probePause - since
		case l.refusals > 0:
			left = retryPause(l.opts) - since
		}
		r.mu.Unlock()
		if left <= 0 {
			return
		}
		time.Sleep(left)
		yield()
	}
}

// largePool is more connections than are ever wanted at once. If callers have to wait for a
// connection, go-redis keeps their timers for later callers in this process. The process
// ends if a timer from a synctest bubble is used outside of it.
const largePool = 1024

// Options returns new options for a client of this Redis that the caller makes and
// closes, for example with other timeouts, pool sizes or database numbers. If callers
// might wait for a connection in a synctest bubble, do not make the pool smaller:
// go-redis then shares their timers with other tests. The address in the options is a
// literal without meaning. [Redis.Dial] makes the connections.
func (r *Redis) Options() *redis.Options {
	opts, _ := r.options()
	return opts
}

// options returns the options of a client, and the link of its connections.
func (r *Redis) options() (*redis.Options, *link) {
	l := &link{}
	l.opts = &redis.Options{
		Addr:     "127.0.0.1:6379", // a host name would be looked up, outside any bubble
		PoolSize: largePool,
		Dialer: func(ctx context.Context, _, _ string) (net.Conn, error) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			return r.dial(l)
		},
		// Both would only send commands that miniredis does not know.
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.links = append(r.links, l)
	return l.opts, l
}

// Dial returns a new in-memory connection, for clients other than go-redis. It fails with
// [ErrClosed], or like a refused connection after [Redis.Cut].
func (r *Redis) Dial() (net.Conn, error) {
	return r.dial(&link{})
}

func (r *Redis) dial(l *link) (net.Conn, error) {
	c, err := r.connect(l)
	if err != nil {
		return nil, err // not a nil *memConn in a net.Conn
	}
	return c, nil
}

// connect makes a connection and registers it for the cuts and Close.
func (r *Redis) connect(l *link) (*memConn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.cut || l.cut {
		l.refusals++
		l.refused = time.Now()
		if r.closed {
			return nil, ErrClosed
		}
		return nil, refused()
	}
	client, srv := memPipe()
	srv.onClose = func() {
		r.mu.Lock()
		delete(r.conns, srv)
		r.mu.Unlock()
	}
	r.conns[srv] = l
	// This is under mu, so that no call runs here once Close has set closed and closes
	// miniredis.
	r.srv.ServeConn(srv)
	return client, nil
}

// Addr returns the TCP address that the Redis listens on, or "" without [WithAddr].
func (r *Redis) Addr() string {
	if r.listener == nil {
		return ""
	}
	return r.listener.Addr().String()
}

// Mini returns the miniredis underneath, to look at its data and change it. Do not use it
// for anything that needs the clock or the hooks of this package: do not call SetError,
// SetTime, ClockTTL, FastForward, Restart or Close of it. A key that got its TTL from its
// SetTTL runs out up to a second late, without an event.
func (r *Redis) Mini() *miniredis.Miniredis { return r.mini }

// Close closes the clients, ends every connection, and waits until no goroutine of the
// Redis and its clients runs any more. That takes up to a second if the Redis refused
// their connections. Commands that wait after [Redis.Hang] end without an answer. Closing
// again does nothing.
func (r *Redis) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		r.wg.Wait()
		return nil
	}
	r.closed = true
	clients, conns, links := r.clients, r.connections(nil), r.links // Client adds none any more
	r.resume()
	close(r.stop)
	r.mu.Unlock()

	var errs []error
	for c := range clients {
		if err := c.Close(); err != nil && !errors.Is(err, redis.ErrClosed) {
			errs = append(errs, fmt.Errorf("meshtest: close client: %w", err))
		}
	}
	if r.listener != nil {
		if err := r.listener.Close(); err != nil {
			errs = append(errs, fmt.Errorf("meshtest: close listener: %w", err))
		}
	}
	for _, c := range conns {
		c.abort()
	}
	r.mini.Close()
	r.wg.Wait()
	for _, l := range links {
		r.awaitProbe(l)
	}
	return errors.Join(errs...)
}

// connections lists the open connections over one link, or over all links if over is nil.
// r.mu is held.
func (r *Redis) connections(over *link) []*memConn {
	conns := make([]*memConn, 0, len(r.conns))
	for c, l := range r.conns {
		if over == nil || l == over {
			conns = append(conns, c)
		}
	}
	return conns
}
