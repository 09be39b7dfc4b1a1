package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/meshtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPresenceByEvents(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client())
	ann := in.open("lobby", "Ann")
	require.JSONEq(t, `{"type":"snapshot","state":null}`, ann.await("presence", ""), "the room is empty")
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
	require.Equal(t, http.StatusConflict, ann.post("/state", `{}`), "only members have a state")

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

// All members of the room see the ids. An id gives no rights.
func TestTokensAreRequired(t *testing.T) {
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

// A page of another site cannot open a stream for its visitors.
func TestCrossSiteStreamsAreRefused(t *testing.T) {
	t.Parallel()
	a := newApp(config{}, nil) // a refused request reaches neither presence nor the table of streams
	defer a.endStreams()
	for _, site := range []string{"cross-site", "same-site"} {
		req := httptest.NewRequest(http.MethodGet, "/events?room=lobby&name=Ann", nil)
		req.Header.Set("Sec-Fetch-Site", site)
		res := httptest.NewRecorder()
		a.handler().ServeHTTP(res, req)
		require.Equal(t, http.StatusForbidden, res.Code, site)
	}
}

func TestInvalidRequests(t *testing.T) {
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
	require.Equal(t, http.StatusNoContent, eve.post("/join", "this body is ignored"))
	for body, status := range map[string]int{
		"": http.StatusBadRequest, "{": http.StatusBadRequest, "[]": http.StatusBadRequest, `"x"`: http.StatusBadRequest,
		`{"x":"` + strings.Repeat("x", 10<<10) + `"}`: http.StatusRequestEntityTooLarge, // Limits.StateBytes
		strings.Repeat(" ", 17<<10):                   http.StatusRequestEntityTooLarge,
	} {
		require.Equal(t, status, eve.post("/state", body), "%.20q", body)
	}
	// The event of a state is always one line of data.
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
	}, testTimeout, 10*time.Millisecond, "the number of streams is below the limit again")
	require.NoError(t, in.stop())
}

// If a client vanished silently, the network's buffers accept all writes, but the client
// does not answer.
func TestSilentClientLeaves(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	in := startInstance(t, r.Client(), func(c *config) { c.ping, c.ttl = 200*time.Millisecond, time.Second })
	ann, watcher := in.open("lobby", "Ann"), in.open("lobby", "Watcher")
	require.Equal(t, http.StatusNoContent, ann.post("/join", ""))
	watcher.await("presence", about("join", ann))
	watcher.await("presence", about("leave", ann))
	ann.await("ping", "") // the stream itself is still open
	require.Equal(t, http.StatusNoContent, ann.post("/alive", ""))
	watcher.await("presence", about("join", ann))
	require.NoError(t, in.stop())
}

// The network of this client accepts no more data.
func TestWriteThatFailsEndsTheStream(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	other := startInstance(t, r.Client())
	watcher := other.open("lobby", "Watcher")
	ln := newPipes()
	in := startOn(t, ln, r.Client(), func(c *config) { c.ping, c.write = 50*time.Millisecond, 100*time.Millisecond })
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
	// The test does not read from here on, and a pipe has no buffer.
	// The stream may be ending, or may have ended, when the join arrives.
	require.Contains(t, []int{http.StatusNoContent, http.StatusServiceUnavailable, http.StatusGone, http.StatusUnauthorized}, ann.post("/join", ""))
	require.Eventually(t, func() bool { return ann.post("/alive", "") == http.StatusUnauthorized }, testTimeout, 100*time.Millisecond)
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
	require.NoError(t, in.stop(), "the shutdown was in time")
	for _, c := range all {
		c.await("bye", "")
		c.await("the end", "")
		require.NoError(t, c.err, "the response was ended properly")
	}
	for range all {
		watcher.await("presence", `"leave"`)
	}
	_, err := net.Dial("tcp", in.addr)
	require.Error(t, err, "the listener is closed")
	require.NoError(t, other.stop())
}
