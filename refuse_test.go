package mesh_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
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
)

// refusedCase is a request that is refused: its answer, log line and counter.
type refusedCase struct {
	setup  func(*mesh.Options)
	ready  func(t *testing.T, s *harness.Server)                    // nil: nothing
	change func(r *http.Request)                                    // of a good request; nil: nothing
	writer func(rec *httptest.ResponseRecorder) http.ResponseWriter // nil: the recorder, which cannot be hijacked
	status int
	body   string
	level  slog.Level
	says   []string // in the line, in this order
	count  string   // the key of Stats.RefusedUpgrades; "": the status
	later  bool     // Retry-After
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

// authError has Authenticate return an error.
func authError(err error) func(*mesh.Options) {
	return auth(func(context.Context, *http.Request) (any, error) { return nil, err })
}

// plainWriter hides what a ResponseWriter has besides, as many a middleware does.
type plainWriter struct{ http.ResponseWriter }

// unwrapping can be unwrapped.
type unwrapping struct{ plainWriter }

func (u unwrapping) Unwrap() http.ResponseWriter { return u.ResponseWriter }

// looping unwraps to itself.
type looping struct{ plainWriter }

func (c looping) Unwrap() http.ResponseWriter { return c }

func hijacking(hijack func() (net.Conn, error)) func(*httptest.ResponseRecorder) http.ResponseWriter {
	return func(rec *httptest.ResponseRecorder) http.ResponseWriter { return brokenResponse{rec, hijack} }
}

const (
	sorry     = "Internal Server Error"
	noHijack  = "WebSocket upgrades do not work here: see the server's log"
	dangerous = "\u202e\x1b[31m\n"
)

var refusedCases = map[string]refusedCase{
	"a browser": {
		change: func(r *http.Request) { r.Header = http.Header{} },
		status: 400, body: "a WebSocket upgrade is expected here", level: slog.LevelDebug, says: []string{"not a WebSocket request"},
	},
	"a proxy that drops both headers": {
		change: func(r *http.Request) {
			r.Proto, r.ProtoMinor = "HTTP/1.0", 0
			r.Header.Del("Upgrade")
			r.Header.Set("Connection", "close")
		},
		status: 400, body: "a WebSocket upgrade is expected here: the header Upgrade or Connection is missing", level: slog.LevelWarn,
		says: []string{"proto=HTTP/1.0", "proxy_http_version 1.1", "proxy_set_header Upgrade $http_upgrade", `proxy_set_header Connection "upgrade"`},
	},
	"a proxy that drops one header": {
		change: header("Connection", "keep-alive"),
		status: 400, body: "a WebSocket upgrade is expected here: the header Upgrade or Connection is missing", level: slog.LevelWarn,
		says: []string{"proto=HTTP/1.1", "proxy_http_version 1.1"},
	},
	"a proxy that drops all but the Upgrade": {
		change: func(r *http.Request) { r.Header = http.Header{"Upgrade": {"websocket"}} },
		status: 400, body: "a WebSocket upgrade is expected here: the header Upgrade or Connection is missing", level: slog.LevelWarn,
		says: []string{"proxy_http_version 1.1"},
	},
	"HTTP/2": {
		change: func(r *http.Request) {
			r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0
			r.Header.Del("Upgrade")
			r.Header.Del("Connection")
		},
		status: 505, body: "a WebSocket upgrade needs HTTP/1.1", level: slog.LevelWarn, says: []string{"HTTP/2", "proxy", "HTTP/1.1"},
	},
	"extended CONNECT": {
		change: func(r *http.Request) {
			r.Method, r.Proto, r.ProtoMajor, r.ProtoMinor = http.MethodConnect, "HTTP/2.0", 2, 0
			r.Header = http.Header{":protocol": {"websocket"}}
		},
		status: 505, body: "a WebSocket upgrade needs HTTP/1.1", level: slog.LevelWarn, says: []string{"HTTP/2"},
	},
	"a browser by HTTP/2": {
		change: func(r *http.Request) {
			r.ProtoMajor, r.Header = 2, http.Header{}
		},
		status: 400, body: "a WebSocket upgrade is expected here", level: slog.LevelDebug, says: []string{"not a WebSocket request"},
	},
	"the method": {
		change: func(r *http.Request) { r.Method = "PO" + dangerous + "ST" },
		status: 405, body: "a WebSocket upgrade has method GET", level: slog.LevelWarn, says: []string{"method=PO??[31m?ST"},
	},
	"the version": {
		change: header("Sec-WebSocket-Version", "8"+dangerous),
		status: 400, body: "WebSocket version 13 is expected here", level: slog.LevelWarn, says: []string{"version=8??[31m?"},
	},
	"the key": {
		change: header("Sec-WebSocket-Key", "SECRET"),
		status: 400, body: "Sec-WebSocket-Key must be 16 bytes in base64", level: slog.LevelWarn, says: []string{"Sec-WebSocket-Key"},
	},
	"what only the upgrader finds": { // and writes no log line by itself
		change: header("Sec-WebSocket-Version", "8 9, 13"),
		status: 400, body: "Bad Request", level: slog.LevelWarn, says: []string{"handshake is invalid", "version"},
	},
	"another host behind nginx": {
		change: func(r *http.Request) {
			r.Host = "backend"
			r.Header.Set("Origin", "https://app.example.com:8443")
			r.Header.Set("X-Forwarded-Host", "app.example.com:8443")
		},
		status: 403, body: "the origin is not allowed", level: slog.LevelWarn,
		says: []string{
			"origin=https://app.example.com:8443", "host=backend", "x_forwarded_host=app.example.com:8443", "Options.AllowedOrigins",
			"proxy_set_header Host $http_host;",
		},
	},
	"an origin that is not listed": {
		setup:  func(o *mesh.Options) { o.AllowedOrigins = []string{"https://example.com"} },
		change: header("Origin", "https://user:SECRET@app.example.com/SECRET?SECRET#SECRET"),
		status: 403, body: "the origin is not allowed", level: slog.LevelWarn,
		says: []string{"origin=https://app.example.com ", "host=127.0.0.1", "Options.AllowedOrigins", "the server's own has to be listed"},
	},
	"no origin at all": {
		change: header("Origin", "null"), status: 403, body: "the origin is not allowed", level: slog.LevelWarn,
		says: []string{"the page has no origin", "origin=null", "sandboxed frame", "only the pattern *"},
	},
	"a malformed origin": {
		change: header("Origin", "SECRET"+dangerous), status: 403, body: "the origin is not allowed", level: slog.LevelWarn,
		says: []string{"origin=malformed"},
	},
	"a long origin and host": {
		change: func(r *http.Request) {
			r.Header.Set("Origin", "https://"+strings.Repeat("x", 1<<16))
			r.Host = "SECRET@" + dangerous + strings.Repeat("y", 1<<16) + "/?SECRET"
		},
		status: 403, body: "the origin is not allowed", level: slog.LevelWarn, says: []string{"origin=https://xxx", "…", "host=??[31m?yyy", "…"},
	},
	"a Refusal": {
		setup: authError(mesh.Refuse(403, "not today")), status: 403, body: "not today", level: slog.LevelInfo,
		says: []string{"Authenticate returned a Refusal", "status=403"},
	},
	"a Refusal for an outage": {
		setup: authError(errors.Join(context.DeadlineExceeded, mesh.Refuse(502, "no database"))), status: 502, body: "no database",
		level: slog.LevelWarn, says: []string{"Authenticate returned a Refusal", "status=502"}, count: "5xx",
	},
	"a Refusal of a rare status": {setup: authError(mesh.Refuse(418, "tea")), status: 418, body: "tea", level: slog.LevelInfo, count: "4xx"},
	"an error": {
		setup: authError(errors.New("unknown key of https://user:SECRET@idp.example.com/x?token=SECRET")), status: 401, body: "Unauthorized",
		level: slog.LevelWarn,
		says:  []string{"Authenticate returned an error", "error=unknown key of https://[hidden]@idp.example.com/x?[hidden]", "mesh.Refuse"},
	},
	"an error with what the client sent": {
		setup: auth(func(_ context.Context, r *http.Request) (any, error) {
			return nil, fmt.Errorf("bad %s, %s"+dangerous, r.Header.Get("Authorization"), r.URL.Query().Get("ticket"))
		}),
		change: func(r *http.Request) {
			r.Header.Set("Authorization", "Bearer SECRET.token")
			r.URL.RawQuery = "ticket=SECRET%20ticket"
		},
		status: 401, body: "Unauthorized", level: slog.LevelWarn, says: []string{"error=bad [hidden], [hidden]"},
	},
	"a network error": {
		setup:  authError(fmt.Errorf("sessions: %w", &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED})),
		status: 500, body: sorry, level: slog.LevelWarn,
		says: []string{"Authenticate failed for an outage", "error=sessions: dial tcp: connection refused"},
	},
	"a panic": {
		setup:  auth(func(context.Context, *http.Request) (any, error) { panic("sesame") }),
		status: 500, body: sorry, level: slog.LevelWarn, says: []string{"Authenticate panicked"},
	},
	"a hook that hangs": {
		setup:  auth(func(ctx context.Context, _ *http.Request) (any, error) { <-ctx.Done(); return nil, ctx.Err() }),
		status: 500, body: sorry, level: slog.LevelWarn, says: []string{"did not return in time", "after=1s", "HookTimeout"},
	},
	"metadata that do not encode": {
		setup:  auth(func(context.Context, *http.Request) (any, error) { return make(chan int), nil }),
		status: 500, body: sorry, level: slog.LevelWarn, says: []string{"do not encode to JSON", "chan int"},
	},
	"metadata that are too large": {
		setup: func(o *mesh.Options) {
			auth(func(context.Context, *http.Request) (any, error) { return strings.Repeat("SECRET", 100), nil })(o)
			o.Limits.MetadataBytes = 100
		},
		status: 500, body: sorry, level: slog.LevelWarn, says: []string{"too large", "602 bytes, limit 100", "Limits.MetadataBytes"},
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
		status: 499, body: "the client has gone", level: slog.LevelDebug, says: []string{"the client has gone"},
	},
	"too many calls": {
		ready:  func(_ *testing.T, s *harness.Server) { s.SetAuthenticating(mesh.AuthsAtOnce) },
		setup:  authError(nil),
		status: 503, body: "too many requests are being authenticated", level: slog.LevelWarn, later: true,
		says: []string{"too many calls of Authenticate", "calls=1024"},
	},
	"too many connections": {
		setup: func(o *mesh.Options) { o.Limits.Connections = 1 }, ready: func(_ *testing.T, s *harness.Server) { s.Dial() },
		status: 503, body: "too many connections", level: slog.LevelWarn, later: true, says: []string{"full", "limit=1", "Limits.Connections"},
	},
	"too many upgrades": {
		setup: func(o *mesh.Options) { o.Limits.UpgradesPerSecond = 1 },
		ready: func(t *testing.T, s *harness.Server) {
			take := func() { assert.NoError(t, s.TakeUpgrade()) }
			take()
			time.AfterFunc(limit.LogEvery-time.Second/2, take) // before it is asked again
		},
		status: 503, body: "too many new connections", level: slog.LevelWarn, later: true,
		says: []string{"too many new connections in a second", "limit=1", "Limits.UpgradesPerSecond"},
	},
	"draining": {
		ready:  func(t *testing.T, s *harness.Server) { require.NoError(t, s.Drain(t.Context(), 0)) },
		status: 503, body: "the server is shutting down", level: slog.LevelInfo, later: true, says: []string{"draining"},
	},
	"shut down": {
		ready:  func(_ *testing.T, s *harness.Server) { s.End() },
		status: 503, body: "the server is shutting down", level: slog.LevelInfo, later: true, says: []string{"shut down"},
	},
	"a writer that cannot be hijacked": {
		status: 500, body: noHijack, level: slog.LevelWarn,
		says: []string{"cannot be hijacked", "writer=*httptest.ResponseRecorder", "inner=*httptest.ResponseRecorder", "Unwrap()", "http.Hijacker"},
	},
	"a middleware that hides it": {
		writer: func(rec *httptest.ResponseRecorder) http.ResponseWriter {
			return unwrapping{plainWriter{plainWriter{rec}}}
		},
		status: 500, body: noHijack, level: slog.LevelWarn,
		says: []string{"cannot be hijacked", "writer=mesh_test.unwrapping", "inner=mesh_test.plainWriter", "Unwrap()"},
	},
	"a middleware that unwraps to itself": {
		writer: func(rec *httptest.ResponseRecorder) http.ResponseWriter { return looping{plainWriter{rec}} },
		status: 500, body: noHijack, level: slog.LevelWarn, says: []string{"cannot be hijacked", "writer=mesh_test.looping"},
	},
	"a hijack that is not supported": {
		writer: hijacking(func() (net.Conn, error) { return nil, fmt.Errorf("wrapped: %w", http.ErrNotSupported) }),
		status: 500, body: noHijack, level: slog.LevelWarn, says: []string{"cannot be hijacked", "writer=mesh_test.brokenResponse"},
	},
	"a hijack that fails": {
		writer: hijacking(func() (net.Conn, error) { return nil, http.ErrHijacked }),
		status: 500, body: noHijack, level: slog.LevelWarn,
		says: []string{"Hijack of the ResponseWriter failed", "writer=mesh_test.brokenResponse", "error=http: connection has been hijacked"},
	},
	"a hijack of nothing": {
		writer: func(rec *httptest.ResponseRecorder) http.ResponseWriter { return nothingThere{rec} },
		status: 500, body: noHijack, level: slog.LevelWarn, says: []string{"no connection"},
	},
	"a client that does not take the answer": {
		writer: hijacking(func() (net.Conn, error) {
			a, b := net.Pipe()
			return a, b.Close()
		}),
		status: 200, count: "499", level: slog.LevelInfo, says: []string{"could not be written", "error="},
	},
}

// nothingThere gives no connection away.
type nothingThere struct{ *httptest.ResponseRecorder }

func (nothingThere) Hijack() (net.Conn, *bufio.ReadWriter, error) { return nil, nil, nil }

// TestRefusedUpgradesSayWhy: every refusal has its status, a body that helps, one line
// of the log in ten seconds with the remedy, and its counter.
func TestRefusedUpgradesSayWhy(t *testing.T) {
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
				for _, held := range first[1:] {
					assert.Equal(t, slog.LevelDebug, held.Level, "held back")
				}
				at := 0
				for _, text := range c.says {
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

// ask makes the request once and checks its answer.
func (c refusedCase) ask(t *testing.T, s *harness.Server) {
	t.Helper()
	r, rec := handshake(t), httptest.NewRecorder()
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

// refusalLines returns the lines about refused upgrades, at any level.
func refusalLines(b *testlog.Logbook) (lines []testlog.LogLine) {
	for _, l := range b.Written() {
		if strings.HasPrefix(l.Text, "mesh: upgrade refused: ") {
			lines = append(lines, l)
		}
	}
	return lines
}

// Before Start there is nothing to be connected to.
func TestRefusedBeforeStart(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var log testlog.Logbook
		opts := w.Options()
		opts.Logger = slog.New(&log)
		s, err := mesh.NewServer(opts)
		require.NoError(t, err)
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, handshake(t))
		assert.Equal(t, http.StatusServiceUnavailable, rec.Code)
		assert.Equal(t, "the server is starting\n", rec.Body.String())
		require.EqualValues(t, 1, log.Told("mesh: upgrade refused: the server has not been started status=503"))
		assert.EqualValues(t, 1, s.Stats().RefusedUpgrades["503"])
	})
}

// A ResponseWriter that panics costs one request, which counts once.
func TestPanickingWriterIsCountedOnce(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		for range 2 {
			rec := httptest.NewRecorder()
			s.ServeHTTP(brokenResponse{rec, func() (net.Conn, error) { panic("no") }}, handshake(t))
			require.Equal(t, http.StatusInternalServerError, rec.Code)
		}
		r := handshake(t)
		r.Header.Set("Origin", "https://evil.example.com")
		s.ServeHTTP(panicsOnWrite{}, r) // the refusal itself cannot be written
		want := mesh.NoRefusedUpgrades()
		want["500"] = 3
		assert.Equal(t, want, s.Stats().RefusedUpgrades)
	})
}

type panicsOnWrite struct{}

func (panicsOnWrite) Header() http.Header { return http.Header{} }

func (panicsOnWrite) Write([]byte) (int, error) { panic("no") }

func (panicsOnWrite) WriteHeader(int) { panic("no") }
