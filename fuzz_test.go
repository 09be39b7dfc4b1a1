package mesh_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/meshtest"
)

// FuzzFrames sends whatever it is given to a running server as one text
// frame. The connection lives on, or is closed with a code, nothing panics,
// and somebody else's connection notices nothing.
func FuzzFrames(f *testing.F) {
	for _, command := range mesh.CommandNames() {
		for _, payload := range []string{
			`{"roomName":"a"}`, `{"roomName":"guarded"}`, `{"roomName":"a","state":{"x":1},"expireAfter":5,"silent":true}`,
			`{"connectionId":"x"}`, `{"metadata":{"a":{"b":1}},"options":{"strategy":"deepMerge"}}`, `null`, `[]`,
		} {
			f.Add(fmt.Sprintf(`{"id":1,"command":%q,"payload":%s}`, command, payload))
		}
	}
	for _, text := range []string{
		``, `null`, `{}`, `[]`, `{"command":"echo","id":1,"payload":"x"}`, `{"id":1e400,"command":"mesh/noop"}`,
		`{"id":-0,"command":"mesh\/join-room","payload":{"roomName":"\ud800"}}`, `{"command":"pong"}`, `{"command":"latency:response"}`,
		"\xff", `{"id":1,"id":2,"command":"a","command":"mesh/noop"}`, `{"id":1,"command":"mesh/join-room","payload":{"roomName":"a:conn:b{}*"}}`,
	} {
		f.Add(text)
	}
	f.Fuzz(fuzzed(f).frame)
}

// fuzzServer is one server for all inputs.
type fuzzServer struct {
	srv       *mesh.Server
	listener  *harness.PipeListener
	neighbour *websocket.Conn
}

func fuzzed(f *testing.F) *fuzzServer {
	r := meshtest.StartRedis(f)
	opts := mesh.Options{
		Redis: r.Client(), LatencyInterval: -1,
		Limits: mesh.Limits{CommandsPerSecond: -1, UpgradesPerSecond: -1, FrameBytes: 16 << 10},
	}
	harness.AllowMetadata(&opts)
	srv, err := mesh.NewServer(opts)
	require.NoError(f, err)
	require.NoError(f, srv.TrackPresence(mesh.Regexp(regexp.MustCompile(`^[^x]`)), mesh.PresenceOptions{TTL: time.Second}))
	require.NoError(f, srv.TrackPresence(mesh.Exact("guarded"), mesh.PresenceOptions{Guard: harness.AdminsOnly, JoinGuard: harness.AdminsOnly}))
	require.NoError(f, srv.HandleCommand("echo", func(_ context.Context, _ *mesh.Connection, payload json.RawMessage) (any, error) {
		return payload, nil
	}))
	require.NoError(f, srv.Start(f.Context()))
	z := &fuzzServer{srv: srv, listener: harness.NewPipeListener()}
	h := &http.Server{Handler: srv}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = h.Serve(z.listener)
	}()
	f.Cleanup(func() {
		// The test's own context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		require.NoError(f, srv.Shutdown(ctx))
		_ = h.Close()
		<-done
	})
	z.neighbour = z.dial(f)
	f.Cleanup(func() { _ = z.neighbour.Close() })
	return z
}

func (z *fuzzServer) dial(t testing.TB) *websocket.Conn {
	d := websocket.Dialer{NetDialContext: z.listener.Dial}
	ws, _, err := d.Dial("ws://127.0.0.1/ws", nil)
	require.NoError(t, err)
	_, first, err := ws.ReadMessage()
	require.NoError(t, err)
	require.Contains(t, string(first), "mesh/assign-id")
	return ws
}

// alive sends a request and reads until its answer, or the end.
func alive(ws *websocket.Conn) error {
	if err := ws.SetReadDeadline(time.Now().Add(15 * time.Second)); err != nil {
		return err
	}
	// Written at once or not: whoever is closing may not read any more.
	_ = ws.WriteMessage(websocket.TextMessage, []byte(`{"id":98765432,"command":"mesh/noop"}`))
	for {
		_, data, err := ws.ReadMessage()
		if err != nil {
			return err
		}
		var f struct{ Command string }
		if err := json.Unmarshal(data, &f); err != nil {
			return fmt.Errorf("not JSON: %q: %w", data, err)
		}
		if strings.HasPrefix(string(data), `{"id":98765432,"command":"mesh/noop"`) {
			return nil
		}
	}
}

// frame tries one input.
func (z *fuzzServer) frame(t *testing.T, text string) {
	ws := z.dial(t)
	defer func() { _ = ws.Close() }()
	_ = ws.SetWriteDeadline(time.Now().Add(5 * time.Second))
	_ = ws.WriteMessage(websocket.TextMessage, []byte(text)) // fails where it is closed half way
	if err := alive(ws); err != nil {
		require.NotZero(t, harness.CloseCodeOf(err), "ended without a code: %v", err)
		require.Greater(t, len(text), 16<<10, "closed without a reason: %v", err)
	}
	require.NoError(t, alive(z.neighbour), "the neighbour")
	require.Zero(t, testhook.SocketPanics(z.srv))
	require.Zero(t, z.srv.Stats().CallbackPanics)
}
