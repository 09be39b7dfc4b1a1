package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/admission"
	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/handshake"
	"github.com/meshpresence/mesh/internal/origin"
	"github.com/meshpresence/mesh/internal/redact"
	"github.com/meshpresence/mesh/internal/socket"
)

// ServeHTTP upgrades a request to a WebSocket and returns. The connection is served by
// its own goroutines from then on, because the memory that net/http keeps for a running
// handler would be most of the cost of an idle connection.
//
// The app's commands can read values of the request's context, but do not end with it.
// Do not read a value there that is reused for other requests after the handler has
// returned, such as a router's own context. Copy what is needed into the metadata in
// Options.Authenticate. Middleware that counts, times or limits handlers sees the
// upgrade and not the socket: use Server.Stats and Limits.Connections.
//
// A refused request gets a status. The checks are made in this order, cheap ones first:
//
//   - 503 with Retry-After before Start, and from Drain or Shutdown on
//   - 400, 405 or (for HTTP/2) 505 if it is not a WebSocket handshake
//   - 400 if its mesh-level is not a positive whole number
//   - 403 for a foreign origin
//   - 503 with Retry-After beyond a limit, or while 1,024 calls of Options.Authenticate
//     have not returned
//   - the status that Options.Authenticate chose, or 401, or 500 if it failed because
//     of an outage
//   - 500 if the ResponseWriter cannot be hijacked
//
// A refused request does not count towards Limits.Connections and
// Limits.UpgradesPerSecond. It is logged with the reason and the remedy, and counted in
// Stats.RefusedUpgrades. Headers that were set on w before are part of the answer, both
// of an upgrade and of a refusal.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if w == nil || r == nil {
		s.log.Error("mesh: ServeHTTP was called without a request or a response")
		return
	}
	defer s.survive(w)
	if err := s.enter(); err != nil {
		s.refuse(w, s.unavailable(err))
		return
	}
	serving, taken := false, false
	defer func() {
		if !serving {
			s.gate.Leave(taken)
		}
	}()
	ws, metadata := s.upgrade(w, r)
	if ws == nil {
		return
	}
	taken = true
	ctx := context.WithoutCancel(r.Context())
	level, _ := handshake.LevelOf(r) // upgrade has checked it
	c, err := s.accept(ctx, ws, metadata, level, nil)
	if err != nil {
		return // accept has closed the socket
	}
	serving = true
	go func() { // ends with the connection; Drain and Shutdown wait for it
		defer s.gate.Leave(true)
		_ = c.run(ctx) // the reason has been logged
	}()
}

// survive is deferred by ServeHTTP. It counts and logs a panic of the app's
// ResponseWriter, and answers with 500 if that is possible.
func (s *Server) survive(w http.ResponseWriter) {
	value := recover()
	if value == nil {
		return
	}
	if value == http.ErrAbortHandler { //nolint:errorlint // a panic value, compared as net/http does
		panic(value) // net/http handles this value
	}
	s.n.calls.NotePanic("ResponseWriter", value)
	s.refused.count(http.StatusInternalServerError)
	defer func() { _ = recover() }() // w may panic again
	http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
}

// upgrade answers a request that has entered. It returns the upgraded connection, which
// is taken then, or nil after a refusal. Cheap checks come first, and only an upgrade
// counts towards the limits. Otherwise refused requests could keep honest clients out.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) (*websocket.Conn, []byte) {
	metadata, denied := s.admit(r)
	if denied != nil {
		if denied.Status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", http.MethodGet)
		}
		if denied.Handshake {
			w.Header().Set("Sec-Websocket-Version", handshake.WebSocketVersion)
		}
		s.refuse(w, denied)
		return nil, nil
	}
	upgraded := false
	defer func() { // also if the app's ResponseWriter panics
		if !upgraded {
			s.gate.Untake()
		}
	}()
	ws, denied := s.handshake(w, r)
	if denied != nil {
		s.refuse(w, denied)
		return nil, nil
	}
	upgraded = true
	return ws, metadata
}

// admit takes a request and returns the connection's first metadata, or the denial.
func (s *Server) admit(r *http.Request) ([]byte, *handshake.Denial) {
	if d := handshake.Check(r); d != nil {
		return nil, d
	}
	if !s.upgrader.CheckOrigin(r) { // before the hook: a foreign page must not trigger it
		why, args := origin.Explain(r, len(s.n.opts.AllowedOrigins) > 0)
		return nil, &handshake.Denial{Status: http.StatusForbidden, Body: "the origin is not allowed", Level: slog.LevelWarn, Why: why, Args: args}
	}
	if err := s.gate.HasPlace(); err != nil { // before the hook, which a storm of clients must not reach
		return nil, s.unavailable(err)
	}
	metadata, denied := s.authenticate(r)
	if denied != nil {
		return nil, denied
	}
	// The server may have begun to drain, or become full, while the hook ran.
	if err := s.Ready(r.Context()); err != nil {
		return nil, s.unavailable(err)
	}
	if err := s.gate.Take(true); err != nil {
		return nil, s.unavailable(err)
	}
	return metadata, nil
}

// handshake upgrades an admitted request, or returns the denial.
func (s *Server) handshake(w http.ResponseWriter, r *http.Request) (*websocket.Conn, *handshake.Denial) {
	offers, chosen := r.Header["Sec-Websocket-Protocol"], handshake.ChooseSubprotocol(s.n.opts.Subprotocols, r)
	ws, err := socket.Upgrade(&s.upgrader, w, r, handshake.Header(w.Header(), chosen))
	if err != nil {
		return nil, handshake.NotUpgraded(err)
	}
	if len(offers) > 0 && chosen == "" && len(r.Header["Origin"]) > 0 {
		s.log.Warn("mesh: none of the subprotocols that a browser offers is one of this server's: most browsers close the connection",
			"supported", strings.Join(s.n.opts.Subprotocols, ", "), "remedy", "list one of those that the page gives to WebSocket in Options.Subprotocols")
	}
	return ws, nil
}

// retryAfter is the Retry-After header, in seconds, of requests that may succeed later.
const retryAfter = "2"

// refuse logs a denial, sends it, and counts it.
func (s *Server) refuse(w http.ResponseWriter, d *handshake.Denial) {
	line := "mesh: upgrade refused: " + d.Why
	s.log.As(d.Level, line, line, append([]any{"status", d.Status}, d.Args...)...)
	if d.Sent {
		s.refused.count(d.Status)
		return
	}
	if d.Body == "" {
		d.Body = http.StatusText(d.Status)
	}
	if d.Later {
		// A client that retries later must not keep a file descriptor until then.
		w.Header().Set("Retry-After", retryAfter)
		w.Header().Set("Connection", "close")
	}
	http.Error(w, d.Body, d.Status)
	s.refused.count(d.Status) // last, because survive counts the request if w panics
}

// unavailable returns the denial for an error of enter, hasPlace or take, or for a hook
// that must not be called.
func (s *Server) unavailable(err error) *handshake.Denial {
	d := &handshake.Denial{Status: http.StatusServiceUnavailable, Later: true, Level: slog.LevelWarn}
	switch {
	case errors.Is(err, ErrNotStarted):
		d.Body, d.Why = "the server is starting", "the server has not been started"
		d.Args = []any{"remedy", "serve requests once Start has returned nil"}
	case errors.Is(err, ErrClosed):
		d.Body, d.Why, d.Level = "the server is shutting down", "the server is draining or shut down", slog.LevelInfo
		d.Args = []any{"remedy", "none if the load balancer forgets this server soon: see Server.ReadyHandler"}
	case errors.Is(err, errAuthBusy):
		d.Body, d.Why = "too many requests are being authenticated", "too many calls of Authenticate have not returned"
		d.Args = []any{"calls", authsAtOnce, "remedy", "Authenticate must return when its context ends"}
	case errors.Is(err, admission.ErrRate):
		d.Body, d.Why = "too many new connections", "too many new connections in a second"
		d.Args = []any{"limit", s.n.opts.Limits.UpgradesPerSecond, "remedy", "raise Limits.UpgradesPerSecond or add servers"}
	default:
		d.Body, d.Why = "too many connections", "the server is full"
		d.Args = []any{"limit", s.gate.Max(), "remedy", "raise Limits.Connections and the limit of file descriptors (ulimit -n), or add servers"}
	}
	return d
}

// authsAtOnce limits the running calls of Authenticate, including those that continue
// after their time limit. Nothing else bounds the cost of refused requests, because
// they do not count towards the limits of connections and upgrades.
const authsAtOnce = 1024

// errAuthBusy means that the maximum of Authenticate calls is running.
var errAuthBusy = fmt.Errorf("%w: too many requests are being authenticated", ErrBusy)

// authAnswer is the result of one call of Authenticate.
type authAnswer struct {
	metadata json.RawMessage
	unfit    bool // the metadata cannot be used
	outage   bool // the hook failed because a dependency did not answer
}

// authenticate calls the app's hook for a request and returns the connection's first
// metadata, or the denial.
func (s *Server) authenticate(r *http.Request) (json.RawMessage, *handshake.Denial) {
	hook := s.n.opts.Authenticate
	if hook == nil {
		return nil, nil
	}
	if s.asking.Add(1) > authsAtOnce {
		s.asking.Add(-1)
		return nil, s.unavailable(errAuthBusy)
	}
	answer := make(chan authAnswer, 1) // buffered: the hook may outlive its time limit
	call := s.n.calls.Start(r.Context(), callbacks.Authenticate, s.n.opts.HookTimeout, func(ctx context.Context) error {
		value, err := hook(ctx, r)
		if err != nil {
			answer <- authAnswer{outage: callbacks.IsOutage(err)} // inside the callback, because err has methods of the app
			return err
		}
		data, err := s.n.encodeMetadata(value)
		answer <- authAnswer{metadata: data, unfit: err != nil}
		return err
	}, callbacks.Events{Ended: func() { s.asking.Add(-1) }})
	if !call.Called() { // the hook was not called
		s.asking.Add(-1)
	}
	<-call.Settled()
	var got authAnswer
	select {
	case got = <-answer:
	default: // it has not returned, or panicked
	}
	if err := call.Err(); err != nil {
		return nil, s.notAuthenticated(r, err, got)
	}
	return got.metadata, nil
}

// notAuthenticated returns the denial for an error of a call of Authenticate.
func (s *Server) notAuthenticated(r *http.Request, err error, got authAnswer) *handshake.Denial {
	if refusal, ok := errors.AsType[*Refusal](err); ok {
		status, message := refusal.response()
		level := slog.LevelInfo // a decision of the app
		if status >= http.StatusInternalServerError {
			level = slog.LevelWarn
		}
		return &handshake.Denial{Status: status, Body: message, Level: level, Why: "Authenticate returned a Refusal"}
	}
	d := &handshake.Denial{Status: http.StatusInternalServerError, Level: slog.LevelWarn}
	d.Args = []any{"error", redact.WithoutSecrets(err.Error(), r, s.n.opts.Subprotocols)}
	late, isLate := errors.AsType[*callbacks.TimeoutError](err)
	_, panicked := errors.AsType[*callbacks.PanicError](err)
	switch {
	case panicked:
		d.Why, d.Args = "Authenticate panicked", nil // logged by callbacks
	case isLate:
		d.Why, d.Args = "Authenticate did not return in time", []any{"after", late.After, "remedy", "see Options.HookTimeout"}
	case got.unfit && errors.Is(err, ErrTooLarge):
		d.Why = "the metadata of Authenticate are too large"
		d.Args = append(d.Args, "remedy", "return less, or raise Limits.MetadataBytes")
	case got.unfit:
		d.Why = "the metadata of Authenticate do not encode to JSON"
		d.Args = append(d.Args, "remedy", "return a value that encoding/json encodes")
	case errors.Is(r.Context().Err(), context.Canceled):
		return &handshake.Denial{Status: handshake.StatusClientGone, Body: "the client has gone", Level: slog.LevelDebug, Why: "the client has gone"}
	case errors.Is(err, ErrClosed):
		return s.unavailable(err)
	case got.outage || callbacks.IsOutage(err):
		d.Why = "Authenticate failed for an outage"
		d.Args = append(d.Args, "remedy", "look at what Authenticate asks: a context or network error is a 500")
	default:
		d.Status, d.Why = http.StatusUnauthorized, "Authenticate returned an error"
		d.Args = append(d.Args, "remedy", "to choose the status and text, return mesh.Refuse(status, text)")
	}
	return d
}
