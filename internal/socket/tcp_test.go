package socket

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// serve runs a socket for one client of a real server, over TLS. The channel receives the
// result of Run.
func serve(t *testing.T, change func(*Config)) (*Socket, *websocket.Conn, <-chan error) {
	t.Helper()
	w := wheel(t)
	sockets, ended := make(chan *Socket, 1), make(chan error, 1)
	srv := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		conn, err := new(websocket.Upgrader).Upgrade(rw, req, nil)
		if err != nil {
			t.Error(err)
			return
		}
		cfg := Config{Wheel: w}
		change(&cfg)
		s := NewGroup(cfg).New(conn, new(handler))
		sockets <- s
		ended <- s.Run(context.WithoutCancel(req.Context()))
	}))
	t.Cleanup(srv.Close)
	tls := srv.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	tls.NextProtos = nil // no HTTP/2
	dialer := websocket.Dialer{TLSClientConfig: tls}
	client, _, err := dialer.DialContext(t.Context(), "wss"+strings.TrimPrefix(srv.URL, "https"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return <-sockets, client, ended
}

// If a connection is closed while its peer still sends, it is reset, and the peer never
// sees the close frame. So the rest has to be read first.
func TestTooLargeMessageIsNotReset(t *testing.T) {
	t.Parallel()
	_, client, ended := serve(t, func(c *Config) { c.FrameBytes = 1000 })
	for range 4 {
		// The client may get the close frame before it has written everything.
		_ = client.WriteMessage(websocket.TextMessage, make([]byte, 1<<20))
	}
	_, _, err := client.ReadMessage()
	if !websocket.IsCloseError(err, websocket.CloseMessageTooBig) {
		t.Errorf("client got %v, want close code 1009", err)
	}
	_ = client.Close()
	var e *End
	if err := <-ended; !errors.As(err, &e) || e.Cause != CauseTooLarge {
		t.Errorf("ended with %v", err)
	}
}

// Closing a TLS connection sends an alert. If the network is full, that could wait for 5
// s, and it would do so each time. A machine without a free processor delays some
// attempts, but not all of them.
func TestStuckTLSConnectionIsClosedInTime(t *testing.T) {
	t.Parallel()
	var took time.Duration
	for range 20 {
		s, _, ended := serve(t, func(*Config) {})
		if err := s.Send(push(t, "n", strings.Repeat("x", 64<<20))); err != nil {
			t.Fatal(err)
		}
		s.Close(1000, "")
		begun := time.Now()
		if err := <-ended; !errors.Is(err, ErrClosed) {
			t.Errorf("ended with %v", err)
		}
		if took = time.Since(begun); took < 5*time.Second {
			return
		}
	}
	t.Errorf("took %v", took)
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := prepare(t, h, func(c *Config) {
			c.PingInterval, c.LatencyInterval, c.QueueBytes = 10*time.Millisecond, 10*time.Millisecond, 5000
		})
		h.command = r.echo
		r.start(true)
		var users sync.WaitGroup
		for n := range 4 {
			users.Go(func() {
				for i := range 200 {
					_ = r.SendUpdate(state("r", "c", uint64(i)))
					_ = r.Send(wire.Ping())
					r.MinTTL(time.Duration(i%5) * 30 * time.Millisecond)
					r.PingNow()
					_ = r.QueueBytes()
					time.Sleep(time.Duration(n) * time.Millisecond)
				}
				r.Close(1000, "")
			})
		}
		users.Go(func() {
			for r.client.WriteMessage(websocket.TextMessage, []byte(`{"id":1,"command":"mesh/noop"}`)) == nil {
				time.Sleep(time.Millisecond)
			}
		})
		users.Wait()
		r.end()
		if n := r.QueueBytes(); n != 0 {
			t.Errorf("%d bytes still queued", n)
		}
	})
}
