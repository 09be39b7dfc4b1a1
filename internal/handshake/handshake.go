// Package handshake checks the WebSocket handshake of a request, and describes the answer
// to a request that is not upgraded.
package handshake

import (
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/redact"
	"github.com/meshpresence/mesh/internal/socket"
)

// WebSocketVersion is the only version (RFC 6455).
const WebSocketVersion = "13"

// Remedies for requests that are no valid handshake although the client wants a
// WebSocket.
const (
	remedyHeaders = `let the proxy pass the upgrade on; nginx: proxy_http_version 1.1; ` +
		`proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";`
	remedyHTTP2  = "the proxy must speak HTTP/1.1 to this server"
	remedyClient = "look at the client, and at proxies that change requests"
	remedyLevel  = "mesh-level must be a whole number from 1 on, once"
)

// Denial is the answer to a request that is not upgraded, and its log line.
type Denial struct {
	Status int
	Body   string     // for the client; "" means the text of the status
	Later  bool       // the client may retry: send Retry-After
	Sent   bool       // the answer has been sent, or cannot be sent
	Level  slog.Level // of the log line
	Why    string     // end and kind of the log line; must be a constant
	Args   []any      // of the log line; text from clients must go through redact.Printable

	Handshake bool // the request is not a valid handshake
}

// StatusClientGone counts requests whose client went away before the answer, as in the
// log of nginx. No client sees it.
const StatusClientGone = 499

// Check returns the denial for a request that is no WebSocket handshake, and nil if it
// is one. The upgrader checks the same, but later.
func Check(r *http.Request) *Denial {
	d := &Denial{Status: http.StatusBadRequest, Level: slog.LevelWarn, Handshake: true}
	_, badLevel := LevelOf(r)
	key, err := base64.StdEncoding.DecodeString(r.Header.Get("Sec-Websocket-Key"))
	switch {
	case !wantsWebSocket(r): // any browser can send these
		d.Body, d.Level = "a WebSocket upgrade is expected here", slog.LevelDebug
		d.Why = "not a WebSocket request"
	case r.ProtoMajor > 1:
		d.Status = http.StatusHTTPVersionNotSupported
		d.Body = "a WebSocket upgrade needs HTTP/1.1"
		d.Why, d.Args = "the request came by HTTP/2", []any{"remedy", remedyHTTP2}
	case !websocket.IsWebSocketUpgrade(r):
		d.Body = "a WebSocket upgrade is expected here: the header Upgrade or Connection is missing"
		d.Why = "a WebSocket request without its Upgrade and Connection headers"
		d.Args = []any{"proto", redact.Printable(r.Proto), "remedy", remedyHeaders}
	case r.Method != http.MethodGet:
		d.Status, d.Body = http.StatusMethodNotAllowed, "a WebSocket upgrade has method GET"
		d.Why, d.Args = "the method is not GET", []any{"method", redact.Printable(r.Method), "remedy", remedyClient}
	case !hasToken(r.Header["Sec-Websocket-Version"], WebSocketVersion):
		d.Body, d.Why = "WebSocket version 13 is expected here", "the WebSocket version is not 13"
		d.Args = []any{"version", redact.Printable(r.Header.Get("Sec-Websocket-Version")), "remedy", remedyClient}
	case err != nil || len(key) != 16:
		d.Body, d.Why = "Sec-WebSocket-Key must be 16 bytes in base64", "the Sec-WebSocket-Key is invalid"
		d.Args = []any{"remedy", remedyClient}
	case badLevel != nil:
		d.Handshake, d.Body = false, badLevel.Error()
		d.Why, d.Args = "the level in the URL is invalid", []any{"remedy", remedyLevel}
	default:
		return nil
	}
	return d
}

// wantsWebSocket reports whether a request looks like a WebSocket handshake, complete
// or stripped of headers by a proxy.
func wantsWebSocket(r *http.Request) bool {
	return len(r.Header["Sec-Websocket-Key"]) > 0 || len(r.Header["Sec-Websocket-Version"]) > 0 ||
		strings.EqualFold(r.Header.Get("Upgrade"), "websocket") || websocket.IsWebSocketUpgrade(r) ||
		slices.Contains(r.Header[":protocol"], "websocket") // RFC 8441, as net/http stores it
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

// ChooseSubprotocol returns the first of the server's subprotocols that the request
// offers, or "" if there is none.
func ChooseSubprotocol(supported []string, r *http.Request) string {
	for _, name := range supported {
		if hasToken(r.Header["Sec-Websocket-Protocol"], name) {
			return name
		}
	}
	return ""
}

// hopByHop are headers about the connection or the body. A 101 does not have them or
// sets them itself.
var hopByHop = []string{
	"Connection", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
	"Content-Encoding", "Content-Length", "Content-Range", "Content-Type",
}

// Header returns the headers of the 101: those already set on the
// ResponseWriter, such as cookies, and the subprotocol. The upgrader sends names
// unchanged, and replaces control characters in values.
func Header(set http.Header, subprotocol string) http.Header {
	h := maps.Clone(set)
	maps.DeleteFunc(h, func(name string, _ []string) bool {
		canonical := http.CanonicalHeaderKey(name)
		return !isToken(name) || strings.HasPrefix(canonical, "Sec-Websocket-") || slices.Contains(hopByHop, canonical)
	})
	if subprotocol != "" {
		if h == nil {
			h = make(http.Header)
		}
		h["Sec-Websocket-Protocol"] = []string{subprotocol}
	}
	return h
}

// NotUpgraded returns the denial for an error of socket.Upgrade.
func NotUpgraded(err error) *Denial {
	if early, ok := errors.AsType[*socket.EarlyError](err); ok {
		return &Denial{
			Status: early.Status, Sent: true, Level: slog.LevelWarn, Why: "the client sent data before the answer",
			Args: []any{"bytes", early.Bytes, "remedy", remedyClient},
		}
	}
	if failed, ok := errors.AsType[*socket.HijackError](err); ok {
		d := &Denial{
			Status: http.StatusInternalServerError, Body: "WebSocket upgrades do not work here: see the server's log",
			Level: slog.LevelWarn, Args: []any{"writer", failed.Writer},
		}
		if failed.Err == nil {
			d.Why = "the ResponseWriter cannot be hijacked"
			d.Args = append(d.Args, "inner", failed.Inner, "remedy", "a middleware that wraps the ResponseWriter must have "+
				"Unwrap() http.ResponseWriter or implement http.Hijacker; mount the server outside of http.TimeoutHandler")
		} else {
			d.Why = "Hijack of the ResponseWriter failed"
			d.Args = append(d.Args, "error", redact.OneLine(failed.Err.Error()), "remedy", "nothing may answer or hijack the request before the server")
		}
		return d
	}
	if _, ok := errors.AsType[websocket.HandshakeError](err); ok { // gorilla is stricter than Check
		return &Denial{
			Status: http.StatusBadRequest, Level: slog.LevelWarn, Why: "the handshake is invalid",
			Args: []any{"error", redact.OneLine(err.Error()), "remedy", remedyClient},
		}
	}
	return &Denial{
		Status: StatusClientGone, Sent: true, Level: slog.LevelInfo, Why: "the answer could not be written",
		Args: []any{"error", redact.OneLine(err.Error())},
	}
}

// CheckSubprotocols returns an error if Options.Subprotocols is invalid.
func CheckSubprotocols(names []string) error {
	for i, name := range names {
		switch {
		case !isToken(name):
			return fmt.Errorf("%w: Subprotocols[%d] is %q, which is not an HTTP token", errs.InvalidOptions, i, name)
		case slices.Contains(names[:i], name):
			return fmt.Errorf("%w: Subprotocols[%d] is %q, which is listed twice", errs.InvalidOptions, i, name)
		}
	}
	return nil
}

// isToken reports whether s is a token of RFC 9110: a name of a header or subprotocol.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		letter := r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z'
		digit := r >= '0' && r <= '9'
		return !letter && !digit && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
}
