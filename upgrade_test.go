package mesh_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/meshtest"
)

// refusedCase is a request that is refused, with its answer, log line and counter.
type refusedCase struct {
	setup  func(*mesh.Options)
	ready  func(t *testing.T, s *harness.Server)                    // prepares the server; may be nil
	change func(r *http.Request)                                    // changes a valid request; may be nil
	writer func(rec *httptest.ResponseRecorder) http.ResponseWriter // defaults to the recorder, which cannot be hijacked
	status int
	body   string
	level  slog.Level
	line   []string // texts in the log line, in this order
	count  string   // the key of Stats.RefusedUpgrades; defaults to the status
	later  bool     // whether the answer has Retry-After
}

func header(name string, values ...string) func(*http.Request) {
	return func(r *http.Request) {
		r.Header.Del(name)
		if len(values) > 0 {
			r.Header[http.CanonicalHeaderKey(name)] = values
		}
	}
}

func auth(hook func(ctx context.Context, r *http.Request) (any, error)) func(*mesh.Options) {
	return func(o *mesh.Options) { o.Authenticate, o.HookTimeout = hook, time.Second }
}

// authError makes Authenticate return an error.
func authError(err error) func(*mesh.Options) {
	return auth(func(context.Context, *http.Request) (any, error) { return nil, err })
}

// plainWriter hides the other methods of a ResponseWriter, as many middlewares do.
type plainWriter struct{ http.ResponseWriter }

// unwrapping is a ResponseWriter with an Unwrap method.
type unwrapping struct{ plainWriter }

func (u unwrapping) Unwrap() http.ResponseWriter { return u.ResponseWriter }

// looping is a ResponseWriter that unwraps to itself.
type looping struct{ plainWriter }

func (l looping) Unwrap() http.ResponseWriter { return l }

func hijacking(hijack func() (net.Conn, error)) func(*httptest.ResponseRecorder) http.ResponseWriter {
	return func(rec *httptest.ResponseRecorder) http.ResponseWriter { return brokenResponse{rec, hijack} }
}

const (
	internal  = "Internal Server Error"
	noHijack  = "WebSocket upgrades do not work here: see the server's log"
	dangerous = "\u202e\x1b[31m\n"
)

var refusedCases = map[string]refusedCase{
	"a browser": {
		change: func(r *http.Request) { r.Header = http.Header{} },
		status: 400, body: "a WebSocket upgrade is expected here", level: slog.LevelDebug, line: []string{"not a WebSocket request"},
	},
	"a proxy that drops both headers": {
		change: func(r *http.Request) {
			r.Proto, r.ProtoMinor = "HTTP/1.0", 0
			r.Header.Del("Upgrade")
			r.Header.Set("Connection", "close")
		},
		status: 400, body: "a WebSocket upgrade is expected here: the header Upgrade or Connection is missing", level: slog.LevelWarn,
		line: []string{"proto=HTTP/1.0", "proxy_http_version 1.1", "proxy_set_header Upgrade $http_upgrade", `proxy_set_header Connection "upgrade"`},
	},
	"a proxy that drops one header": {
		change: header("Connection", "keep-alive"),
		status: 400, body: "a WebSocket upgrade is expected here: the header Upgrade or Connection is missing", level: slog.LevelWarn,
		line: []string{"proto=HTTP/1.1", "proxy_http_version 1.1"},
	},
	"a proxy that drops all but the Upgrade": {
		change: func(r *http.Request) { r.Header = http.Header{"Upgrade": {"websocket"}} },
		status: 400, body: "a WebSocket upgrade is expected here: the header Upgrade or Connection is missing", level: slog.LevelWarn,
		line: []string{"proxy_http_version 1.1"},
	},
	"HTTP/2": {
		change: func(r *http.Request) {
			r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
			r.Header.Del("Upgrade")
			r.Header.Del("Connection")
		},
		status: 505, body: "a WebSocket upgrade needs HTTP/1.1", level: slog.LevelWarn, line: []string{"HTTP/2", "proxy", "HTTP/1.1"},
	},
	"extended CONNECT": {
		change: func(r *http.Request) {
			r.Method, r.Proto, r.ProtoMajor, r.ProtoMinor = http.MethodConnect, "HTTP/2.0", 2, 0
			r.Header = http.Header{":protocol": {"websocket"}}
		},
		status: 505, body: "a WebSocket upgrade needs HTTP/1.1", level: slog.LevelWarn, line: []string{"HTTP/2"},
	},
	"a browser by HTTP/2": {
		change: func(r *http.Request) {
			r.ProtoMajor, r.Header = 2, http.Header{}
		},
		status: 400, body: "a WebSocket upgrade is expected here", level: slog.LevelDebug, line: []string{"not a WebSocket request"},
	},
	"wrong method": {
		change: func(r *http.Request) { r.Method = "PO" + dangerous + "ST" },
		status: 405, body: "a WebSocket upgrade has method GET", level: slog.LevelWarn, line: []string{"method=PO??[31m?ST"},
	},
	"wrong version": {
		change: header("Sec-WebSocket-Version", "8"+dangerous),
		status: 400, body: "WebSocket version 13 is expected here", level: slog.LevelWarn, line: []string{"version=8??[31m?"},
	},
	"invalid key": {
		change: header("Sec-WebSocket-Key", "SECRET"),
		status: 400, body: "Sec-WebSocket-Key must be 16 bytes in base64", level: slog.LevelWarn, line: []string{"Sec-WebSocket-Key"},
	},
	"an error of the upgrader": { // which logs nothing itself
		change: header("Sec-WebSocket-Version", "8 9, 13"),
		status: 400, body: "Bad Request", level: slog.LevelWarn, line: []string{"handshake is invalid", "version"},
	},
	"another host behind nginx": {
		change: func(r *http.Request) {
			r.Host = "backend"
			r.Header.Set("Origin", "https://app.example.com:8443")
			r.Header.Set("X-Forwarded-Host", "app.example.com:8443")
		},
		status: 403, body: "the origin is not allowed", level: slog.LevelWarn,
		line: []string{
			"origin=https://app.example.com:8443", "host=backend", "x_forwarded_host=app.example.com:8443", "Options.AllowedOrigins",
			"proxy_set_header Host $http_host;",
		},
	},
	"an origin that is not listed": {
		setup:  func(o *mesh.Options) { o.AllowedOrigins = []string{"https://example.com"} },
		change: header("Origin", "https://user:SECRET@app.example.com/SECRET?SECRET#SECRET"),
		status: 403, body: "the origin is not allowed", level: slog.LevelWarn,
		line: []string{"origin=https://app.example.com ", "host=127.0.0.1", "Options.AllowedOrigins", "the server's own has to be listed"},
	},
	"no origin at all": {
		change: header("Origin", "null"), status: 403, body: "the origin is not allowed", level: slog.LevelWarn,
		line: []string{"the page has no origin", "origin=null", "sandboxed frame", "only the pattern *"},
	},
	"a malformed origin": {
		change: header("Origin", "SECRET"+dangerous), status: 403, body: "the origin is not allowed", level: slog.LevelWarn,
		line: []string{"origin=malformed"},
	},
	"a long origin and host": {
		change: func(r *http.Request) {
			r.Header.Set("Origin", "https://"+strings.Repeat("x", 1<<16))
			r.Host = "SECRET@" + dangerous + strings.Repeat("y", 1<<16) + "/?SECRET"
		},
		status: 403, body: "the origin is not allowed", level: slog.LevelWarn, line: []string{"origin=https://xxx", "…", "host=??[31m?yyy", "…"},
	},
	"a Refusal": {
		setup: authError(mesh.Refuse(403, "not today")), status: 403, body: "not today", level: slog.LevelInfo,
		line: []string{"Authenticate returned a Refusal", "status=403"},
	},
	"a Refusal for an outage": {
		setup: authError(errors.Join(context.DeadlineExceeded, mesh.Refuse(502, "no database"))), status: 502, body: "no database",
		level: slog.LevelWarn, line: []string{"Authenticate returned a Refusal", "status=502"}, count: "5xx",
	},
	"a Refusal of a rare status": {setup: authError(mesh.Refuse(418, "tea")), status: 418, body: "tea", level: slog.LevelInfo, count: "4xx"},
	"an error": {
		setup: authError(errors.New("unknown key of https://user:SECRET@idp.example.com/x?token=SECRET")), status: 401, body: "Unauthorized",
		level: slog.LevelWarn,
		line:  []string{"Authenticate returned an error", "error=unknown key of https://[hidden]@idp.example.com/x?[hidden]", "mesh.Refuse"},
	},
	"an error that quotes the request": {
		setup: auth(func(_ context.Context, r *http.Request) (any, error) {
			return nil, fmt.Errorf("bad %s, %s"+dangerous, r.Header.Get("Authorization"), r.URL.Query().Get("ticket"))
		}),
		change: func(r *http.Request) {
			r.Header.Set("Authorization", "Bearer SECRET.token")
			r.URL.RawQuery = "ticket=SECRET%20ticket"
		},
		status: 401, body: "Unauthorized", level: slog.LevelWarn, line: []string{"error=bad [hidden], [hidden]"},
	},
	"a network error": {
		setup:  authError(fmt.Errorf("sessions: %w", &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED})),
		status: 500, body: internal, level: slog.LevelWarn,
		line: []string{"Authenticate failed for an outage", "error=sessions: dial tcp: connection refused"},
	},
	"a panic": {
		setup:  auth(func(context.Context, *http.Request) (any, error) { panic("sesame") }),
		status: 500, body: internal, level: slog.LevelWarn, line: []string{"Authenticate panicked"},
	},
	"a hook that hangs": {
		setup:  auth(func(ctx context.Context, _ *http.Request) (any, error) { <-ctx.Done(); return nil, ctx.Err() }),
		status: 500, body: internal, level: slog.LevelWarn, line: []string{"did not return in time", "after=1s", "HookTimeout"},
	},
	"metadata that does not encode": {
		setup:  auth(func(context.Context, *http.Request) (any, error) { return make(chan int), nil }),
		status: 500, body: internal, level: slog.LevelWarn, line: []string{"do not encode to JSON", "chan int"},
	},
	"metadata that is too large": {
		setup: func(o *mesh.Options) {
			auth(func(context.Context, *http.Request) (any, error) { return strings.Repeat("SECRET", 100), nil })(o)
			o.Limits.MetadataBytes = 100
		},
		status: 500, body: internal, level: slog.LevelWarn, line: []string{"too large", "602 bytes, limit 100", "Limits.MetadataBytes"},
	},
	"a client that has gone": {
		setup: auth(func(ctx context.Context, _ *http.Request) (any, error) {
			return nil, fmt.Errorf("query: %w", ctx.Err())
		}),
		change: func(r *http.Request) {
			ctx, cancel := context.WithCancel(r.Context())
			cancel()
			*r = *r.WithContext(ctx)
		},
		status: 499, body: "the client has gone", level: slog.LevelDebug, line: []string{"the client has gone"},
	},
	"too many calls": {
		ready:  func(_ *testing.T, s *harness.Server) { s.SetAuthenticating(mesh.AuthsAtOnce) },
		setup:  authError(nil),
		status: 503, body: "too many requests are being authenticated", level: slog.LevelWarn, later: true,
		line: []string{"too many calls of Authenticate", "calls=1024"},
	},
	"too many connections": {
		setup: func(o *mesh.Options) { o.Limits.Connections = 1 }, ready: func(_ *testing.T, s *harness.Server) { s.Dial() },
		status: 503, body: "too many connections", level: slog.LevelWarn, later: true, line: []string{"full", "limit=1", "Limits.Connections"},
	},
	"too many upgrades": {
		setup: func(o *mesh.Options) { o.Limits.UpgradesPerSecond = 1 },
		ready: func(t *testing.T, s *harness.Server) {
			take := func() { assert.NoError(t, s.TakeUpgrade()) }
			take()
			time.AfterFunc(limit.LogEvery-time.Second/2, take) // before the last request
		},
		status: 503, body: "too many new connections", level: slog.LevelWarn, later: true,
		line: []string{"too many new connections in a second", "limit=1", "Limits.UpgradesPerSecond"},
	},
	"draining": {
		ready:  func(t *testing.T, s *harness.Server) { require.NoError(t, s.Drain(t.Context(), 0)) },
		status: 503, body: "the server is shutting down", level: slog.LevelInfo, later: true, line: []string{"draining"},
	},
	"shut down": {
		ready:  func(_ *testing.T, s *harness.Server) { s.End() },
		status: 503, body: "the server is shutting down", level: slog.LevelInfo, later: true, line: []string{"shut down"},
	},
	"a writer that cannot be hijacked": {
		status: 500, body: noHijack, level: slog.LevelWarn,
		line: []string{"cannot be hijacked", "writer=*httptest.ResponseRecorder", "inner=*httptest.ResponseRecorder", "Unwrap()", "http.Hijacker"},
	},
	"a middleware without Hijack": {
		writer: func(rec *httptest.ResponseRecorder) http.ResponseWriter {
			return unwrapping{plainWriter{plainWriter{rec}}}
		},
		status: 500, body: noHijack, level: slog.LevelWarn,
		line: []string{"cannot be hijacked", "writer=mesh_test.unwrapping", "inner=mesh_test.plainWriter", "Unwrap()"},
	},
	"a middleware that unwraps to itself": {
		writer: func(rec *httptest.ResponseRecorder) http.ResponseWriter { return looping{plainWriter{rec}} },
		status: 500, body: noHijack, level: slog.LevelWarn, line: []string{"cannot be hijacked", "writer=mesh_test.looping"},
	},
	"a hijack that is not supported": {
		writer: hijacking(func() (net.Conn, error) { return nil, fmt.Errorf("wrapped: %w", http.ErrNotSupported) }),
		status: 500, body: noHijack, level: slog.LevelWarn, line: []string{"cannot be hijacked", "writer=mesh_test.brokenResponse"},
	},
	"a hijack that fails": {
		writer: hijacking(func() (net.Conn, error) { return nil, http.ErrHijacked }),
		status: 500, body: noHijack, level: slog.LevelWarn,
		line: []string{"Hijack of the ResponseWriter failed", "writer=mesh_test.brokenResponse", "error=http: connection has been hijacked"},
	},
	"a hijack without a connection": {
		writer: func(rec *httptest.ResponseRecorder) http.ResponseWriter { return noConnection{rec} },
		status: 500, body: noHijack, level: slog.LevelWarn, line: []string{"no connection"},
	},
	"a client that closes before the answer": {
		writer: hijacking(func() (net.Conn, error) {
			a, b := net.Pipe()
			return a, b.Close()
		}),
		status: 200, count: "499", level: slog.LevelInfo, line: []string{"could not be written", "error="},
	},
}

// noConnection is a ResponseWriter whose Hijack returns no connection and no error.
type noConnection struct{ *httptest.ResponseRecorder }

func (noConnection) Hijack() (net.Conn, *bufio.ReadWriter, error) { return nil, nil, nil }

// TestRefusedUpgrades checks the status, the body and the counter of every refusal, and
// that it is logged with the remedy at most once in ten seconds.
func TestRefusedUpgrades(t *testing.T) {
	t.Parallel()
	for name, c := range refusedCases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				log := &testlog.Logbook{Least: slog.LevelDebug}
				s := w.Server(func(o *mesh.Options) {
					if o.Logger = slog.New(log); c.setup != nil {
						c.setup(o)
					}
				})
				if c.ready != nil {
					c.ready(t, s)
				}
				ask := func() { c.ask(t, s) }
				for range 3 {
					ask()
				}
				first := refusalLines(log)
				require.Len(t, first, 3, "%v", log.Written())
				assert.Equal(t, c.level, first[0].Level, first[0].Text)
				for _, further := range first[1:] {
					assert.Equal(t, slog.LevelDebug, further.Level, "within ten seconds, further lines have level debug")
				}
				at := 0
				for _, text := range c.line {
					i := strings.Index(first[0].Text[at:], text)
					require.GreaterOrEqual(t, i, 0, "%q in %q", text, first[0].Text)
					at += i + len(text)
				}
				assert.Less(t, len(first[0].Text), 700)
				for _, line := range log.Written() {
					assert.NotContains(t, line.Text, "SECRET")
					assert.False(t, strings.ContainsAny(line.Text, "\n\x1b\u202e"), "%q", line.Text)
				}
				w.Sleep(limit.LogEvery)
				ask()
				second := refusalLines(log)
				require.Len(t, second, 4)
				assert.Equal(t, c.level, second[3].Level)
				assert.EqualValues(t, 2, second[3].Suppressed)

				key := c.count
				if key == "" {
					key = fmt.Sprint(c.status)
				}
				want := mesh.NoRefusedUpgrades()
				require.Contains(t, want, key)
				want[key] = 4
				assert.Equal(t, want, s.Stats().RefusedUpgrades)
				if c.ready != nil {
					s.SetAuthenticating(0)
				}
			})
		})
	}
}

// ask sends the request once and checks the answer.
func (c refusedCase) ask(t *testing.T, s *harness.Server) {
	t.Helper()
	r, rec := harness.Handshake(t), httptest.NewRecorder()
	rec.Header().Set("X-Middleware", "was here")
	if c.change != nil {
		c.change(r)
	}
	writer := http.ResponseWriter(rec)
	if c.writer != nil {
		writer = c.writer(rec)
	}
	s.ServeHTTP(writer, r)
	synctest.Wait()
	require.Equal(t, c.status, rec.Code, "%s", rec.Body)
	assert.Equal(t, c.body, strings.TrimSpace(rec.Body.String()))
	assert.Equal(t, c.later, rec.Header().Get("Retry-After") != "")
	assert.Equal(t, "was here", rec.Header().Get("X-Middleware"))
}

// refusalLines returns the log lines about refused upgrades, at any level.
func refusalLines(b *testlog.Logbook) (lines []testlog.LogLine) {
	for _, l := range b.Written() {
		if strings.HasPrefix(l.Text, "mesh: upgrade refused: ") {
			lines = append(lines, l)
		}
	}
	return lines
}

// TestRefusedBeforeStart checks the answer to an upgrade before Start.
func TestRefusedBeforeStart(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var log testlog.Logbook
		opts := w.Options()
		opts.Logger = slog.New(&log)
		s, err := mesh.NewServer(opts)
		require.NoError(t, err)
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, harness.Handshake(t))
		assert.Equal(t, http.StatusServiceUnavailable, rec.Code)
		assert.Equal(t, "the server is starting\n", rec.Body.String())
		require.EqualValues(t, 1, log.Told("mesh: upgrade refused: the server has not been started status=503"))
		assert.EqualValues(t, 1, s.Stats().RefusedUpgrades["503"])
	})
}

// TestPanickingWriterIsCountedOnce checks that a request whose ResponseWriter panics is
// counted once.
func TestPanickingWriterIsCountedOnce(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		for range 2 {
			rec := httptest.NewRecorder()
			s.ServeHTTP(brokenResponse{rec, func() (net.Conn, error) { panic("no") }}, harness.Handshake(t))
			require.Equal(t, http.StatusInternalServerError, rec.Code)
		}
		r := harness.Handshake(t)
		r.Header.Set("Origin", "https://evil.example.com")
		s.ServeHTTP(panicsOnWrite{}, r) // the answer of the refusal cannot be written
		want := mesh.NoRefusedUpgrades()
		want["500"] = 3
		assert.Equal(t, want, s.Stats().RefusedUpgrades)
	})
}

type panicsOnWrite struct{}

func (panicsOnWrite) Header() http.Header { return http.Header{} }

func (panicsOnWrite) Write([]byte) (int, error) { panic("no") }

func (panicsOnWrite) WriteHeader(int) { panic("no") }

// refusedRequest is a change that makes a valid request invalid, and the status of the
// answer.
type refusedRequest struct {
	status int
	spoil  func(r *http.Request)
}

var refusedRequests = map[string]refusedRequest{
	"no handshake": {http.StatusBadRequest, func(r *http.Request) { r.Header = http.Header{} }},
	"no upgrade":   {http.StatusBadRequest, func(r *http.Request) { r.Header.Del("Upgrade") }},
	"not GET":      {http.StatusMethodNotAllowed, func(r *http.Request) { r.Method = http.MethodPost }},
	"old version":  {http.StatusBadRequest, func(r *http.Request) { r.Header.Set("Sec-WebSocket-Version", "8") }},
	"no version":   {http.StatusBadRequest, func(r *http.Request) { r.Header.Del("Sec-WebSocket-Version") }},
	"no key":       {http.StatusBadRequest, func(r *http.Request) { r.Header.Del("Sec-WebSocket-Key") }},
	"short key":    {http.StatusBadRequest, func(r *http.Request) { r.Header.Set("Sec-WebSocket-Key", "eA==") }},
	"origin":       {http.StatusForbidden, func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") }},
	"no password":  {http.StatusUnauthorized, func(r *http.Request) { r.Header.Del("Authorization") }},
}

func withPassword(o *mesh.Options) {
	o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
		if r.Header.Get("Authorization") == "" {
			return nil, errors.New("no password")
		}
		return nil, nil
	}
}

// TestRefusedRequestsDoNotCount checks that refused requests do not count for the limits
// of upgrades and connections.
func TestRefusedRequestsDoNotCount(t *testing.T) {
	t.Parallel()
	for name, bad := range refusedRequests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s := w.Tracked(withPassword, harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond, l.Connections = 3, 3 }))
				refuse := func() {
					for range 20 {
						r, rec := harness.Handshake(t), httptest.NewRecorder()
						bad.spoil(r)
						s.ServeHTTP(rec, r)
						require.Equal(t, bad.status, rec.Code, "%s", rec.Body)
					}
				}
				refuse()
				h := http.Header{"Authorization": {"secret"}}
				var open []*harness.Peer
				for range 3 {
					open = append(open, s.Dial(h))
				}
				_, resp, err := s.TryDial(h)
				require.Error(t, err)
				require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
				open[0].Close()
				w.Sleep(time.Second)
				refuse()
				s.Dial(h)
				assert.Equal(t, 3, s.StillOpen())
			})
		})
	}
}

// TestFailedUpgradesDoNotCount checks that accepted requests whose upgrade fails do not
// count either.
func TestFailedUpgradesDoNotCount(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond, l.Connections = 1, 1 }))
		for range 5 {
			rec := httptest.NewRecorder() // cannot be hijacked
			s.ServeHTTP(rec, harness.Handshake(t))
			require.Equal(t, http.StatusInternalServerError, rec.Code)
		}
		s.Dial()
	})
}

// TestSlowAuthenticationIsBounded checks that requests that wait for Authenticate do not
// count for the limits of upgrades and connections, and that their number is limited.
func TestSlowAuthenticationIsBounded(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		release := make(chan struct{})
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond, l.Connections = 2, 2 }), func(o *mesh.Options) {
			o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
				if r.Header.Get("Slow") != "" {
					<-release // ignores its context
					return nil, errors.New("no")
				}
				return nil, nil
			}
		})
		var asked sync.WaitGroup
		var codes sync.Map
		slow := func() {
			asked.Go(func() {
				r, rec := harness.Handshake(t), httptest.NewRecorder()
				r.Header.Set("Slow", "1")
				s.ServeHTTP(rec, r)
				n, _ := codes.LoadOrStore(rec.Code, new(atomic.Int64))
				n.(*atomic.Int64).Add(1)
			})
		}
		count := func(code int) int64 {
			n, ok := codes.Load(code)
			if !ok {
				return 0
			}
			return n.(*atomic.Int64).Load()
		}
		for range mesh.AuthsAtOnce - 1 {
			slow()
		}
		w.Sleep(time.Millisecond)
		first := s.Dial()
		for range 50 {
			slow()
		}
		w.Sleep(time.Millisecond)
		assert.EqualValues(t, 49, count(http.StatusServiceUnavailable), "one took the place of the request that was upgraded")
		w.Sleep(10 * time.Second)
		asked.Wait()
		assert.EqualValues(t, mesh.AuthsAtOnce, count(http.StatusInternalServerError), "the others timed out")
		_, resp, err := s.TryDial()
		require.Error(t, err, "the hooks still run")
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		assert.NotEmpty(t, resp.Header.Get("Retry-After"))
		assert.Equal(t, "true", string(first.Call("mesh/noop", nil)))
		close(release)
		w.Sleep(time.Millisecond)
		s.Dial()
	})
}

// TestAuthenticateIsNotCalledAtTheLimit checks that Authenticate is not called for
// requests beyond UpgradesPerSecond.
func TestAuthenticateIsNotCalledAtTheLimit(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var calls atomic.Int64
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond = 2 }), func(o *mesh.Options) {
			o.Authenticate = func(context.Context, *http.Request) (any, error) {
				calls.Add(1)
				return nil, nil
			}
		})
		for range 50 {
			_, _, _ = s.TryDial()
		}
		assert.EqualValues(t, 2, calls.Load())
		assert.Equal(t, 2, s.Stats().Connections)
	})
}

func TestSubprotocols(t *testing.T) {
	t.Parallel()
	const token = "SECRET-token.1"
	for name, c := range map[string]struct {
		supported []string
		offers    []string // values of Sec-WebSocket-Protocol
		chosen    string
		warns     bool // whether a request with an Origin causes a warning
	}{
		"no protocols":              {},
		"none offered":              {supported: []string{"mesh"}},
		"token after the protocol":  {[]string{"mesh"}, []string{"mesh, " + token}, "mesh", false},
		"token before the protocol": {[]string{"mesh"}, []string{token + ",mesh"}, "mesh", false},
		"several headers":           {[]string{"mesh"}, []string{token, "mesh"}, "mesh", false},
		"the server's preference":   {[]string{"v2.mesh", "v1.mesh"}, []string{"v1.mesh, v2.mesh"}, "v2.mesh", false},
		"no common protocol":        {[]string{"mesh"}, []string{token}, "", true},
		"none supported":            {nil, []string{"mesh, " + token}, "", true},
		"different case":            {[]string{"mesh"}, []string{"MESH"}, "", true},
		"similar names":             {[]string{"mesh"}, []string{"mesh2, xmesh, mesh x"}, "", true},
		"malformed":                 {[]string{"mesh"}, []string{",, ;\"mesh\""}, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				var (
					log  testlog.Logbook
					seen []string
				)
				s := w.Server(func(o *mesh.Options) {
					o.Subprotocols, o.Logger = c.supported, slog.New(&log)
					o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
						seen = r.Header.Values("Sec-WebSocket-Protocol")
						return nil, nil
					}
				})
				const warning = "none of the subprotocols"
				for _, origin := range []string{"", "http://127.0.0.1"} {
					h := http.Header{}
					if len(c.offers) > 0 {
						h["Sec-Websocket-Protocol"] = c.offers
					}
					if origin != "" {
						require.Zero(t, log.Told(warning), "requests without an Origin cause no warning")
						h.Set("Origin", origin)
					}
					p, resp, err := s.TryDial(h)
					require.NoError(t, err)
					assert.Equal(t, c.offers, seen)
					assert.Equal(t, c.chosen, p.Client.Subprotocol())
					assert.Equal(t, c.chosen, strings.Join(resp.Header.Values("Sec-WebSocket-Protocol"), "|"))
					assert.NotContains(t, fmt.Sprint(resp.Header), token)
					assert.Equal(t, "true", string(p.Call("mesh/noop", nil)))
				}
				assert.Equal(t, c.warns, log.Told(warning) > 0)
				assert.NotContains(t, fmt.Sprint(log.Written()), "SECRET")
				assert.Empty(t, refusalLines(&log))
			})
		})
	}
}

// TestHeadersOfTheUpgrade checks that the answer 101 has the headers that were set
// before ServeHTTP, except for those of the handshake, and that no name or value can
// inject another header.
func TestHeadersOfTheUpgrade(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(func(o *mesh.Options) { o.Subprotocols = []string{"mesh"} })
		s.HTTP.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.SetCookie(w, &http.Cookie{Name: "session", Value: "1"})
			http.SetCookie(w, &http.Cookie{Name: "lb", Value: "2"})
			h := w.Header()
			for _, name := range []string{
				"Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions", "Sec-WebSocket-Accept", "Upgrade", "Connection", "Keep-Alive",
				"Content-Length", "Content-Type", "Content-Encoding", "Transfer-Encoding", "Trailer",
			} {
				h.Set(name, "7")
				h[strings.ToLower(name)] = []string{"7"}
			}
			h["X-Value"] = []string{"a\r\nX-Injected: 1\r\n\r\nbody"}
			h["X-Name: 1\r\nX-Injected"] = []string{"1"}
			h[http.TrailerPrefix+"X-Late"] = []string{"1"}
			h[""] = []string{"1"}
			s.ServeHTTP(w, r)
		})
		conn, err := s.Listener.Dial(t.Context(), "", "")
		require.NoError(t, err)
		defer func() { _ = conn.Close() }()
		go func() {
			_, _ = io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
				"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: token, mesh\r\n\r\n")
		}()
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		assert.Equal(t, http.StatusSwitchingProtocols, resp.StatusCode)
		assert.Equal(t, http.Header{
			"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Accept": {"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="},
			"Sec-Websocket-Protocol": {"mesh"}, "Set-Cookie": {"session=1", "lb=2"}, "X-Value": {"a  X-Injected: 1    body"},
		}, resp.Header)
	})
}

// TestDataBeforeTheAnswer checks that a client that sends data before the answer is
// refused, and that its connection is closed.
func TestDataBeforeTheAnswer(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var log testlog.Logbook
		s := w.Server(func(o *mesh.Options) { o.Logger = slog.New(&log) })
		s.HTTP.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Middleware", "was here")
			s.ServeHTTP(w, r)
		})
		conn, err := s.Listener.Dial(t.Context(), "", "")
		require.NoError(t, err)
		defer func() { _ = conn.Close() }()
		go func() {
			_, _ = io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
				"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\nSECRET")
		}()
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		assert.Equal(t, http.StatusBadRequest, resp.StatusCode)
		assert.Equal(t, "data came before the WebSocket handshake was complete\n", string(body))
		assert.Equal(t, "was here", resp.Header.Get("X-Middleware"))
		_, err = conn.Read(make([]byte, 1))
		require.Error(t, err, "the connection is closed")
		w.Sleep(time.Millisecond)
		lines := refusalLines(&log)
		require.Len(t, lines, 1)
		assert.Equal(t, slog.LevelWarn, lines[0].Level)
		assert.Contains(t, lines[0].Text, "sent data before the answer status=400 bytes=6")
		assert.EqualValues(t, 1, s.Stats().RefusedUpgrades["400"])
		assert.Equal(t, [2]int{}, s.Places())
	})
}

// behind starts a server of net/http with a mesh server behind a middleware.
func behind(t *testing.T, log *testlog.Logbook, middleware func(http.Handler) http.Handler) (*mesh.Server, *httptest.Server) {
	t.Helper()
	mem, err := meshtest.NewRedis()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, mem.Close()) })
	client := mem.Client()
	t.Cleanup(func() { _ = client.Close() })
	srv, err := mesh.NewServer(mesh.Options{Redis: client, Logger: slog.New(log)})
	require.NoError(t, err)
	require.NoError(t, srv.Start(t.Context()))
	web := httptest.NewUnstartedServer(middleware(srv))
	web.EnableHTTP2 = true
	web.StartTLS()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		require.NoError(t, srv.Shutdown(ctx))
		web.Close()
	})
	return srv, web
}

// TestMiddlewares dials a server of net/http with middlewares that wrap the
// ResponseWriter.
func TestMiddlewares(t *testing.T) {
	t.Parallel()
	wrapping := func(wrap func(http.ResponseWriter) http.ResponseWriter) func(http.Handler) http.Handler {
		return func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Set-Cookie", "a=1")
				next.ServeHTTP(wrap(w), r)
			})
		}
	}
	for name, c := range map[string]struct {
		middleware func(http.Handler) http.Handler
		line       string // text in the log line; empty if the upgrade succeeds
	}{
		"none": {wrapping(func(w http.ResponseWriter) http.ResponseWriter { return w }), ""},
		"with Unwrap": {wrapping(func(w http.ResponseWriter) http.ResponseWriter {
			return unwrapping{plainWriter{unwrapping{plainWriter{w}}}}
		}), ""},
		"with Hijack":    {wrapping(func(w http.ResponseWriter) http.ResponseWriter { return forwarding{plainWriter{w}} }), ""},
		"without either": {wrapping(func(w http.ResponseWriter) http.ResponseWriter { return plainWriter{w} }), "inner=mesh_test.plainWriter"},
		"TimeoutHandler": {func(next http.Handler) http.Handler { return http.TimeoutHandler(next, time.Minute, "late") }, "inner=*http.timeoutWriter"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log testlog.Logbook
			srv, web := behind(t, &log, c.middleware)
			dialer := tls.Dialer{Config: web.Client().Transport.(*http.Transport).TLSClientConfig.Clone()}
			dialer.Config.NextProtos = nil // HTTP/1.1, which browsers use for WebSockets
			client, err := meshtest.Dial("ws"+strings.TrimPrefix(web.URL, "https")+"/ws?token=SECRET", meshtest.WithNetDial(dialer.DialContext))
			if c.line == "" {
				require.NoError(t, err)
				defer client.Kill()
				assert.Equal(t, "a=1", client.Header().Get("Set-Cookie"))
				assert.NotEmpty(t, client.ID())
				assert.Equal(t, mesh.NoRefusedUpgrades(), srv.Stats().RefusedUpgrades)
				return
			}
			refused, ok := errors.AsType[*meshtest.HandshakeError](err)
			require.True(t, ok, "%v", err)
			assert.Equal(t, http.StatusInternalServerError, refused.Status)
			assert.Equal(t, noHijack, refused.Body)
			lines := refusalLines(&log)
			require.Len(t, lines, 1)
			assert.Contains(t, lines[0].Text, c.line)
			assert.EqualValues(t, 1, srv.Stats().RefusedUpgrades["500"])
		})
	}
}

// forwarding is a ResponseWriter that forwards Hijack.
type forwarding struct{ plainWriter }

func (f forwarding) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return f.ResponseWriter.(http.Hijacker).Hijack()
}

// TestHTTP2 checks that the answer to an upgrade by HTTP/2, as some proxies send it,
// has its own status and log line, and that a browser that opens the address causes no
// warning.
func TestHTTP2(t *testing.T) {
	t.Parallel()
	var log testlog.Logbook
	srv, web := behind(t, &log, func(next http.Handler) http.Handler { return next })
	get := func(h http.Header) (int, string) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, web.URL+"/ws", nil)
		require.NoError(t, err)
		r.Header = h
		resp, err := web.Client().Do(r)
		require.NoError(t, err)
		defer func() { _ = resp.Body.Close() }()
		require.Equal(t, 2, resp.ProtoMajor)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(body)
	}
	status, body := get(http.Header{})
	assert.Equal(t, http.StatusBadRequest, status, body)
	require.Empty(t, refusalLines(&log))
	status, body = get(http.Header{"Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}, "Sec-Websocket-Version": {"13"}})
	assert.Equal(t, http.StatusHTTPVersionNotSupported, status, body)
	lines := refusalLines(&log)
	require.Len(t, lines, 1)
	assert.Contains(t, lines[0].Text, "the request came by HTTP/2 status=505")
	assert.EqualValues(t, 1, srv.Stats().RefusedUpgrades["505"])
}

// TestLevelInTheURL checks that an invalid level is refused with a reason. A level above
// the server's newest is served at the newest. The answer to a subscribe request names
// the level.
func TestLevelInTheURL(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		for query, reason := range map[string]string{
			"?mesh-level=0": "mesh-level must be a whole number from 1 on", "?mesh-level=2&mesh-level=2": "mesh-level is given twice",
		} {
			s.Query = query
			_, resp, err := s.TryDial()
			require.Error(t, err)
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			assert.Equal(t, http.StatusBadRequest, resp.StatusCode)
			assert.Equal(t, reason, strings.TrimSpace(string(body)))
		}
		for query, level := range map[string]int{"": 1, "?mesh-level=1": 1, "?mesh-level=2": 2, "?token=x&mesh-level=99": 2} {
			s.Query = query
			var answer struct{ Level int }
			require.NoError(t, json.Unmarshal(s.Dial().Call("mesh/subscribe-presence", harness.InRoomPayload("lobby")), &answer))
			assert.Equal(t, level, answer.Level, query)
		}
	})
}

// brokenResponse is a ResponseWriter with a given Hijack.
type brokenResponse struct {
	*httptest.ResponseRecorder
	hijack func() (net.Conn, error)
}

func (r brokenResponse) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, err := r.hijack()
	if err != nil {
		return nil, nil, err
	}
	return conn, bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn)), nil
}
