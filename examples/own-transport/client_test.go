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
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// testTimeout limits each wait of a test.
const testTimeout = 2 * time.Minute

// instance is an instance that serves until stop. stop returns the result of serve.
type instance struct {
	t    *testing.T
	addr string
	http *http.Client
	stop func() error
}

// startInstance starts an instance on a free port of the loopback interface.
func startInstance(t *testing.T, client *redis.Client, change ...func(*config)) *instance {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return startOn(t, ln, client, change...)
}

func startOn(t *testing.T, ln net.Listener, client *redis.Client, change ...func(*config)) *instance {
	t.Helper()
	cfg := config{
		redis: client, ping: time.Minute, ttl: time.Hour, write: 10 * time.Second, streams: 100,
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
	taken  int           // number of events that await has returned or skipped
	more   chan struct{} // closed at the next event; nil if await does not wait
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

// await returns the data of the next event of that name that contains a text.
func (c *client) await(name, holds string) string {
	c.in.t.Helper()
	limit := time.NewTimer(testTimeout)
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
			require.FailNow(c.in.t, "no such event", "%s %s: got %s", name, holds, seen)
		}
	}
}

// post sends a POST with the client's token.
func (c *client) post(path, body string) int {
	c.in.t.Helper()
	return c.in.status(http.MethodPost, path, c.Token, body)
}

// about returns the beginning of an event about a client.
func about(kind string, c *client) string { return `"type":"` + kind + `","id":"` + c.ID + `"` }
