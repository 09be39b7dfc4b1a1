package socket

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// plain is a server whose sockets have TCP connections of their own. They are written and
// awaited without the websocket package.
type plain struct {
	t     *testing.T
	group *Group
	url   string
	conns chan *served
}

// served is a socket of a plain server.
type served struct {
	*Socket
	ended    chan error // result of Run
	panicked chan any   // or its panic
}

func newPlain(t *testing.T, h Handler, cfg Config, upgrade func(http.ResponseWriter, *http.Request) (*websocket.Conn, error)) *plain {
	t.Helper()
	cfg.Wheel = wheel(t)
	p := &plain{t: t, group: NewGroup(cfg), conns: make(chan *served, 1)}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, err := upgrade(w, r)
		if err != nil {
			t.Error(err)
			return
		}
		s := &served{Socket: p.group.New(conn, h), ended: make(chan error, 1), panicked: make(chan any, 1)}
		p.conns <- s
		defer func() {
			if value := recover(); value != nil {
				_ = conn.Close()
				s.panicked <- value
			}
		}()
		s.ended <- s.Run(context.WithoutCancel(r.Context()))
	}))
	t.Cleanup(func() {
		srv.Close()
		p.group.Wait()
	})
	p.url = "ws" + strings.TrimPrefix(srv.URL, "http")
	return p
}

// here upgrades like ServeHTTP, elsewhere like an app.
func here(w http.ResponseWriter, r *http.Request) (*websocket.Conn, error) {
	return Upgrade(&websocket.Upgrader{WriteBufferPool: &sync.Pool{}}, w, r, nil)
}

func elsewhere(w http.ResponseWriter, r *http.Request) (*websocket.Conn, error) {
	return new(websocket.Upgrader).Upgrade(w, r, nil)
}

// dial connects a client.
func (p *plain) dial() (*served, *websocket.Conn) {
	p.t.Helper()
	dialer := websocket.Dialer{NetDialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil {
			_ = conn.(*net.TCPConn).SetReadBuffer(64 << 10) // so that it is soon full
		}
		return conn, err
	}}
	client, _, err := dialer.DialContext(p.t.Context(), p.url, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	s := <-p.conns
	p.t.Cleanup(func() {
		_ = client.Close()
		s.Close(1000, "")
	})
	return s, client
}

// end waits for the end of Run and returns the reason.
func (s *served) end(t *testing.T) *End {
	t.Helper()
	var e *End
	if err := <-s.ended; !errors.As(err, &e) {
		t.Fatalf("Run returned %v", err)
	}
	return e
}

// numbers makes a client read states up to last, and checks that they are in order.
func numbers(t *testing.T, client *websocket.Conn, last uint64) {
	for want := uint64(1); want <= last; {
		_, data, err := client.ReadMessage()
		if err != nil {
			t.Errorf("before %d: %v", want, err)
			return
		}
		var m struct {
			Command string
			Payload struct{ Seq uint64 }
		}
		switch err := json.Unmarshal(data, &m); {
		case err == nil && m.Command == wire.PushPing:
		case err != nil || m.Payload.Seq != want:
			t.Errorf("got %.200s (%v), want %d", data, err, want)
			return
		default:
			want++
		}
	}
}

// The frames of a socket keep their order, whichever goroutine writes them.
func TestOrderOverTCP(t *testing.T) {
	t.Parallel()
	for name, upgrade := range map[string]func(http.ResponseWriter, *http.Request) (*websocket.Conn, error){"here": here, "elsewhere": elsewhere} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlain(t, new(handler), Config{}, upgrade)
			const clients, last = 40, 1000
			var reading sync.WaitGroup
			sockets := make([]*served, clients)
			for i := range sockets {
				s, client := p.dial()
				sockets[i] = s
				reading.Go(func() { numbers(t, client, last) })
			}
			for seq := uint64(1); seq <= last; seq++ {
				u := state("r", "c", seq)
				if seq%100 == 0 {
					u.State = json.RawMessage(`"` + strings.Repeat("x", 50_000) + `"`)
				}
				for _, s := range sockets {
					if err := s.SendUpdate(u); err != nil {
						t.Fatal(err)
					}
				}
				if seq%7 == 0 {
					sockets[seq%clients].PingNow() // in addition to the queue; at most one waits
				}
			}
			reading.Wait()
		})
	}
}

// Stuck sockets do not delay the writes of others. When their clients read again, nothing
// is missing.
func TestSlowSocketsDoNotDelayOthers(t *testing.T) {
	t.Parallel()
	p := newPlain(t, new(handler), Config{}, here)
	const last = 2500
	stuck := make([]*websocket.Conn, 4*runtime.GOMAXPROCS(0))
	for i := range stuck {
		s, client := p.dial()
		stuck[i] = client
		for seq := uint64(1); seq <= last; seq++ {
			u := state("r", "c", seq)
			u.State = json.RawMessage(`"` + strings.Repeat("x", 2000) + `"`)
			if err := s.SendUpdate(u); err != nil {
				t.Fatal(err)
			}
		}
	}
	quick, client := p.dial()
	for seq := uint64(1); seq <= 100; seq++ {
		if err := quick.SendUpdate(state("r", "c", seq)); err != nil {
			t.Fatal(err)
		}
	}
	numbers(t, client, 100)
	if c := p.group.Counts(); c.Queued == 0 {
		t.Fatal("nothing was stuck: the test shows nothing")
	}
	var reading sync.WaitGroup
	for _, client := range stuck {
		reading.Go(func() { numbers(t, client, last) })
	}
	reading.Wait()
}

// The time limit for a write also holds for data that could not be written at once, and
// stuck data counts as queued.
func TestStuckOverTCP(t *testing.T) {
	t.Parallel()
	p := newPlain(t, new(handler), Config{WriteTimeout: 500 * time.Millisecond}, here)
	s, _ := p.dial()
	data := make([]byte, 16<<20)
	if err := s.SendMessage(websocket.BinaryMessage, data); err != nil {
		t.Fatal(err)
	}
	if n := s.QueueBytes(); n < len(data) {
		t.Errorf("%d bytes queued, want all %d", n, len(data))
	}
	if e := s.end(t); e.Cause != CauseStuck {
		t.Errorf("ended with %v, want stuck", e)
	}
}

// The time limit of a write ends with that write.
func TestWriteAfterASlowOne(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	p := newPlain(t, new(handler), Config{WriteTimeout: timeout}, here)
	s, client := p.dial()
	for _, size := range []int{16 << 20, 1} { // the first write has to wait, the second has not
		if err := s.SendMessage(websocket.BinaryMessage, make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		if _, data, err := client.ReadMessage(); err != nil || len(data) != size {
			t.Fatalf("got %d bytes (%v), want %d", len(data), err, size)
		}
		if size > 1 {
			time.Sleep(timeout + timeout/4) // nothing reports that the time has passed
		}
	}
}

// Frames that come in pieces, or several at once, are read like others.
func TestFramesInPieces(t *testing.T) {
	t.Parallel()
	h := new(handler)
	var s *served
	ready := make(chan struct{})
	h.command = func(_ context.Context, req wire.Request) {
		<-ready
		f, _ := wire.Answer(req.ID, req.Command, len(req.Payload))
		_ = s.Send(f)
	}
	p := newPlain(t, h, Config{FrameBytes: 1 << 20}, here)
	s, client := p.dial()
	close(ready)
	frame := func(id, size int) []byte {
		text := fmt.Sprintf(`{"id":%d,"command":"mesh/noop","payload":"%s"}`, id, strings.Repeat("x", size))
		m := []byte{0x81, 0x80 | 127, 0, 0, 0, 0, byte(len(text) >> 24), byte(len(text) >> 16), byte(len(text) >> 8), byte(len(text)), 0, 0, 0, 0}
		return append(m, text...)
	}
	conn := client.NetConn()
	write := func(data []byte) {
		t.Helper()
		if _, err := conn.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	var sizes []int
	next := func(size int) []byte {
		sizes = append(sizes, size)
		return frame(len(sizes), size)
	}
	for _, b := range next(300) { // byte by byte
		write([]byte{b})
	}
	write(append(append(next(10), next(200)...), next(9000)...)) // at once
	whole := next(100_000)
	write(whole[:5000])
	write(append(whole[5000:], next(1)[:3]...)) // and the beginning of another
	write(frame(len(sizes), 1)[3:])
	for i, size := range sizes {
		var m message
		if err := client.ReadJSON(&m); err != nil {
			t.Fatal(err)
		}
		if m.ID != json.Number(fmt.Sprint(i+1)) || string(m.Payload) != fmt.Sprint(size+2) {
			t.Errorf("answer %d is %v, want the size %d", i+1, m, size+2)
		}
	}
	_ = conn.Close()
	if e := s.end(t); e.Cause != CauseBroken {
		t.Errorf("ended with %v", e)
	}
}

// A panic while reading is passed on to the caller of Run.
func TestPanicWhileReading(t *testing.T) {
	t.Parallel()
	p := newPlain(t, panics{new(handler)}, Config{}, here)
	s, client := p.dial()
	if err := client.WriteControl(websocket.PingMessage, nil, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if value := <-s.panicked; !strings.Contains(fmt.Sprint(value), "seen too much") {
		t.Errorf("panicked with %v", value)
	}
}

type panics struct{ *handler }

func (panics) Seen(time.Time) { panic("seen too much") }
