package mesh_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// brokenResponse cannot be upgraded, each in a way of its own.
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

// However requests and connections end, also while the server shuts down, none is
// counted for ever and none is counted out twice.
func TestCountsOfConnections(t *testing.T) {
	t.Parallel()
	hijacks := []func() (net.Conn, error){
		func() (net.Conn, error) { panic("no") },
		func() (net.Conn, error) { panic(http.ErrAbortHandler) },
		func() (net.Conn, error) { return nil, errors.New("no") },
		func() (net.Conn, error) { // is closed before the answer is written
			a, b := net.Pipe()
			return a, errors.Join(a.Close(), b.Close())
		},
		func() (net.Conn, error) { // is closed after it
			a, b := net.Pipe()
			go func() {
				_, _ = b.Read(make([]byte, 4096))
				_ = b.Close()
			}()
			return a, nil
		},
	}
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.Connections, l.UpgradesPerSecond = 20, 1000 }), func(o *mesh.Options) {
			o.HookTimeout = time.Second
			o.Authenticate = func(ctx context.Context, r *http.Request) (any, error) {
				time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
				switch rand.IntN(10) {
				case 0:
					return nil, errors.New("no")
				case 1:
					panic("no")
				case 2:
					time.Sleep(4 * time.Second) // late, whatever its context says
				}
				return nil, nil
			}
		})
		var all sync.WaitGroup
		start := func() {
			all.Go(func() {
				defer func() { _ = recover() }() // as net/http does
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if rand.IntN(4) == 0 {
					time.AfterFunc(5*time.Millisecond, cancel)
				}
				rec := brokenResponse{httptest.NewRecorder(), hijacks[rand.IntN(len(hijacks))]}
				s.ServeHTTP(rec, handshake(t).WithContext(ctx))
			})
		}
		for range 300 {
			start()
			w.Sleep(time.Duration(rand.IntN(4)) * time.Millisecond)
			places := s.Places()
			open, taken := places[0], places[1]
			require.True(t, 0 <= taken && taken <= 20 && taken <= open, "%d of %d", taken, open)
		}
		all.Wait()
		w.Sleep(30 * time.Second)
		assert.Equal(t, [2]int{}, s.Places())
		assert.Zero(t, s.Authenticating())
		for range 50 {
			start()
		}
		w.Sleep(time.Millisecond)
		require.NoError(t, s.Shutdown(t.Context()))
		all.Wait()
		w.Sleep(30 * time.Second)
		assert.Equal(t, [2]int{}, s.Places())
		assert.Zero(t, s.Authenticating())
	})
}

// Hooks that end with their context do not make Shutdown fail, however long they
// may take.
func TestShutdownEndsHooks(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.HookTimeout = time.Minute })
		var ended atomic.Int32
		s.OnConnection(func(ctx context.Context, _ *mesh.Connection) {
			<-ctx.Done()
			ended.Add(1)
		})
		s.OnDisconnection(func(context.Context, *mesh.Connection, error) { ended.Add(1) })
		s.Dial()
		s.Dial()
		begun := time.Now()
		require.NoError(t, s.Shutdown(t.Context()))
		assert.LessOrEqual(t, time.Since(begun), 7*time.Second)
		assert.EqualValues(t, 4, ended.Load())
	})
}

// noWrites is a network connection that panics once it is broken.
type noWrites struct {
	net.Conn
	broken, closed atomic.Bool
}

func (c *noWrites) Write(p []byte) (int, error) {
	if c.broken.Load() {
		panic("no writes")
	}
	return c.Conn.Write(p)
}

func (c *noWrites) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

// A WebSocket that is not served is closed, also if it cannot be told why.
func TestTurnedAwayIsClosed(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		here, there := net.Pipe()
		defer there.Close()
		go func() { _, _ = io.Copy(io.Discard, there) }()
		conn := &noWrites{Conn: here}
		rec := brokenResponse{httptest.NewRecorder(), func() (net.Conn, error) { return conn, nil }}
		ws, err := new(websocket.Upgrader).Upgrade(rec, handshake(t), nil)
		require.NoError(t, err)
		conn.broken.Store(true)
		require.NoError(t, s.Shutdown(t.Context()))
		require.ErrorIs(t, s.ServeConn(t.Context(), ws, mesh.ConnOptions{}), mesh.ErrClosed)
		assert.True(t, conn.closed.Load())
	})
}
