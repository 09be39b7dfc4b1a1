package main

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"net/http"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/meshpresence/mesh"
)

//go:embed page.html
var page []byte

// app holds the streams of one instance.
type app struct {
	cfg      config
	presence *mesh.PresenceManager

	life context.Context // ends when all streams must end
	end  context.CancelFunc

	mu    sync.Mutex // guards conns
	conns map[string]*conn
}

// conn is one connection: a stream, and the POST requests that carry its token.
type conn struct {
	id    string // visible to all members of the room
	token string // secret, known only to the reader of the stream
	room  string

	mu     sync.Mutex // guards the fields below
	second time.Time  // start of the current second
	count  int        // POST requests since then
}

// Errors of the example itself.
var (
	errEnding = errors.New("this instance is shutting down")
	errFull   = errors.New("too many streams")
	errName   = errors.New("a name of 1 to 40 bytes is needed")
)

func newApp(cfg config, presence *mesh.PresenceManager) *app {
	a := &app{cfg: cfg, presence: presence, conns: make(map[string]*conn)}
	// This context is the lifetime of all streams. endStreams ends it.
	a.life, a.end = context.WithCancel(context.Background())
	return a
}

func (a *app) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write(page) // fails if the client is gone
	})
	mux.HandleFunc("GET /events", a.events)
	mux.HandleFunc("POST /join", a.post(a.join))
	mux.HandleFunc("POST /leave", a.post(a.leave))
	mux.HandleFunc("POST /state", a.post(a.state))
	mux.HandleFunc("POST /alive", a.post(a.alive))
	return mux
}

// endStreams ends every stream and refuses new ones.
func (a *app) endStreams() { a.end() }

// open connects. A real app checks its session here and takes the user from it. The user
// becomes the connection's metadata, which guards may rely on.
func (a *app) open(ctx context.Context, name, room string) (*conn, error) {
	if name == "" || len(name) > 40 || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return nil, errName
	}
	c := &conn{id: rand.Text(), token: rand.Text(), room: room}
	if err := a.add(c); err != nil {
		return nil, err
	}
	if err := a.presence.Connect(ctx, c.id, map[string]string{"name": name}); err != nil {
		a.remove(c)
		return nil, err
	}
	return c, nil
}

// close disconnects. The token is no longer valid, and the members of the room see the
// leave. The request's context has ended by now.
func (a *app) close(ctx context.Context, c *conn) {
	a.remove(c)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	if err := a.presence.Disconnect(ctx, c.id); err != nil {
		// Redis does not answer. This server writes the leave when Redis is back. If this
		// server has ended by then, the other servers do it.
		a.cfg.log.Debug("disconnected, not written yet", "conn", c.id, "error", err)
	}
}

func (a *app) add(c *conn) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.life.Err() != nil:
		return errEnding
	case len(a.conns) >= a.cfg.streams:
		return errFull
	}
	a.conns[c.token] = c
	return nil
}

func (a *app) remove(c *conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.conns, c.token)
}

// bearer returns the connection whose token a request carries, or nil if this instance
// has no such connection.
func (a *app) bearer(r *http.Request) *conn {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conns[token]
}

// statuses maps errors to the HTTP status for the client. The text of the error is not
// sent.
var statuses = []struct {
	is     error
	status int
}{
	{errEnding, http.StatusServiceUnavailable},
	{errFull, http.StatusServiceUnavailable},
	{errName, http.StatusBadRequest},
	{mesh.ErrClosed, http.StatusServiceUnavailable},
	{mesh.ErrUnavailable, http.StatusServiceUnavailable},
	{mesh.ErrBusy, http.StatusServiceUnavailable},
	{mesh.ErrRefused, http.StatusForbidden},
	{mesh.ErrNotTracked, http.StatusNotFound},
	{mesh.ErrUnknownConnection, http.StatusGone},
	{mesh.ErrNotPresent, http.StatusConflict},
	{mesh.ErrTooLarge, http.StatusRequestEntityTooLarge},
	{mesh.ErrLimit, http.StatusTooManyRequests},
	{mesh.ErrInvalidRoom, http.StatusBadRequest},
	{mesh.ErrInvalidState, http.StatusBadRequest},
}

// refuse answers with the status for an error.
func refuse(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	for _, s := range statuses {
		if errors.Is(err, s.is) {
			status = s.status
			break
		}
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "2")
	}
	http.Error(w, http.StatusText(status), status)
}
