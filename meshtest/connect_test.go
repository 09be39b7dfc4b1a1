package meshtest_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// The effects of OnConnection functions are there when Connect returns, also behind the
// app's own routes.
func TestConnectWaitsForOnConnection(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client(), func(o *mesh.Options) { o.Limits.CommandsPerSecond = 1 })
		var greeted atomic.Int32
		srv.OnConnection(func(ctx context.Context, c *mesh.Connection) {
			time.Sleep(20 * time.Millisecond)
			_ = srv.Presence().Join(ctx, "lobby", c.ID())
			_ = c.Send("app/hello", 1)
			greeted.Add(1)
		})
		mux := http.NewServeMux()
		mux.Handle("/socket", srv)
		server := meshtest.StartServer(t, mux, srv)
		for i := range 3 {
			c := server.Connect(t, meshtest.WithPath("/socket"))
			require.EqualValues(t, i+1, greeted.Load())
			in, err := srv.Rooms().Contains(t.Context(), "lobby", c.ID())
			require.NoError(t, err)
			require.True(t, in)
			c.NextPush("app/hello")
		}
		c, err := server.Dial(meshtest.WithPath("/socket"))
		require.NoError(t, err)
		require.EqualValues(t, 4, greeted.Load())
		c.Close()
	})
}

// If a function fails, Connect fails the test and says how the connection ended.
func TestConnectFailsWithOnConnection(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		srv.OnConnection(func(context.Context, *mesh.Connection) { panic("no") })
		server := meshtest.StartServer(t, srv)
		_, err := server.Dial()
		end, ok := errors.AsType[*meshtest.CloseError](err)
		require.True(t, ok, "%v", err)
		require.Equal(t, 1011, end.Code)
		require.Equal(t, `meshtest: connect: connection closed: 1011 "the connection could not be set up"`,
			failing(t, func(tb meshtest.TB) { server.Connect(tb) }))
		early := server.Connect(t, meshtest.WithEarlyReturn())
		require.NotEmpty(t, early.ID())
		require.Equal(t, 1011, early.AwaitClose().Code)
	})
}

// A function may close the connection on purpose. The test can then see how it ended.
func TestConnectWhileOnConnectionCloses(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		srv.OnConnection(func(_ context.Context, c *mesh.Connection) {
			_ = c.Close(4003, "banned")
			time.Sleep(20 * time.Millisecond)
		})
		server := meshtest.StartServer(t, srv)
		want := meshtest.CloseError{Code: 4003, Reason: "banned"}
		require.Equal(t, want, server.Connect(t).AwaitClose())
		c, err := server.Dial()
		require.NoError(t, err)
		require.Equal(t, want, c.AwaitClose())
	})
}

// If a function hangs, Connect gives up after the time of WithTimeout.
func TestConnectTimeout(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client(), func(o *mesh.Options) { o.HookTimeout = time.Hour })
		release := make(chan struct{})
		srv.OnConnection(func(ctx context.Context, _ *mesh.Connection) {
			select {
			case <-release:
			case <-ctx.Done():
			}
		})
		server := meshtest.StartServer(t, srv)
		began := time.Now()
		_, err := server.Dial(meshtest.WithTimeout(3 * time.Second))
		require.EqualError(t, err, "meshtest: the OnConnection functions have not returned within 3s")
		require.InDelta(t, 3*time.Second, time.Since(began), float64(time.Millisecond))

		early := server.Connect(t, meshtest.WithEarlyReturn())
		close(release)
		require.True(t, early.Join("lobby").Success)
	})
}

// In a bubble the leaves and the OnDisconnection functions are done when a method that
// ends a connection returns.
func TestClosingWaitsForTheEndOnTheServer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		var ended atomic.Int32
		srv.OnDisconnection(func(context.Context, *mesh.Connection, error) { ended.Add(1) })
		server := meshtest.StartServer(t, srv)
		for i, end := range []func(c *meshtest.Client){
			(*meshtest.Client).Close, (*meshtest.Client).Kill,
			func(c *meshtest.Client) {
				conn, _ := srv.Connection(c.ID())
				_ = conn.Close(4000, "")
				c.AwaitClose()
			},
		} {
			c := server.Connect(t)
			c.Join("lobby")
			end(c)
			require.EqualValues(t, i+1, ended.Load())
			count, err := srv.Presence().Count(t.Context(), "lobby")
			require.NoError(t, err)
			require.Zero(t, count)
		}
	})
}

// A client reaches a server that this package did not start, by each kind of URL, and does
// what it does with others.
func TestConnectByURL(t *testing.T) {
	t.Parallel()
	srv := newMesh(t, meshtest.StartRedis(t).Client(), func(o *mesh.Options) {
		o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
			if r.Header.Get("Authorization") == "" {
				return nil, mesh.Refuse(http.StatusForbidden, "sign in first")
			}
			return map[string]string{"name": r.Header.Get("Authorization")}, nil
		}
	})
	require.NoError(t, srv.Start(t.Context()))
	t.Cleanup(func() { require.NoError(t, srv.Shutdown(context.Background())) })
	var greeted atomic.Int32
	srv.OnConnection(func(context.Context, *mesh.Connection) {
		time.Sleep(20 * time.Millisecond)
		greeted.Add(1)
	})
	mux := http.NewServeMux()
	mux.Handle("/ws", srv)
	plain, secure := httptest.NewServer(mux), httptest.NewTLSServer(mux)
	t.Cleanup(func() {
		plain.Close()
		secure.Close()
	})
	trusting := tls.Dialer{Config: secure.Client().Transport.(*http.Transport).TLSClientConfig.Clone()}
	trusting.Config.NextProtos = nil
	ann := meshtest.Connect(t, plain.URL+"/ws", meshtest.WithHeader("Authorization", "Ann"), meshtest.WithLevel(2))
	require.EqualValues(t, 1, greeted.Load())
	require.Equal(t, 2, ann.Subscribe("lobby").Level)
	for i, dial := range []func() (*meshtest.Client, error){
		func() (*meshtest.Client, error) {
			return meshtest.Dial("ws"+strings.TrimPrefix(plain.URL, "http")+"/ws?a=b", meshtest.WithHeader("Authorization", "Bob"), meshtest.WithLevel(2))
		},
		func() (*meshtest.Client, error) {
			return meshtest.Dial("ws"+strings.TrimPrefix(secure.URL, "https")+"/ws", meshtest.WithHeader("Authorization", "Bob"),
				meshtest.WithNetDial(trusting.DialContext))
		},
	} {
		bob, err := dial()
		require.NoError(t, err)
		require.EqualValues(t, i+2, greeted.Load())
		require.JSONEq(t, `{"name":"Bob"}`, string(bob.Metadata()))
		bob.Join("lobby")
		ann.ExpectUpdate("join", "lobby", bob.ID())
		want := 1000
		if i == 0 {
			bob.Close()
			bob.Close() // does nothing
		} else {
			want = 1006
			bob.Kill()
		}
		ann.ExpectUpdate("leave", "lobby", bob.ID())
		<-bob.Done()
		require.Equal(t, want, bob.AwaitClose().Code)
	}

	_, err := meshtest.Dial(secure.URL + "/ws")
	require.ErrorContains(t, err, "certificate", "which nothing vouches for")
	_, err = meshtest.Dial(plain.URL + "/ws")
	refused, ok := errors.AsType[*meshtest.HandshakeError](err)
	require.True(t, ok, "%v", err)
	require.Equal(t, http.StatusForbidden, refused.Status)
	require.Equal(t, "meshtest: connect: handshake refused: 403 sign in first",
		failing(t, func(tb meshtest.TB) { meshtest.Connect(tb, plain.URL+"/ws") }))
	_, err = meshtest.Dial("ftp://127.0.0.1/ws")
	require.Error(t, err)
}

// A function given WithFrames gets each frame in order, and may keep it from the client.
func TestFrames(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client(), func(o *mesh.Options) { o.PingInterval = time.Second })
		srv.OnConnection(func(_ context.Context, c *mesh.Connection) { _ = c.Send("app/hello", 1) })
		server := meshtest.StartServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.SetCookie(w, &http.Cookie{Name: "server", Value: "1"})
			srv.ServeHTTP(w, r)
		}), srv)
		var mu sync.Mutex
		var seen []string
		watcher := server.Connect(t, meshtest.WithFrames(func(f meshtest.Frame) bool {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, f.Command)
			u, ok := f.Update()
			if ok {
				seen = append(seen, u.Type+" "+u.Room)
			}
			return u.Room == "attic" || f.Command == "mesh/assign-id"
		}))
		require.NotEmpty(t, watcher.ID())
		require.Equal(t, "server=1", watcher.Header().Get("Set-Cookie"))
		watcher.NextPush("app/hello")
		watcher.Subscribe("attic")
		watcher.Subscribe("lobby")
		ann := server.Connect(t)
		ann.Join("attic")
		ann.Join("lobby")
		watcher.ExpectUpdate("join", "lobby", ann.ID())
		watcher.Join("lobby")
		mu.Lock()
		require.Equal(t, []string{
			"mesh/assign-id", "app/hello", "mesh/noop", "mesh/subscribe-presence", "mesh/subscribe-presence",
			"mesh/presence-update", "join attic", "mesh/presence-update", "join lobby",
		}, seen[:9])
		mu.Unlock()

		pings := make(chan struct{}, 100)
		deaf := server.Connect(t, meshtest.WithFrames(func(f meshtest.Frame) bool {
			if f.Command == "ping" {
				pings <- struct{}{}
			}
			return f.Command == "ping"
		}))
		require.Equal(t, 1011, deaf.AwaitClose().Code, "it answered no ping")
		require.NotEmpty(t, pings)
		require.True(t, ann.Join("attic").Success, "others answer theirs")
	})
}

// WithNetDial makes the network connections, also in a bubble.
func TestConnectOverAnyNetwork(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		require.NoError(t, srv.Start(t.Context()))
		l := pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
		web := &http.Server{Handler: srv}
		served := make(chan error, 1)
		go func() { served <- web.Serve(l) }()
		c := meshtest.Connect(t, "ws://anywhere/", meshtest.WithNetDial(l.dial))
		c.Join("lobby")
		time.Sleep(time.Hour) // pings are answered
		count, err := srv.Presence().Count(t.Context(), "lobby")
		require.NoError(t, err)
		require.Equal(t, 1, count)
		select {
		case <-c.Done():
			require.FailNow(t, "it has ended")
		default:
		}
		require.NoError(t, srv.Shutdown(t.Context()))
		<-c.Done()
		require.Equal(t, 1012, c.AwaitClose().Code)
		require.NoError(t, web.Close())
		require.ErrorIs(t, <-served, http.ErrServerClosed)
	})
}

// pipes is a listener whose connections have no buffer.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l pipes) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if network != "tcp" || address != "anywhere:80" {
		return nil, errors.New("dialled " + network + " " + address)
	}
	near, far := net.Pipe()
	select {
	case l.conns <- far:
		return near, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l pipes) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l pipes) Close() error {
	close(l.closed)
	return nil
}

func (l pipes) Addr() net.Addr { return &net.TCPAddr{} }
