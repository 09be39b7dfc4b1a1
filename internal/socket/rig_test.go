package socket

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hijacked is a response that hands over a connection to upgrade.
type hijacked struct {
	conn net.Conn
	rw   *bufio.ReadWriter
}

func (h *hijacked) Header() http.Header         { return http.Header{} }
func (h *hijacked) Write(p []byte) (int, error) { return h.conn.Write(p) }
func (h *hijacked) WriteHeader(int)             {}
func (h *hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.conn, h.rw, nil
}

// upgrade makes a WebSocket of the two ends of a network connection: like an app that
// compresses, or like this package.
func upgrade(tb testing.TB, serverEnd, clientEnd net.Conn, compress bool) (server, client *websocket.Conn) {
	tb.Helper()
	type upgraded struct {
		conn *websocket.Conn
		err  error
	}
	done := make(chan upgraded, 1)
	go func() {
		rw := bufio.NewReadWriter(bufio.NewReader(serverEnd), bufio.NewWriter(serverEnd))
		req, err := http.ReadRequest(rw.Reader)
		if err != nil {
			done <- upgraded{err: err}
			return
		}
		var conn *websocket.Conn
		if w := (&hijacked{conn: serverEnd, rw: rw}); compress {
			conn, err = (&websocket.Upgrader{EnableCompression: true}).Upgrade(w, req, nil)
		} else {
			conn, err = Upgrade(new(websocket.Upgrader), w, req, nil)
		}
		done <- upgraded{conn, err}
	}()
	dialer := websocket.Dialer{
		NetDialContext:    func(context.Context, string, string) (net.Conn, error) { return clientEnd, nil },
		EnableCompression: compress,
	}
	client, _, err := dialer.Dial((&url.URL{Scheme: "ws", Host: "mesh.test"}).String(), nil)
	if err != nil {
		tb.Fatal(err)
	}
	up := <-done
	if up.err != nil {
		tb.Fatal(up.err)
	}
	return up.conn, client
}

// handler is a Handler whose parts are functions. Nil ones do nothing.
type handler struct {
	command    func(ctx context.Context, req wire.Request)
	begin      func(ctx context.Context, req wire.Request) func(context.Context) // nil: no command overlaps
	concurrent func(ctx context.Context, req wire.Request)
	order      func(req *wire.Request) Order                                // nil: all wait in one line
	attempt    func(ctx context.Context, req wire.Request, last bool) Begun // in place of command and begin
	foreign    func(messageType int, data []byte)
	meshOnly   bool // foreign frames are ignored
	seen       atomic.Int64
}

func (h *handler) Seen(time.Time) { h.seen.Add(1) }
func (h *handler) Order(req *wire.Request) Order {
	if h.order != nil {
		return h.order(req)
	}
	return Order{Line: "one", Overlaps: h.begin != nil && req.Command == overlapping, Beside: h.concurrent != nil}
}
func (h *handler) Begin(ctx context.Context, req wire.Request, last bool) Begun {
	switch {
	case h.attempt != nil:
		return h.attempt(ctx, req, last)
	case h.begin != nil && req.Command == overlapping:
		return Begun{Rest: h.begin(ctx, req)}
	case h.command != nil:
		h.command(ctx, req)
	}
	return Begun{}
}
func (h *handler) Concurrent(ctx context.Context, req wire.Request) {
	h.concurrent(ctx, req)
}
func (h *handler) Refusal(req wire.Request, message, code, name string) *wire.Frame {
	return wire.ErrorAnswer(req.ID, req.Command, message, code, name)
}
func (h *handler) TakesForeignMessages() bool { return h.foreign != nil && !h.meshOnly }
func (h *handler) ForeignMessage(_ context.Context, messageType int, data []byte) {
	if h.foreign != nil {
		h.foreign(messageType, data)
	}
}

// message is a message to a client.
type message struct {
	ID      json.Number     `json:"id"`
	Command string          `json:"command"`
	Payload json.RawMessage `json:"payload"`
}

// code returns the code of an error answer.
func (m message) code() string {
	var e struct{ Code string }
	_ = json.Unmarshal(m.Payload, &e)
	return e.Code
}

// rig is a socket and its client, in one synctest bubble.
type rig struct {
	*Socket
	t       *testing.T
	h       *handler
	client  *websocket.Conn
	ended   chan struct{} // Run has returned err
	err     error
	release context.CancelFunc // ends the context of Run

	mu       sync.Mutex
	received []message
	readErr  error // why the client stopped reading
	readDone chan struct{}
}

// wheel returns a running wheel with fine steps.
func wheel(t testing.TB) *clock.Wheel {
	w := clock.NewWheel(10 * time.Millisecond)
	w.Start()
	t.Cleanup(w.Stop)
	return w
}

// prepare connects a socket that does not run yet, over a pipe without a buffer. The
// socket can write only what the client reads.
func prepare(t *testing.T, h *handler, change func(*Config)) *rig {
	t.Helper()
	serverEnd, clientEnd := net.Pipe()
	server, client := upgrade(t, serverEnd, clientEnd, false)
	return prepareOn(t, h, server, client, change)
}

func prepareOn(t *testing.T, h *handler, server, client *websocket.Conn, change func(*Config)) *rig {
	cfg := Config{
		FrameBytes: 1 << 16, QueueBytes: 1 << 18,
		WriteTimeout: 10 * time.Second, MaxMissedPongs: 1,
	}
	if change != nil {
		change(&cfg)
	}
	if cfg.Wheel == nil {
		cfg.Wheel = wheel(t)
	}
	return &rig{Socket: NewGroup(cfg).New(server, h), t: t, h: h, client: client}
}

// start runs the socket. If reading is true, the client reads.
func (r *rig) start(reading bool) *rig {
	ctx, cancel := context.WithCancel(r.t.Context())
	r.release = cancel
	r.ended = make(chan struct{})
	go func() {
		defer close(r.ended)
		r.err = r.Run(ctx)
	}()
	if reading {
		r.read()
	}
	r.t.Cleanup(func() {
		_ = r.client.Close()
		cancel()
		<-r.ended
		if r.readDone != nil {
			<-r.readDone
		}
	})
	return r
}

// run is prepare and start.
func run(t *testing.T, h *handler, change func(*Config)) *rig {
	t.Helper()
	return prepare(t, h, change).start(true)
}

// read makes the client read from now on.
func (r *rig) read() {
	r.readDone = make(chan struct{})
	go func() {
		defer close(r.readDone)
		for {
			_, data, err := r.client.ReadMessage()
			var m message
			if err == nil {
				err = json.Unmarshal(data, &m)
			}
			r.mu.Lock()
			if err != nil {
				r.readErr = err
				r.mu.Unlock()
				return
			}
			r.received = append(r.received, m)
			r.mu.Unlock()
		}
	}()
}

// say makes the client send text.
func (r *rig) say(text string) {
	r.t.Helper()
	if err := r.client.WriteMessage(websocket.TextMessage, []byte(text)); err != nil {
		r.t.Fatalf("client cannot write: %v", err)
	}
}

// got returns the messages that the client received since the last call.
func (r *rig) got() []message {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.received
	r.received = nil
	return got
}

// end waits for the end of the socket and returns the reason.
func (r *rig) end() *End {
	r.t.Helper()
	<-r.ended
	var e *End
	if !errors.As(r.err, &e) || !errors.Is(r.err, ErrClosed) {
		r.t.Fatalf("Run returned %v, no *End", r.err)
	}
	return e
}

// clientCode waits until the client stops reading and returns the code of the close frame
// that it got, or 0 if none.
func (r *rig) clientCode() int {
	<-r.readDone
	var closed *websocket.CloseError
	if errors.As(r.readErr, &closed) && closed.Code != websocket.CloseAbnormalClosure {
		return closed.Code
	}
	return 0
}

// echo answers every command with its payload, or with true.
func (r *rig) echo(_ context.Context, req wire.Request) {
	var payload any = true
	if req.Payload != nil {
		payload = req.Payload
	}
	if !req.HasID {
		return
	}
	f, err := wire.Answer(req.ID, req.Command, payload)
	if err != nil {
		r.t.Errorf("answer: %v", err)
		return
	}
	_ = r.Answer(f) // fails once the connection ends
}

// push returns a frame with a command and a payload.
func push(t testing.TB, command string, payload any) *wire.Frame {
	f, err := wire.Push(command, payload)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// state returns a state update.
func state(room, conn string, seq uint64) *wire.Update {
	return &wire.Update{Type: wire.UpdateState, RoomName: room, ConnectionID: conn, Seq: seq, Epoch: "e", State: json.RawMessage(`{"typing":true}`)}
}
