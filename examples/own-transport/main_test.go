package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/meshtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patient is how long a test waits for what has to come.
const patient = 30 * time.Second

// instance is one that serves until stop, which returns what serve returned.
type instance struct {
	t    *testing.T
	addr string
	http *http.Client
	stop func() error
}

// startInstance starts one on a free port of the loopback.
func startInstance(t *testing.T, client *redis.Client, change ...func(*config)) *instance {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return startOn(t, ln, client, change...)
}

func startOn(t *testing.T, ln net.Listener, client *redis.Client, change ...func(*config)) *instance {
	t.Helper()
	cfg := config{
		redis: client, beat: time.Minute, ttl: time.Hour, write: 10 * time.Second, streams: 100,
		log: slog.New(slog.DiscardHandler),
	}
	for _, f := range change {
		f(&cfg)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	var result error
	go func() {
		defer close(done)
		result = serve(ctx, cfg, ln)
	}()
	in := &instance{t: t, addr: ln.Addr().String(), http: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	in.stop = func() error {
		cancel()
		<-done
		return result
	}
	t.Cleanup(func() { _ = in.stop() })
	return in
}

func (in *instance) request(method, path, token, body string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(in.t.Context(), method, "http://"+in.addr+path, strings.NewReader(body))
	require.NoError(in.t, err)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return in.http.Do(req)
}

// status sends a request and returns the status of its answer.
func (in *instance) status(method, path, token, body string) int {
	in.t.Helper()
	res, err := in.request(method, path, token, body)
	require.NoError(in.t, err)
	require.NoError(in.t, res.Body.Close())
	return res.StatusCode
}

// client is a reader of a stream.
type client struct {
	in *instance
	hello
	stop func() // ends the request

	mu     sync.Mutex // guards the fields below
	events []event
	taken  int           // of events, by await
	more   chan struct{} // closed at the next event; nil: nobody waits
	err    error         // why reading ended
	ended  bool
}

type event struct{ name, data string }

// open begins a stream of the room.
func (in *instance) open(room, name string) *client {
	in.t.Helper()
	res, err := in.request(http.MethodGet, "/events?"+url.Values{"room": {room}, "name": {name}}.Encode(), "", "")
	require.NoError(in.t, err)
	require.Equal(in.t, http.StatusOK, res.StatusCode)
	require.Equal(in.t, "text/event-stream", res.Header.Get("Content-Type"))
	require.Equal(in.t, "no-store", res.Header.Get("Cache-Control"))
	c := &client{in: in}
	done := make(chan struct{})
	c.stop = func() { _ = res.Body.Close(); <-done }
	go func() {
		defer close(done)
		c.read(res.Body)
	}()
	in.t.Cleanup(c.stop)
	require.NoError(in.t, json.Unmarshal([]byte(c.await("hello", "")), &c.hello))
	return c
}

func (c *client) read(body io.Reader) {
	var e event
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		switch field, value, _ := strings.Cut(lines.Text(), ": "); field {
		case "event":
			e.name = value
		case "data":
			e.data = value
		case "":
			c.take(e)
			e = event{}
		}
	}
	c.mu.Lock()
	c.ended, c.err = true, lines.Err()
	c.mu.Unlock()
	c.take(event{name: "the end"})
}

func (c *client) take(e event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, e)
	if c.more != nil {
		close(c.more)
		c.more = nil
	}
}

// await returns the data of the next event of that name that holds a text.
func (c *client) await(name, holds string) string {
	c.in.t.Helper()
	limit := time.NewTimer(patient)
	defer limit.Stop()
	for {
		c.mu.Lock()
		for c.taken < len(c.events) {
			e := c.events[c.taken]
			c.taken++
			if e.name == name && strings.Contains(e.data, holds) {
				c.mu.Unlock()
				return e.data
			}
		}
		seen := fmt.Sprint(c.events)
		if c.more == nil {
			c.more = make(chan struct{})
		}
		more := c.more
		c.mu.Unlock()
		select {
		case <-more:
		case <-limit.C:
			require.FailNow(c.in.t, "not told", "%s %s: got %s", name, holds, seen)
		}
	}
}

// post sends a POST with the client's token.
func (c *client) post(path, body string) int {
	c.in.t.Helper()
	return c.in.status(http.MethodPost, path, c.Token, body)
}

// about is what an event of presence about somebody holds.
func about(kind string, c *client) string { return `"type":"` + kind + `","id":"` + c.ID + `"` }

func TestPresenceByEvents(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client())
	ann := in.open("lobby", "Ann")
	require.JSONEq(t, `{"type":"snapshot","state":null}`, ann.await("presence", ""), "nobody is there")
	require.NotEqual(t, ann.ID, ann.Token)

	require.Equal(t, http.StatusNoContent, ann.post("/join", ""))
	require.JSONEq(t, `{"type":"join","id":"`+ann.ID+`","metadata":{"name":"Ann"},"state":null}`, ann.await("presence", ""))
	require.Equal(t, http.StatusNoContent, ann.post("/state", "{\n\"typing\": true}"))
	require.Contains(t, ann.await("presence", about("state", ann)), `"state":{"typing":true}`)

	bob := in.open("lobby", "Bob")
	snapshot := bob.await("presence", "snapshot")
	require.Contains(t, snapshot, `{"id":"`+ann.ID+`","metadata":{"name":"Ann"},"state":{"typing":true}}`)
	require.NotContains(t, snapshot, ann.Token)
	require.Equal(t, http.StatusNoContent, ann.post("/state", "null"))
	require.Contains(t, bob.await("presence", about("state", ann)), `"state":null`)
	require.Equal(t, http.StatusNoContent, ann.post("/leave", ""))
	bob.await("presence", about("leave", ann))
	require.Equal(t, http.StatusConflict, ann.post("/state", `{}`), "who is not in has no state")

	require.Equal(t, http.StatusNoContent, ann.post("/join", ""))
	bob.await("presence", about("join", ann))
	ann.stop()
	bob.await("presence", about("leave", ann))
	require.Equal(t, http.StatusUnauthorized, ann.post("/join", ""), "the token ends with the stream")
	require.NoError(t, in.stop())
}

func TestTwoInstances(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	one, two := startInstance(t, r.Client()), startInstance(t, r.Client())
	ann, bob := one.open("lobby", "Ann"), two.open("lobby", "Bob")
	require.Equal(t, http.StatusNoContent, ann.post("/join", ""))
	require.Contains(t, bob.await("presence", about("join", ann)), `{"name":"Ann"}`)
	require.Equal(t, http.StatusNoContent, bob.post("/join", ""))
	ann.await("presence", about("join", bob))
	require.Equal(t, http.StatusUnauthorized, two.status(http.MethodPost, "/leave", ann.Token, ""), "a POST has to get to the stream's instance")
	require.NoError(t, one.stop())
	bob.await("presence", about("leave", ann))
	require.NoError(t, two.stop())
}

// Ids are seen by everybody. They are good for nothing.
func TestWhoseRequestItIs(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client())
	ann, eve := in.open("lobby", "Ann"), in.open("lobby", "Eve")
	require.Equal(t, http.StatusNoContent, ann.post("/join", ""))
	eve.await("presence", about("join", ann))
	for _, token := range []string{"", " ", ann.ID, ann.Token[:25], ann.Token + "A", strings.ToLower(ann.Token), strings.Repeat("x", 8<<10)} {
		for _, path := range []string{"/join", "/leave", "/state", "/alive"} {
			require.Equal(t, http.StatusUnauthorized, in.status(http.MethodPost, path, token, `{}`), "%.30q", token)
		}
	}
	require.Equal(t, http.StatusUnauthorized, in.status(http.MethodPost, "/leave?id="+ann.ID+"&token="+ann.Token, "", ""))
	require.Equal(t, http.StatusNoContent, eve.post("/leave?id="+ann.ID, `{"id":"`+ann.ID+`"}`), "of herself")
	require.Equal(t, http.StatusNoContent, eve.post("/join", ""))
	eve.await("presence", about("join", eve))
	require.Equal(t, http.StatusNoContent, ann.post("/state", `{"here":true}`), "she has not left")
	require.NoError(t, in.stop())
}

// A page of another site gets no stream on behalf of whoever visits it.
func TestWhosePageItIs(t *testing.T) {
	t.Parallel()
	a := newApp(config{}, nil) // who is refused reaches neither presence nor the table of streams
	defer a.endStreams()
	for _, site := range []string{"cross-site", "same-site"} {
		req := httptest.NewRequest(http.MethodGet, "/events?room=lobby&name=Ann", nil)
		req.Header.Set("Sec-Fetch-Site", site)
		res := httptest.NewRecorder()
		a.handler().ServeHTTP(res, req)
		require.Equal(t, http.StatusForbidden, res.Code, site)
	}
}

func TestWhatAClientMayNotSend(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client())
	for _, tt := range []struct {
		room, name string
		status     int
	}{
		{"", "Eve", http.StatusBadRequest},
		{"lobby\n", "Eve", http.StatusBadRequest},
		{"\xff", "Eve", http.StatusBadRequest},
		{strings.Repeat("x", 300), "Eve", http.StatusBadRequest},
		{"No Such Room", "Eve", http.StatusNotFound},
		{"lobby", "", http.StatusBadRequest},
		{"lobby", "E\nevent: hello", http.StatusBadRequest},
		{"lobby", strings.Repeat("x", 41), http.StatusBadRequest},
	} {
		path := "/events?" + url.Values{"room": {tt.room}, "name": {tt.name}}.Encode()
		require.Equal(t, tt.status, in.status(http.MethodGet, path, "", ""), "%.20q %.20q", tt.room, tt.name)
	}
	require.Equal(t, http.StatusMethodNotAllowed, in.status(http.MethodGet, "/join", "", ""))
	require.Equal(t, http.StatusOK, in.status(http.MethodGet, "/", "", ""))

	eve := in.open("lobby", "</script>\\")
	require.Equal(t, http.StatusNoContent, eve.post("/join", "what is not asked for is not looked at"))
	for body, status := range map[string]int{
		"": http.StatusBadRequest, "{": http.StatusBadRequest, "[]": http.StatusBadRequest, `"x"`: http.StatusBadRequest,
		`{"x":"` + strings.Repeat("x", 10<<10) + `"}`: http.StatusRequestEntityTooLarge, // Limits.StateBytes
		strings.Repeat(" ", 17<<10):                   http.StatusRequestEntityTooLarge,
	} {
		require.Equal(t, status, eve.post("/state", body), "%.20q", body)
	}
	// Whatever a state holds, an event of it is one line of data.
	require.Equal(t, http.StatusNoContent, eve.post("/state", "{\r\n\"a\":\r\n\r\n\"\\nevent: hello\\n\"}"))
	eve.await("presence", `"state":{"a":"\nevent: hello\n"}`)
	flooded := false
	for range 40 * perSecond {
		if flooded = eve.post("/alive", "") == http.StatusTooManyRequests; flooded {
			break
		}
	}
	require.True(t, flooded)
	require.NoError(t, in.stop())
}

func TestStreamsAreLimited(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client(), func(c *config) { c.streams = 2 })
	ann := in.open("lobby", "Ann")
	in.open("lobby", "Bob")
	path := "/events?room=lobby&name=Eve"
	require.Equal(t, http.StatusServiceUnavailable, in.status(http.MethodGet, path, "", ""))
	ann.stop()
	require.Eventually(t, func() bool {
		res, err := in.request(http.MethodGet, path, "", "")
		return err == nil && res.Body.Close() == nil && res.StatusCode == http.StatusOK
	}, patient, 10*time.Millisecond, "there is a place again")
	require.NoError(t, in.stop())
}

// A client that vanished without a word: what is written to it goes into the
// network's buffers, and it does not answer.
func TestWhoDoesNotAnswerLeaves(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	in := startInstance(t, r.Client(), func(c *config) { c.beat, c.ttl = 200*time.Millisecond, time.Second })
	ann, watcher := in.open("lobby", "Ann"), in.open("lobby", "Watcher")
	require.Equal(t, http.StatusNoContent, ann.post("/join", ""))
	watcher.await("presence", about("join", ann))
	watcher.await("presence", about("leave", ann))
	ann.await("beat", "") // its stream stands
	require.Equal(t, http.StatusNoContent, ann.post("/alive", ""))
	watcher.await("presence", about("join", ann))
	require.NoError(t, in.stop())
}

// A client whose network takes nothing more.
func TestWriteThatFailsEndsTheStream(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	other := startInstance(t, r.Client())
	watcher := other.open("lobby", "Watcher")
	ln := newPipes()
	in := startOn(t, ln, r.Client(), func(c *config) { c.beat, c.write = 50*time.Millisecond, 100*time.Millisecond })
	in.http = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: ln.dial}}

	conn, err := ln.dial(t.Context(), "", "")
	require.NoError(t, err)
	defer func() { _ = conn.Close() }()
	_, err = io.WriteString(conn, "GET /events?room=lobby&name=Ann HTTP/1.1\r\nHost: x\r\n\r\n")
	require.NoError(t, err)
	ann := &client{in: in}
	for lines := bufio.NewReader(conn); ann.Token == ""; {
		line, err := lines.ReadString('\n')
		require.NoError(t, err)
		if data, ok := strings.CutPrefix(line, "data: "); ok {
			require.NoError(t, json.Unmarshal([]byte(data), &ann.hello))
		}
	}
	// From here on nobody reads: a pipe holds nothing.
	require.Contains(t, []int{http.StatusNoContent, http.StatusUnauthorized}, ann.post("/join", ""), "or it was over already")
	require.Eventually(t, func() bool { return ann.post("/alive", "") == http.StatusUnauthorized }, patient, 100*time.Millisecond)
	watcher.mu.Lock()
	require.False(t, watcher.ended, "others go on")
	watcher.mu.Unlock()
	require.NoError(t, in.stop())
	require.NoError(t, other.stop())
}

// pipes is a net.Listener in memory.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	quit  chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), quit: make(chan struct{})} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case p.conns <- server:
		return client, nil
	case <-p.quit:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.quit:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.quit) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func TestShutdownEndsStreams(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	in, other := startInstance(t, r.Client()), startInstance(t, r.Client())
	watcher := other.open("lobby", "Watcher")
	var all []*client
	for i := range 20 {
		c := in.open("lobby", fmt.Sprint("c", i))
		require.Equal(t, http.StatusNoContent, c.post("/join", ""))
		watcher.await("presence", about("join", c))
		all = append(all, c)
	}
	begun := time.Now()
	require.NoError(t, in.stop())
	require.Less(t, time.Since(begun), patience, "it was not cut off")
	for _, c := range all {
		c.await("bye", "")
		c.await("the end", "")
		require.NoError(t, c.err, "the response was ended properly")
	}
	for range all {
		watcher.await("presence", `"leave"`)
	}
	_, err := net.Dial("tcp", in.addr)
	require.Error(t, err, "nobody listens any more")
	require.NoError(t, other.stop())
}
