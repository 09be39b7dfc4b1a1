package mesh

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/socket"
)

// retryAfter is the Retry-After header of refused requests, in seconds.
const retryAfter = "2"

// authsAtOnce limits the calls of Authenticate that are under way, those included
// that go on after their time limit. Nothing else bounds what refused requests cost:
// they do not count towards the limits of connections and upgrades.
const authsAtOnce = 1024

// errAuthBusy says that as many calls of Authenticate are under way as may be.
var errAuthBusy = fmt.Errorf("%w: too many requests are being authenticated", ErrBusy)

// arrivals limits how many connections are accepted per second, so that a
// thousand clients that come back at once do not take the server down.
type arrivals struct {
	mu     sync.Mutex // guards bucket
	bucket limit.Bucket
}

// open reports whether another connection may be accepted now.
func (a *arrivals) open() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bucket.Has(time.Now())
}

// accept counts a connection; false: there were too many.
func (a *arrivals) accept() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bucket.Take(time.Now())
}

// forget takes back an accept.
func (a *arrivals) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.bucket.Return()
}

// reserve counts in a request, or a connection that the app upgraded, unless the
// server takes no more. release counts it out.
func (s *Server) reserve() error {
	if err := s.n.usable(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving.begun {
		return ErrClosed
	}
	s.open++
	return nil
}

// take makes a reserved request a connection, or returns an error if there are too
// many. With limited it also counts towards the upgrades of this second.
func (s *Server) take(limited bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.full(); err != nil {
		return err
	}
	if limited && !s.arrivals.accept() {
		return errUpgrades
	}
	s.taken++
	return nil
}

// giveBack takes back a take whose handshake did not succeed.
func (s *Server) giveBack() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken--
	s.arrivals.forget()
}

// errUpgrades says that enough connections were accepted in this second.
var errUpgrades = fmt.Errorf("%w: upgrades per second", ErrLimit)

// hasPlace returns an error if no request can become a connection now.
func (s *Server) hasPlace() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if err := s.full(); err != nil {
		return err
	}
	if !s.arrivals.open() {
		return errUpgrades
	}
	return nil
}

// full returns an error if there are as many connections as may be. The caller
// holds mu.
func (s *Server) full() error {
	if over(s.taken+1, s.most) {
		return fmt.Errorf("%w: %d connections", ErrLimit, s.most)
	}
	return nil
}

// release counts out what reserve counted in; taken: and take.
func (s *Server) release(taken bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
	if taken {
		s.taken--
	}
	if s.leaving.begun && s.open == 0 {
		close(s.gone) // once: it does not rise again
	}
}

// upgrade answers a reserved request: with an upgrade, which is taken then, or (nil)
// with a refusal. Cheap checks come first, and only an upgrade counts towards the
// limits. Otherwise anyone who sends requests
// that are refused could keep honest clients out.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) (*websocket.Conn, []byte) {
	if status, message := checkHandshake(r); status != 0 {
		if status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", http.MethodGet)
		}
		w.Header().Set("Sec-Websocket-Version", webSocketVersion)
		http.Error(w, message, status)
		return nil, nil
	}
	if !s.upgrader.CheckOrigin(r) { // before the hook: a foreign page must not trigger it
		http.Error(w, http.StatusText(http.StatusForbidden), http.StatusForbidden)
		return nil, nil
	}
	if s.hasPlace() != nil { // before the hook: a storm of clients must not reach it
		refuseUpgrade(w, http.StatusServiceUnavailable)
		return nil, nil
	}
	metadata, err := s.authenticate(r)
	if err != nil && !errors.Is(err, errAuthBusy) && !errors.Is(err, ErrClosed) {
		status, message := refusalOf(err)
		http.Error(w, message, status)
		return nil, nil
	}
	// It may have begun to drain, or become full, while the hook was asked.
	if err != nil || s.Ready(r.Context()) != nil || s.take(true) != nil {
		refuseUpgrade(w, http.StatusServiceUnavailable)
		return nil, nil
	}
	upgraded := false
	defer func() { // also if the app's ResponseWriter panics
		if !upgraded {
			s.giveBack()
		}
	}()
	ws, err := socket.Upgrade(&s.upgrader, w, r)
	if err != nil {
		return nil, nil // the upgrader has answered
	}
	upgraded = true
	return ws, metadata
}

// webSocketVersion is the one there is (RFC 6455).
const webSocketVersion = "13"

// checkHandshake returns the status and text for a request that is no WebSocket
// handshake; 0 if it is one. The upgrader checks the same, but later.
func checkHandshake(r *http.Request) (status int, message string) {
	key, err := base64.StdEncoding.DecodeString(r.Header.Get("Sec-Websocket-Key"))
	switch {
	case !websocket.IsWebSocketUpgrade(r):
		return http.StatusBadRequest, "a WebSocket upgrade is expected here"
	case r.Method != http.MethodGet:
		return http.StatusMethodNotAllowed, "a WebSocket upgrade has method GET"
	case !hasToken(r.Header["Sec-Websocket-Version"], webSocketVersion):
		return http.StatusBadRequest, "WebSocket version 13 is expected here"
	case err != nil || len(key) != 16:
		return http.StatusBadRequest, "Sec-WebSocket-Key must be 16 bytes in base64"
	}
	return 0, ""
}

// hasToken reports whether one of a header's comma-separated values is token.
func hasToken(values []string, token string) bool {
	for _, value := range values {
		for one := range strings.SplitSeq(value, ",") {
			if strings.TrimSpace(one) == token {
				return true
			}
		}
	}
	return false
}

// refuseUpgrade closes the connection with its answer: a client that has to come
// back later must not keep a file descriptor until then.
func refuseUpgrade(w http.ResponseWriter, status int) {
	w.Header().Set("Retry-After", retryAfter)
	w.Header().Set("Connection", "close")
	http.Error(w, http.StatusText(status), status)
}

// authenticate asks the app's hook about a request and returns the connection's
// first metadata.
func (s *Server) authenticate(r *http.Request) (json.RawMessage, error) {
	hook := s.n.opts.Authenticate
	if hook == nil {
		return nil, nil
	}
	if s.asking.Add(1) > authsAtOnce {
		s.asking.Add(-1)
		s.log.Warn("mesh: requests are refused: too many calls of Authenticate have not returned", "calls", authsAtOnce)
		return nil, errAuthBusy
	}
	answer := make(chan json.RawMessage, 1) // the hook may outlive its time
	call := s.n.calls.start(r.Context(), callbackAuthenticate, s.n.opts.HookTimeout, func(ctx context.Context) error {
		value, err := hook(ctx, r)
		if err != nil {
			return err
		}
		data, err := s.n.encodeMetadata(value)
		answer <- data
		return err
	}, watch{ended: func() { s.asking.Add(-1) }})
	if call.cancel == nil { // the hook was not called
		s.asking.Add(-1)
	}
	<-call.settled
	if call.err != nil {
		return nil, call.err
	}
	return <-answer, nil
}

// refusalOf returns what a client whose request was refused is told: what a
// *Refusal says, and of any other error nothing.
func refusalOf(err error) (status int, message string) {
	var r *Refusal
	if !errors.As(err, &r) {
		r = &Refusal{}
	}
	return r.response()
}
