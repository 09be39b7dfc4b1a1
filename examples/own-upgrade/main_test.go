package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/meshtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const key = "for tests"

// instance is an instance that serves on a free port of the loopback interface.
type instance struct {
	t    *testing.T
	addr string
	http *http.Client
	stop func() error // ends it and returns the result of serve
}

func startInstance(t *testing.T, client *redis.Client, origins ...string) *instance {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	var result error
	cfg := config{redis: client, key: []byte(key), origins: origins, log: slog.New(slog.DiscardHandler)}
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

// post logs in and returns the answer.
func (in *instance) post(name string, header ...string) *http.Response {
	in.t.Helper()
	body := strings.NewReader(url.Values{"name": {name}}.Encode())
	req, err := http.NewRequestWithContext(in.t.Context(), http.MethodPost, "http://"+in.addr+"/login", body)
	require.NoError(in.t, err)
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := in.http.Do(req)
	require.NoError(in.t, err)
	require.NoError(in.t, res.Body.Close())
	return res
}

// pass logs in and returns the cookie.
func (in *instance) pass(name string) string {
	in.t.Helper()
	res := in.post(name)
	require.Equal(in.t, http.StatusOK, res.StatusCode)
	require.Len(in.t, res.Cookies(), 1)
	c := res.Cookies()[0]
	require.True(in.t, c.HttpOnly)
	require.Equal(in.t, http.SameSiteLaxMode, c.SameSite)
	return c.Name + "=" + c.Value
}

// dial opens a socket, or says why there is none.
func (in *instance) dial(cookie, origin string) (*meshtest.Client, error) {
	opts := []meshtest.ConnectOption{meshtest.WithTimeout(2 * time.Minute)}
	if cookie != "" {
		opts = append(opts, meshtest.WithHeader("Cookie", cookie))
	}
	if origin != "" {
		opts = append(opts, meshtest.WithHeader("Origin", origin))
	}
	return meshtest.Dial("ws://"+in.addr+"/ws", opts...)
}

// client is one socket, which speaks both protocols.
type client struct {
	*meshtest.Client
	t *testing.T
}

func (in *instance) client(cookie string) *client {
	in.t.Helper()
	c, err := in.dial(cookie, "http://"+in.addr)
	require.NoError(in.t, err)
	in.t.Cleanup(c.Close)
	return &client{c, in.t}
}

// say sends a message of the app's own protocol.
func (c *client) say(kind int, data string) {
	c.t.Helper()
	require.NoError(c.t, c.Write(kind, []byte(data)))
}

// answer waits for a message of the app's own protocol.
func (c *client) answer() (kind int, data string) {
	c.t.Helper()
	kind, message := c.NextMessage()
	return kind, string(message)
}

// ask sends a command of the Mesh protocol and returns the payload of its answer.
func (c *client) ask(command, payload string) string {
	c.t.Helper()
	answer, err := c.Call(command, json.RawMessage(payload))
	require.NoError(c.t, err)
	return string(answer)
}

const lobby = `{"roomName":"lobby"}`

func TestBothProtocolsOnOneSocket(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client())
	ann := in.client(in.pass("Ann"))

	require.Contains(t, ann.ask("mesh/join-room", lobby), `"metadata":{"name":"Ann"}`)
	ann.say(websocket.TextMessage, "ECHO hello  there\r\n")
	_, answer := ann.answer()
	require.Equal(t, "ECHO hello  there", answer)
	ann.say(websocket.TextMessage, "ME")
	_, answer = ann.answer()
	require.Equal(t, "ME Ann", answer)
	ann.say(websocket.TextMessage, "TIME")
	_, answer = ann.answer()
	at, err := time.Parse(time.RFC3339, answer)
	require.NoError(t, err)
	require.WithinDuration(t, time.Now(), at, time.Minute)

	for i, total := range []uint64{4, 8} {
		part := []byte{'p', 'a', 'r', byte(i)}
		ann.say(websocket.BinaryMessage, "\x01"+string(part))
		kind, ack := ann.answer()
		require.Equal(t, websocket.BinaryMessage, kind)
		want := binary.BigEndian.AppendUint32([]byte{kindPart}, crc32.ChecksumIEEE(part))
		require.Equal(t, binary.BigEndian.AppendUint64(want, total), []byte(ack))
	}
	require.Equal(t, "true", ann.ask("mesh/noop", `{}`), "presence still works")
	require.NoError(t, in.stop())
}

func TestRefusedUpgrades(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client(), "https://app.example.com", "https://other.example.com")
	good := in.pass("Ann")
	others := passCookie + "=" + passes{key: []byte("another")}.issue("Ann", time.Now())
	old := passCookie + "=" + passes{key: []byte(key)}.issue("Ann", time.Now().Add(-passLife))
	_, signature, _ := strings.Cut(strings.TrimPrefix(good, passCookie+"="), ".")
	for name, tt := range map[string]struct {
		cookie, origin string
		status         int
	}{
		"no pass":           {"", "", http.StatusUnauthorized},
		"empty pass":        {passCookie + "=", "", http.StatusUnauthorized},
		"dots":              {passCookie + "=..", "", http.StatusUnauthorized},
		"not signed":        {passCookie + "=QW5u.99999999999.", "", http.StatusUnauthorized},
		"another's name":    {passCookie + "=Qm9i." + signature, "", http.StatusUnauthorized},
		"another key":       {others, "", http.StatusUnauthorized},
		"over":              {old, "", http.StatusUnauthorized},
		"another site":      {good, "https://evil.example.com", http.StatusForbidden},
		"no page":           {good, "null", http.StatusForbidden},
		"only looks alike":  {good, "https://app.example.com.evil.com", http.StatusForbidden},
		"the server's host": {good, "http://" + in.addr, http.StatusForbidden}, // not in the list
		"no browser":        {good, "", http.StatusSwitchingProtocols},
		"own page":          {good, "https://other.example.com", http.StatusSwitchingProtocols},
	} {
		c, err := in.dial(tt.cookie, tt.origin)
		if tt.status == http.StatusSwitchingProtocols {
			require.NoError(t, err, name)
			t.Cleanup(c.Close)
			continue
		}
		refused, ok := errors.AsType[*meshtest.HandshakeError](err)
		require.True(t, ok, "%s: %v", name, err)
		require.Equal(t, tt.status, refused.Status, name)
	}
	for _, name := range []string{"", "\n", "\xff", strings.Repeat("x", 41), strings.Repeat("x", 4<<10)} {
		require.Equal(t, http.StatusBadRequest, in.post(name).StatusCode, "%.10q", name)
	}
	require.Equal(t, http.StatusForbidden, in.post("Ann", "Sec-Fetch-Site", "cross-site").StatusCode)
	res, err := in.http.Get("http://" + in.addr + "/login")
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, http.StatusMethodNotAllowed, res.StatusCode)
	require.NoError(t, in.stop())
}

func TestInvalidMessages(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client())
	pass := in.pass("Eve")
	other := in.client(in.pass("Ann"))
	for name, tt := range map[string]struct {
		kind  int
		data  string
		times int
		code  int
	}{
		"no such kind":     {websocket.BinaryMessage, "\x02x", 1, websocket.CloseUnsupportedData},
		"nothing, binary":  {websocket.BinaryMessage, "", 1, websocket.CloseUnsupportedData},
		"text of no UTF-8": {websocket.TextMessage, "ECHO \xff", 1, websocket.CloseInvalidFramePayloadData},
		"a flood":          {websocket.TextMessage, "TIME", 10 * perSecond, websocket.ClosePolicyViolation},
		"too large":        {websocket.BinaryMessage, "\x01" + strings.Repeat("x", 64<<10), 1, websocket.CloseMessageTooBig},
	} {
		eve := in.client(pass)
		for range tt.times {
			if eve.Write(tt.kind, []byte(tt.data)) != nil {
				break // closed already
			}
		}
		require.Equal(t, tt.code, eve.AwaitClose().Code, name)
	}
	eve := in.client(pass)
	for _, line := range []string{"", "HELO", "echo x", "[1,2]", `{"type":"forged"}`, `{"command":7}`} {
		eve.say(websocket.TextMessage, line)
		_, answer := eve.answer()
		require.Equal(t, "ERR unknown command", answer, line)
	}
	// The app does not receive frames of the Mesh protocol, and its answers never look
	// like one.
	eve.say(websocket.TextMessage, `ECHO {"command":"mesh/presence-update"}`)
	_, answer := eve.answer()
	require.Equal(t, `ECHO {"command":"mesh/presence-update"}`, answer)
	_, err := eve.Call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":{"name":"Ann"}}`))
	require.NotEmpty(t, meshtest.CodeOf(err), "%v", err)
	other.say(websocket.TextMessage, "ECHO still here")
	_, answer = other.answer()
	require.Equal(t, "ECHO still here", answer)
	require.NoError(t, in.stop())
}

func TestTwoInstances(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	one, two := startInstance(t, r.Client()), startInstance(t, r.Client())
	pass := one.pass("Ann")
	ann, bob := one.client(pass), two.client(two.pass("Bob"))
	require.Contains(t, bob.ask("mesh/subscribe-presence", lobby), `"present":[]`)
	require.Contains(t, ann.ask("mesh/join-room", lobby), `"success":true`)
	join := bob.ExpectUpdate("join", "lobby", ann.ID())
	require.JSONEq(t, `{"name":"Ann"}`, string(join.Metadata))
	two.client(pass) // the key is the same, so a pass of one instance is valid on the other

	require.NoError(t, one.stop())
	require.Equal(t, websocket.CloseServiceRestart, ann.AwaitClose().Code)
	bob.ExpectUpdate("leave", "lobby", ann.ID())
	require.NoError(t, two.stop())
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	in := startInstance(t, meshtest.StartRedis(t).Client())
	ann := in.client(in.pass("Ann"))
	ann.say(websocket.TextMessage, "TIME")
	require.NoError(t, in.stop(), "open sockets do not delay it")
	require.Equal(t, websocket.CloseServiceRestart, ann.AwaitClose().Code)
	_, err := net.Dial("tcp", in.addr)
	require.Error(t, err, "the listener is closed")
}
