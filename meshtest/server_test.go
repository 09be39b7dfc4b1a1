package meshtest_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// inBoth runs a test in a bubble and in real time.
func inBoth(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	t.Run("bubble", func(t *testing.T) { inBubble(t, test) })
	t.Run("real time", func(t *testing.T) {
		t.Parallel()
		test(t)
	})
}

// newMesh returns a server that tracks all rooms.
func newMesh(t *testing.T, client *redis.Client, setup ...func(*mesh.Options)) *mesh.Server {
	t.Helper()
	opts := mesh.Options{Redis: client}
	for _, f := range setup {
		f(&opts)
	}
	srv, err := mesh.NewServer(opts)
	require.NoError(t, err)
	track(t, srv, ".*", mesh.PresenceOptions{})
	return srv
}

func track(t *testing.T, srv *mesh.Server, expr string, opts mesh.PresenceOptions) {
	t.Helper()
	require.NoError(t, srv.TrackPresence(mesh.Regexp(regexp.MustCompile(expr)), opts))
}

func TestTwoServersOnOneRedis(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		one := meshtest.StartServer(t, newMesh(t, r.Client()))
		two := meshtest.StartServer(t, newMesh(t, r.Client()))
		ann, bob := one.Connect(t), two.Connect(t)
		require.True(t, bob.Subscribe("lobby").Success)
		require.Equal(t, []string{ann.ID()}, ann.Join("lobby").IDs())
		bob.ExpectUpdate("join", "lobby", ann.ID())
		ann.Kill()
		bob.ExpectUpdate("leave", "lobby", ann.ID())
	})
}

func TestKillServer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		client := r.Client()
		one := meshtest.StartServer(t, newMesh(t, client))
		two := meshtest.StartServer(t, newMesh(t, r.Client()))
		ann, bob := one.Connect(t), two.Connect(t)
		ann.Join("lobby")
		require.Equal(t, []string{ann.ID()}, bob.Subscribe("lobby").IDs())

		time.Sleep(time.Minute) // so that the first renewals are over
		began := time.Now()
		one.Kill(r, client)
		require.Equal(t, meshtest.CloseError{Code: 1006}, ann.AwaitClose())
		_, err := one.Dial()
		require.ErrorContains(t, err, "connection refused")
		bob.NoUpdate(6 * time.Second) // LeaseTTL, less the third of it after which the lease is renewed
		bob.ExpectUpdate("leave", "lobby", ann.ID())
		require.LessOrEqual(t, time.Since(began), 11*time.Second)
		bob.NoUpdate(time.Minute)
	})
}

// The shutdown of a server that stays killed takes little time.
func TestKillServerInRealTime(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	client := r.Client()
	server := meshtest.StartServer(t, newMesh(t, client))
	ann := server.Connect(t)
	ann.Join("lobby")
	server.Kill(r, client)
	require.Equal(t, 1006, ann.AwaitClose().Code)
	_, err := ann.Call("mesh/noop", nil)
	closed, ok := errors.AsType[*meshtest.CloseError](err)
	require.True(t, ok, "%v", err)
	require.Equal(t, 1006, closed.Code)
}

func TestCutClientCutsOnlyThatClient(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		client, other := r.Client(), r.Client()
		one := meshtest.StartServer(t, newMesh(t, client))
		two := meshtest.StartServer(t, newMesh(t, other))
		ann, bob := one.Connect(t), two.Connect(t)

		require.NoError(t, r.CutClient(client))
		joined := ann.Join("lobby")
		require.True(t, joined.Success && joined.Stale && joined.Has(ann.ID()))
		require.True(t, bob.Join("lobby").Success)
		require.True(t, bob.Subscribe("lobby").Success)
		bob.NoUpdate(time.Minute)

		require.NoError(t, r.HealClient(client))
		bob.ExpectUpdate("join", "lobby", ann.ID()) // the join that Redis did not have yet

		stranger := redis.NewClient(r.Options())
		defer func() { require.NoError(t, stranger.Close()) }()
		require.Error(t, r.CutClient(stranger))
		require.Error(t, r.HealClient(stranger))
	})
}

func TestServeHandlerOfTheApp(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client(), func(o *mesh.Options) {
			o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
				cookie, err := r.Cookie("session")
				if err != nil {
					return nil, mesh.Refuse(http.StatusForbidden, "sign in first")
				}
				return map[string]string{"user": cookie.Value, "from": r.URL.Query().Get("from")}, nil
			}
		})
		mux := http.NewServeMux()
		mux.Handle("/live", srv)
		mux.HandleFunc("POST /login", func(w http.ResponseWriter, _ *http.Request) {
			http.SetCookie(w, &http.Cookie{Name: "session", Value: "ann", Path: "/"})
		})
		guarded := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if host, _, err := net.SplitHostPort(r.RemoteAddr); err != nil || host != "127.0.0.1" {
				t.Errorf("remote address %q: %v", r.RemoteAddr, err)
			}
			if r.Header.Get("X-Version") != "2" && r.URL.Path == "/live" {
				http.Error(w, "too old", http.StatusUpgradeRequired)
				return
			}
			mux.ServeHTTP(w, r)
		})
		server := meshtest.StartServer(t, guarded, srv)

		_, err := server.Dial()
		refused, ok := errors.AsType[*meshtest.HandshakeError](err)
		require.True(t, ok, "%v", err)
		require.Equal(t, http.StatusNotFound, refused.Status, "the server is not at /ws")

		_, err = server.Dial(meshtest.WithPath("/live"))
		require.EqualError(t, err, "meshtest: handshake refused: 426 too old")

		version := meshtest.WithHeader("X-Version", "2")
		_, err = server.Dial(meshtest.WithPath("/live"), version)
		require.EqualError(t, err, "meshtest: handshake refused: 403 sign in first")

		jar, err := cookiejar.New(nil)
		require.NoError(t, err)
		web := server.HTTPClient()
		web.Jar = jar
		res, err := web.Post(server.URL()+"/login", "", nil)
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, res.Body)
		require.NoError(t, errors.Join(err, res.Body.Close()))
		require.Len(t, jar.Cookies(res.Request.URL), 1)
		cookie := meshtest.WithHeader("Cookie", jar.Cookies(res.Request.URL)[0].String())
		ann := server.Connect(t, meshtest.WithPath("/live?from=page"), version, cookie)
		require.JSONEq(t, `{"user":"ann","from":"page"}`, string(ann.Metadata()))
	})
}

// The app upgrades by itself and speaks a protocol of its own beside Mesh's.
func TestServeConnWithAnotherProtocol(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		upgrader := websocket.Upgrader{Subprotocols: []string{"v2.app"}}
		server := meshtest.StartServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ws, err := upgrader.Upgrade(w, r, nil)
			if err != nil {
				return
			}
			if ws.WriteMessage(websocket.BinaryMessage, []byte("hello")) != nil {
				return
			}
			_ = srv.ServeConn(r.Context(), ws, mesh.ConnOptions{Foreign: func(c *mesh.Connection, kind int, data []byte) {
				_ = c.Send("app/echo", strings.ToUpper(string(data)))
			}})
		}), srv)
		ann := server.Connect(t, meshtest.WithSubprotocols("v3.app", "v2.app"))
		require.Equal(t, "v2.app", ann.Subprotocol())
		kind, data := ann.NextMessage()
		require.Equal(t, websocket.BinaryMessage, kind)
		require.Equal(t, "hello", string(data))
		require.NoError(t, ann.Write(websocket.TextMessage, []byte("not mesh's")))
		require.Equal(t, `"NOT MESH'S"`, string(ann.NextPush("app/echo")))
	})
}

func TestLevels(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		server := meshtest.StartServer(t, srv)
		for want, opts := range map[int][]meshtest.ConnectOption{
			1: nil, 2: {meshtest.WithLevel(2), meshtest.WithPath("/ws?a=b")},
		} {
			c := server.Connect(t, opts...)
			answer, err := c.Call("mesh/unsubscribe-presence", map[string]any{"roomName": "lobby"})
			if want == 1 {
				require.NoError(t, err)
				require.Equal(t, "false", string(answer))
				require.False(t, c.PublishState("lobby", map[string]any{}, meshtest.StateOptions{}))
			} else {
				require.Equal(t, "ENOTFOUND", meshtest.CodeOf(err))
			}
			require.Equal(t, want, c.Subscribe("lobby").Level)
		}
	})
}

func TestShutdownIsSeen(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		server := meshtest.StartServer(t, srv)
		ann := server.Connect(t)
		require.NoError(t, srv.Shutdown(t.Context()))
		require.Equal(t, meshtest.CloseError{Code: 1012, Reason: "server is restarting"}, ann.AwaitClose())
		_, err := server.Dial()
		refused, ok := errors.AsType[*meshtest.HandshakeError](err)
		require.True(t, ok, "%v", err)
		require.Equal(t, http.StatusServiceUnavailable, refused.Status)
		require.Equal(t, "2", refused.Header.Get("Retry-After"))
	})
}

func TestServerWithoutATest(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	server, err := meshtest.NewServer(newMesh(t, r.Client()))
	require.NoError(t, err)
	ann, err := server.Dial()
	require.NoError(t, err)
	require.True(t, ann.Join("lobby").Success)
	require.Panics(t, func() { ann.SetMetadata("mine", "") }, "refused without a test")
	require.NoError(t, server.Close())
	require.Equal(t, 1012, ann.AwaitClose().Code)
	ann.Close()
	require.NoError(t, server.Close())
	_, err = server.Dial()
	require.Error(t, err)

	_, err = meshtest.NewServer(nil)
	require.Error(t, err)
}

// part is a Lifecycle that records its calls.
type part struct {
	name string
	err  error
	log  *[]string
}

func (p part) Start(context.Context) error {
	*p.log = append(*p.log, "start "+p.name)
	return p.err
}

func (p part) Shutdown(context.Context) error {
	*p.log = append(*p.log, "stop "+p.name)
	return p.err
}

func TestPartsAreStartedInOrder(t *testing.T) {
	t.Parallel()
	var log []string
	server, err := meshtest.NewServer(http.NotFoundHandler(), part{"a", nil, &log}, part{"b", nil, &log})
	require.NoError(t, err)
	require.NoError(t, server.Close())
	require.Equal(t, []string{"start a", "start b", "stop b", "stop a"}, log)

	log = nil
	broken := errors.New("broken")
	_, err = meshtest.NewServer(http.NotFoundHandler(), part{"a", nil, &log}, part{"b", broken, &log}, part{"c", nil, &log})
	require.ErrorIs(t, err, broken)
	require.Equal(t, []string{"start a", "start b", "stop b", "stop a"}, log)
}

func TestConnectOptionsAreChecked(t *testing.T) {
	t.Parallel()
	server := meshtest.StartServer(t, http.NotFoundHandler())
	for name, opt := range map[string]meshtest.ConnectOption{
		"path":    meshtest.WithPath("ws"),
		"timeout": meshtest.WithTimeout(0),
		"level":   meshtest.WithLevel(0),
		"dial":    meshtest.WithNetDial(nil),
		"frames":  meshtest.WithFrames(nil),
	} {
		_, err := server.Dial(opt)
		require.ErrorIs(t, err, meshtest.ErrOption, name)
		_, err = meshtest.Dial("ws://127.0.0.1:1/", opt)
		require.ErrorIs(t, err, meshtest.ErrOption, name)
	}
	_, err := server.Dial(meshtest.WithNetDial(new(net.Dialer).DialContext))
	require.ErrorIs(t, err, meshtest.ErrOption, "in memory only")
	_, err = meshtest.Dial("ws://127.0.0.1:1", meshtest.WithPath("/ws"))
	require.ErrorIs(t, err, meshtest.ErrOption, "the path is in the URL")
}

// If no connection id comes, the error says so.
func TestDialAnotherKindOfServer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		var upgrader websocket.Upgrader
		server := meshtest.StartServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ws, err := upgrader.Upgrade(w, r, nil)
			if err != nil {
				return
			}
			if r.URL.Path == "/bye" {
				_ = ws.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(4000, "bye"))
			}
			_, _, _ = ws.ReadMessage() // until the client closes
			_ = ws.Close()
		}))
		_, err := server.Dial(meshtest.WithTimeout(time.Minute))
		require.EqualError(t, err, "meshtest: no connection id within 1m0s")
		_, err = server.Dial(meshtest.WithPath("/bye"))
		require.EqualError(t, err, `meshtest: connection closed: 4000 "bye"`)
	})
}

func decode[T any](t *testing.T, data json.RawMessage) (v T) {
	t.Helper()
	require.NoError(t, json.Unmarshal(data, &v))
	return v
}
