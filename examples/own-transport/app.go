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

// app is the streams of one instance.
type app struct {
	cfg      config
	presence *mesh.PresenceManager

	life context.Context // ends when streams shall
	end  context.CancelFunc

	mu    sync.Mutex // guards conns
	conns map[string]*conn
}

// conn is one connection: a stream, and the POSTs that carry its token.
type conn struct {
	id    string // everybody in the room is told
	token string // nobody but the reader of the stream is
	room  string

	mu     sync.Mutex // guards the fields below
	second time.Time  // when counting began
	count  int        // POSTs since
}

// Errors that are the example's own.
var (
	errEnding = errors.New("this instance is shutting down")
	errFull   = errors.New("too many streams")
	errName   = errors.New("a name of 1 to 40 bytes is needed")
)

func newApp(cfg config, presence *mesh.PresenceManager) *app {
	a := &app{cfg: cfg, presence: presence, conns: make(map[string]*conn)}
	// A lifetime begins: that of streams, which endStreams ends.
	a.life, a.end = context.WithCancel(context.Background())
	return a
}

func (a *app) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write(page) // fails where the client is gone
	})
	mux.HandleFunc("GET /events", a.events)
	mux.HandleFunc("POST /join", a.act(a.join))
	mux.HandleFunc("POST /leave", a.act(a.leave))
	mux.HandleFunc("POST /state", a.act(a.state))
	mux.HandleFunc("POST /alive", a.act(a.alive))
	return mux
}

// endStreams ends every stream, and refuses new ones.
func (a *app) endStreams() { a.end() }

// open connects. Here a real app asks its session who that is; what it says
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

// close disconnects: the token is worth nothing any more, and the others in the
// room are told of the leave. The request's context has ended by now.
func (a *app) close(ctx context.Context, c *conn) {
	a.remove(c)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	if err := a.presence.Disconnect(ctx, c.id); err != nil {
		// Redis is away: it is made up for when it is back, or by the other
		// servers if this one is not there then.
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

// bearer returns whose token a request carries; nil: nobody's on this instance.
func (a *app) bearer(r *http.Request) *conn {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conns[token]
}

// statuses say what a client is told about an error; its text stays here.
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

// refuse answers with the status that an error calls for.
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
