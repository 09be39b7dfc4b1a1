package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// world is one Redis, or Redis Cluster, and the servers on it, for one test.
type world struct {
	t       *testing.T
	virtual bool            // time is synctest's and Redis is in this process
	mem     *meshtest.Redis // where virtual
	real    *redistest.Server
	watched *redistest.Sentinel // where a master is followed, not one server
	cluster *redistest.Cluster  // in place of real
	prefix  string              // Options.Prefix; empty: the default

	as  func() redis.UniversalClient // the client of servers, where it is not everybody's
	url string                       // and, for those in other processes, its address, with
	ca  string                       // the file of who has signed the certificate
}

// everywhere runs a test three times: in virtual time on the embedded Redis
// and, where there is one, in real time on a real one and on a Redis Cluster.
// The latter two wait most of the time, so they run beside each other.
func everywhere(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	everywhereOn(t, clusterWorld, f)
}

// everywhereOn is everywhere with a cluster that is not the shared one; nil:
// with none.
func everywhereOn(t *testing.T, cluster func(*testing.T) *world, f func(t *testing.T, w *world)) {
	t.Helper()
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		embedded(t, f)
	})
	t.Run("real", func(t *testing.T) {
		t.Parallel()
		var both sync.WaitGroup
		defer both.Wait()
		both.Go(func() {
			t.Run("redis", func(t *testing.T) { f(t, &world{t: t, real: redistest.Start(t)}) })
		})
		if cluster != nil {
			both.Go(func() {
				t.Run("cluster", func(t *testing.T) { f(t, cluster(t)) })
			})
		}
	})
}

// embedded runs a test in virtual time on the embedded Redis.
func embedded(t *testing.T, f func(t *testing.T, w *world), opts ...meshtest.Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r, err := meshtest.NewRedis(opts...)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, r.Close()) })
		f(t, &world{t: t, virtual: true, mem: r})
	})
}

// client returns a new Redis client, closed at the end of the test.
func (w *world) client() redis.UniversalClient {
	w.t.Helper()
	switch {
	case w.virtual:
		c := w.mem.Client()
		w.t.Cleanup(func() { _ = c.Close() })
		return c
	case w.cluster != nil:
		return w.cluster.Client(w.t)
	}
	if w.watched != nil {
		return w.watched.Client(w.t)
	}
	return w.real.Client(w.t)
}

// options are those of a server of this world, to begin with.
func (w *world) options() Options {
	w.t.Helper()
	if w.as != nil {
		return Options{Redis: w.as(), Prefix: w.keys().prefix}
	}
	return Options{Redis: w.client(), Prefix: w.keys().prefix}
}

// sleep lets time pass; in virtual time everything that is due has happened
// when it returns.
func (w *world) sleep(d time.Duration) {
	time.Sleep(d)
	if w.virtual {
		synctest.Wait()
	}
}

// eventually waits until ok, at most within.
func (w *world) eventually(within time.Duration, ok func() bool, format string, args ...any) {
	w.t.Helper()
	for end := time.Now().Add(within); !ok(); {
		if time.Now().After(end) {
			require.FailNow(w.t, "not within "+within.String(), fmt.Sprintf(format, args...))
		}
		w.sleep(5 * time.Millisecond)
	}
}

// unhurried is how long something may take that is no promise but only quick:
// so long in virtual time, and in real time as long as a machine needs that has
// no processor to spare.
func (w *world) unhurried(d time.Duration) time.Duration {
	if w.virtual {
		return d
	}
	return d + 30*time.Second
}

// testServer is a Server with an HTTP server before it, in memory.
type testServer struct {
	*Server
	w        *world
	listener *pipeListener
	http     *http.Server
	done     chan struct{}
	stop     sync.Once
}

// server starts a server; it is shut down at the end of the test. setup may
// change the options, whose Redis is set already.
func (w *world) server(setup ...func(*Options)) *testServer {
	w.t.Helper()
	opts := w.options()
	opts.LatencyInterval = -1
	for _, f := range setup {
		f(&opts)
	}
	srv, err := NewServer(opts)
	require.NoError(w.t, err)
	require.NoError(w.t, srv.Start(w.t.Context()))
	s := &testServer{Server: srv, w: w, listener: newPipeListener(), http: &http.Server{Handler: srv}, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		_ = s.http.Serve(s.listener)
	}()
	w.t.Cleanup(func() { s.shutdown() })
	return s
}

// tracked is server with a rule for every room.
func (w *world) tracked(setup ...func(*Options)) *testServer {
	w.t.Helper()
	s := w.server(setup...)
	s.track(".*", PresenceOptions{})
	return s
}

func (s *testServer) track(expr string, opts PresenceOptions) {
	s.w.t.Helper()
	require.NoError(s.w.t, s.TrackPresence(Regexp(mustCompile(expr)), opts))
}

func (s *testServer) shutdown() {
	s.stop.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			s.w.t.Errorf("shutdown: %v", err)
		}
		_ = s.http.Close()
		<-s.done
	})
}

// peer is a client of the wire protocol.
type peer struct {
	t  *testing.T
	w  *world
	ws *websocket.Conn
	id string

	writing sync.Mutex

	mu      sync.Mutex // guards the fields below
	next    int
	waiting map[string]chan json.RawMessage
	updates []update    // presence updates, as they came
	frames  []frame     // everything, as it came
	times   []time.Time // when they came
	pushes  []frame     // all other frames without an id
	deaf    bool        // answers no ping
	err     error       // why reading ended
	ended   chan struct{}
}

type frame struct {
	ID      *int64          `json:"id"`
	Command string          `json:"command"`
	Payload json.RawMessage `json:"payload"`
}

type update struct {
	Type         string          `json:"type"`
	ConnectionID string          `json:"connectionId"`
	RoomName     string          `json:"roomName"`
	Timestamp    int64           `json:"timestamp"`
	Metadata     json.RawMessage `json:"metadata"`
	State        json.RawMessage `json:"state"`
	Seq          uint64          `json:"seq"`
	Epoch        string          `json:"epoch"`
	Repair       bool            `json:"repair"`
}

func (u update) String() string {
	return fmt.Sprintf("%s %s %s %s", u.Type, u.RoomName, u.ConnectionID, u.State)
}

// dial connects a peer, with headers for the upgrade.
func (s *testServer) dial(headers ...http.Header) *peer {
	s.w.t.Helper()
	p, _, err := s.tryDial(headers...)
	require.NoError(s.w.t, err)
	return p
}

func (s *testServer) tryDial(headers ...http.Header) (*peer, *http.Response, error) {
	var h http.Header
	if len(headers) > 0 {
		h = headers[0]
	}
	d := websocket.Dialer{NetDialContext: s.listener.dial}
	ws, resp, err := d.DialContext(s.w.t.Context(), "ws://127.0.0.1/ws", h)
	if err != nil {
		return nil, resp, err
	}
	p := &peer{t: s.w.t, w: s.w, ws: ws, waiting: make(map[string]chan json.RawMessage), ended: make(chan struct{})}
	var first frame
	if err := ws.ReadJSON(&first); err != nil {
		return nil, resp, err
	}
	require.Equal(s.w.t, "mesh/assign-id", first.Command, "the first frame")
	require.NoError(s.w.t, json.Unmarshal(first.Payload, &p.id))
	go p.read()
	s.w.t.Cleanup(p.close)
	return p, resp, nil
}

func (p *peer) read() {
	defer close(p.ended)
	for {
		_, data, err := p.ws.ReadMessage()
		var f frame
		if err == nil {
			err = json.Unmarshal(data, &f)
		}
		if err != nil {
			p.mu.Lock()
			p.err = err
			p.mu.Unlock()
			return
		}
		p.take(f)
	}
}

func (p *peer) take(f frame) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frames = append(p.frames, f)
	switch {
	case f.ID != nil:
		key := strconv.FormatInt(*f.ID, 10)
		if ch := p.waiting[key]; ch != nil {
			delete(p.waiting, key)
			ch <- f.Payload
		}
	case f.Command == "mesh/presence-update":
		var u update
		if err := json.Unmarshal(f.Payload, &u); err == nil {
			p.updates = append(p.updates, u)
			p.times = append(p.times, time.Now())
		}
	case f.Command == "ping" && !p.deaf:
		go func() { _ = p.send(map[string]any{"id": 1, "command": "pong", "payload": map[string]any{}}) }()
	default:
		p.pushes = append(p.pushes, f)
	}
}

// send writes one frame.
func (p *peer) send(v any) error {
	p.writing.Lock()
	defer p.writing.Unlock()
	return p.ws.WriteJSON(v)
}

// call sends a request and returns the payload of its answer.
func (p *peer) call(command string, payload any) json.RawMessage {
	p.t.Helper()
	answer, err := p.tryCall(command, payload)
	require.NoError(p.t, err, command)
	return answer
}

func (p *peer) tryCall(command string, payload any) (json.RawMessage, error) {
	ch := make(chan json.RawMessage, 1)
	p.mu.Lock()
	p.next++
	id := p.next
	p.waiting[strconv.Itoa(id)] = ch
	p.mu.Unlock()
	if err := p.send(map[string]any{"id": id, "command": command, "payload": payload}); err != nil {
		return nil, err
	}
	select {
	case answer := <-ch:
		return answer, nil
	case <-p.ended:
		return nil, errors.New("connection ended")
	case <-time.After(20 * time.Second):
		return nil, errors.New("no answer")
	}
}

// view is the answer to a join, a subscribe or a get-state.
type view struct {
	Success bool            `json:"success"`
	Present json.RawMessage `json:"present"`
	States  map[string]json.RawMessage
	Total   int  `json:"total"`
	Stale   bool `json:"stale"`
	Epoch   string
	Seq     uint64
	Error   string `json:"error"`
	Code    string `json:"code"`
}

func (v view) ids(t *testing.T) []string {
	t.Helper()
	var members []Member
	require.NoError(t, json.Unmarshal(v.Present, &members))
	ids := make([]string, len(members))
	for i, m := range members {
		ids[i] = m.ID
	}
	return ids
}

func (p *peer) room(command, room string) view {
	p.t.Helper()
	var v view
	require.NoError(p.t, json.Unmarshal(p.call(command, map[string]any{"roomName": room}), &v))
	return v
}

func (p *peer) join(room string) view {
	p.t.Helper()
	v := p.room("mesh/join-room", room)
	require.True(p.t, v.Success, "join %q: %s %s", room, v.Code, v.Error)
	return v
}

func (p *peer) leave(room string) {
	p.t.Helper()
	require.JSONEq(p.t, `{"success":true}`, string(p.call("mesh/leave-room", map[string]any{"roomName": room})))
}

func (p *peer) subscribe(room string) view {
	p.t.Helper()
	v := p.room("mesh/subscribe-presence", room)
	require.True(p.t, v.Success, "subscribe %q: %s %s", room, v.Code, v.Error)
	return v
}

func (p *peer) state(room string, state any, more ...map[string]any) string {
	p.t.Helper()
	payload := map[string]any{"roomName": room, "state": state}
	for _, m := range more {
		for k, v := range m {
			payload[k] = v
		}
	}
	return string(p.call("mesh/publish-presence-state", payload))
}

// got returns the updates so far.
func (p *peer) got() []update {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]update(nil), p.updates...)
}

// count returns how many updates of a type about a connection came ("": any).
func (p *peer) count(kind, conn string) int {
	n := 0
	for _, u := range p.got() {
		if u.Type == kind && (conn == "" || u.ConnectionID == conn) {
			n++
		}
	}
	return n
}

// pushed returns how many frames of a command came.
func (p *peer) pushed(command string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, f := range p.pushes {
		if f.Command == command {
			n++
		}
	}
	return n
}

// pushesOf returns the frames of a command that came.
func (p *peer) pushesOf(command string) []frame {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []frame
	for _, f := range p.pushes {
		if f.Command == command {
			list = append(list, f)
		}
	}
	return list
}

// expect waits for one update and returns it.
func (p *peer) expect(within time.Duration, kind, conn string) update {
	p.t.Helper()
	var found update
	p.w.eventually(within, func() bool {
		for _, u := range p.got() {
			if u.Type == kind && u.ConnectionID == conn {
				found = u
				return true
			}
		}
		return false
	}, "%s of %s, got %v", kind, conn, p.got())
	return found
}

// mute makes the peer answer no ping any more.
func (p *peer) mute() {
	p.mu.Lock()
	p.deaf = true
	p.mu.Unlock()
}

func (p *peer) close() {
	_ = p.ws.Close()
	<-p.ended
}

// rawPeer is a WebSocket whose frames the test reads by itself, or does not.
type rawPeer struct {
	t  *testing.T
	ws *websocket.Conn
	id string
}

// raw connects a rawPeer.
func (s *testServer) raw(headers ...http.Header) *rawPeer {
	s.w.t.Helper()
	var h http.Header
	if len(headers) > 0 {
		h = headers[0]
	}
	d := websocket.Dialer{NetDialContext: s.listener.dial}
	ws, _, err := d.DialContext(s.w.t.Context(), "ws://127.0.0.1/ws", h)
	require.NoError(s.w.t, err)
	s.w.t.Cleanup(func() { _ = ws.Close() })
	r := &rawPeer{t: s.w.t, ws: ws}
	var first frame
	require.NoError(s.w.t, json.Unmarshal([]byte(r.next()), &first))
	require.Equal(s.w.t, "mesh/assign-id", first.Command)
	require.NoError(s.w.t, json.Unmarshal(first.Payload, &r.id))
	return r
}

// send writes text as it is.
func (r *rawPeer) send(text string) {
	r.t.Helper()
	require.NoError(r.t, r.ws.WriteMessage(websocket.TextMessage, []byte(text)))
}

// next reads one frame.
func (r *rawPeer) next() string {
	r.t.Helper()
	require.NoError(r.t, r.ws.SetReadDeadline(time.Now().Add(10*time.Second)))
	kind, data, err := r.ws.ReadMessage()
	require.NoError(r.t, err)
	require.Equal(r.t, websocket.TextMessage, kind)
	return string(data)
}

// closeCodeOf returns the close code in an error of reading, 0: there is none.
func closeCodeOf(err error) int {
	var closed *websocket.CloseError
	if errors.As(err, &closed) {
		return closed.Code
	}
	return 0
}

// closed waits until a peer's connection has ended, and returns the code.
func (p *peer) closed(within time.Duration) int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(within):
		require.FailNow(p.t, "the connection has not ended within "+within.String())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return closeCodeOf(p.err)
}

// away makes Redis answer nothing, until back.
func (w *world) away() {
	if w.virtual {
		w.mem.Hang()
	} else {
		w.real.Pause()
	}
}

func (w *world) back() {
	if w.virtual {
		w.mem.Resume()
	} else {
		w.real.Resume()
	}
}

// pipeListener is a net.Listener in memory.
type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	quit  chan struct{}
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), quit: make(chan struct{})}
}

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.quit:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.quit:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.quit) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
