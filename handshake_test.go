package mesh_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/meshtest"
)

func TestSubprotocols(t *testing.T) {
	t.Parallel()
	const token = "SECRET-token.1"
	for name, c := range map[string]struct {
		supported []string
		offers    []string // values of the header
		chosen    string
		warns     bool // if the client is a browser
	}{
		"none on either side":     {},
		"nothing offered":         {supported: []string{"mesh"}},
		"a token beside it":       {[]string{"mesh"}, []string{"mesh, " + token}, "mesh", false},
		"a token before it":       {[]string{"mesh"}, []string{token + ",mesh"}, "mesh", false},
		"several headers":         {[]string{"mesh"}, []string{token, "mesh"}, "mesh", false},
		"the server's preference": {[]string{"v2.mesh", "v1.mesh"}, []string{"v1.mesh, v2.mesh"}, "v2.mesh", false},
		"no common one":           {[]string{"mesh"}, []string{token}, "", true},
		"none supported":          {nil, []string{"mesh, " + token}, "", true},
		"case counts":             {[]string{"mesh"}, []string{"MESH"}, "", true},
		"a part of one":           {[]string{"mesh"}, []string{"mesh2, xmesh, mesh x"}, "", true},
		"malformed":               {[]string{"mesh"}, []string{",, ;\"mesh\""}, "", true},
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
						require.Zero(t, log.Told(warning), "not for clients that are no browsers")
						h.Set("Origin", origin)
					}
					p, resp, err := s.TryDial(h)
					require.NoError(t, err)
					assert.Equal(t, c.offers, seen)
					assert.Equal(t, c.chosen, p.WS.Subprotocol())
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

// What was set on the ResponseWriter before ServeHTTP is in the 101, but for what is
// the handshake's own, and nothing in it can end the header or begin another.
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

// Data that come before the answer are answered, too, and their connection ends.
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
		require.Error(t, err, "it is closed")
		w.Sleep(time.Millisecond)
		lines := refusalLines(&log)
		require.Len(t, lines, 1)
		assert.Equal(t, slog.LevelWarn, lines[0].Level)
		assert.Contains(t, lines[0].Text, "sent data before the answer status=400 bytes=6")
		assert.EqualValues(t, 1, s.Stats().RefusedUpgrades["400"])
		assert.Equal(t, [2]int{}, s.Places())
	})
}

// behind starts an HTTP server of net/http with a middleware before a mesh server.
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

// TestMiddlewares: a WebSocket of a real server of net/http, behind middlewares that
// wrap the ResponseWriter.
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
		says       string // "": it is upgraded
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
			tls := web.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
			tls.NextProtos = nil // as browsers do for WebSockets: HTTP/1.1
			d := websocket.Dialer{TLSClientConfig: tls}
			ws, resp, err := d.DialContext(t.Context(), "wss"+strings.TrimPrefix(web.URL, "https")+"/ws?token=SECRET", nil)
			if c.says == "" {
				require.NoError(t, err)
				defer func() { _ = ws.Close() }()
				assert.Equal(t, "a=1", resp.Header.Get("Set-Cookie"))
				var first harness.Frame
				require.NoError(t, ws.ReadJSON(&first))
				assert.Equal(t, "mesh/assign-id", first.Command)
				assert.Equal(t, mesh.NoRefusedUpgrades(), srv.Stats().RefusedUpgrades)
				return
			}
			require.ErrorIs(t, err, websocket.ErrBadHandshake)
			assert.Equal(t, http.StatusInternalServerError, resp.StatusCode)
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			assert.Equal(t, noHijack+"\n", string(body))
			lines := refusalLines(&log)
			require.Len(t, lines, 1)
			assert.Contains(t, lines[0].Text, c.says)
			assert.EqualValues(t, 1, srv.Stats().RefusedUpgrades["500"])
		})
	}
}

// forwarding forwards Hijack.
type forwarding struct{ plainWriter }

func (f forwarding) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return f.ResponseWriter.(http.Hijacker).Hijack()
}

// TestHTTP2: a proxy that speaks HTTP/2 to the server is told why that fails, and a
// browser that looks at the address is no warning.
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
