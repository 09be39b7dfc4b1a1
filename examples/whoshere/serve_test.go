package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// startServe serves on a free port of the loopback interface until stop is called. stop
// returns the result of serve.
func startServe(t *testing.T, cfg config) (visit string, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	logs, out := io.Pipe()
	var result error
	var wg sync.WaitGroup
	wg.Go(func() {
		result = serve(ctx, cfg, slog.New(slog.NewTextHandler(out, nil)))
		_ = out.Close()
	})
	stop = func() error {
		cancel()
		wg.Wait()
		return result
	}
	t.Cleanup(func() { _ = stop() })

	ready := regexp.MustCompile(`msg=ready visit=(\S+)`)
	lines := bufio.NewScanner(logs)
	for lines.Scan() {
		if m := ready.FindStringSubmatch(lines.Text()); m != nil {
			wg.Go(func() { _, _ = io.Copy(io.Discard, logs) })
			return m[1], stop
		}
	}
	t.Fatalf("not ready: %v", stop())
	return "", nil
}

// dial opens a socket as the page at origin does.
func dial(t *testing.T, visit, origin string) (*websocket.Conn, *http.Response, error) {
	t.Helper()
	url := "ws" + strings.TrimPrefix(visit, "http") + "ws"
	ws, res, err := websocket.DefaultDialer.DialContext(t.Context(), url, http.Header{"Origin": {strings.TrimSuffix(origin, "/")}})
	if err == nil {
		t.Cleanup(func() { _ = ws.Close() })
		require.NoError(t, ws.SetReadDeadline(time.Now().Add(2*time.Minute)))
	}
	return ws, res, err
}

// await reads frames until one of that command, and returns its payload.
func await(t *testing.T, ws *websocket.Conn, command string) string {
	t.Helper()
	for {
		var frame struct {
			Command string
			Payload json.RawMessage
		}
		require.NoError(t, ws.ReadJSON(&frame))
		if frame.Command == command {
			return string(frame.Payload)
		}
	}
}

// ask sends a request and returns the payload of its answer.
func ask(t *testing.T, ws *websocket.Conn, command, payload string) string {
	t.Helper()
	frame := map[string]any{"id": 1, "command": command, "payload": json.RawMessage(payload)}
	require.NoError(t, ws.WriteJSON(frame))
	return await(t, ws, command)
}

// snapshot is the answer to a subscription.
type snapshot struct {
	Success bool
	Present []struct{ ID, Metadata json.RawMessage }
}

func subscribe(t *testing.T, ws *websocket.Conn) (s snapshot) {
	t.Helper()
	answer := ask(t, ws, "mesh/subscribe-presence", `{"roomName":"lobby"}`)
	require.NoError(t, json.Unmarshal([]byte(answer), &s))
	return s
}

func TestServe(t *testing.T) {
	t.Parallel()
	cfg, err := parseFlags([]string{"-addr", "127.0.0.1:0"}, nil)
	require.NoError(t, err)
	visit, stop := startServe(t, cfg)

	_, res, err := dial(t, visit, "http://elsewhere.example")
	require.Error(t, err, "a page of another site")
	require.Equal(t, http.StatusForbidden, res.StatusCode)

	ann, _, err := dial(t, visit, visit)
	require.NoError(t, err)
	annID := await(t, ann, "mesh/assign-id")
	require.Contains(t, ask(t, ann, "mesh/set-my-connection-metadata", `{"metadata":{"name":"","color":""}}`), "a name is needed")
	person := `{"name":"Ann","color":"#4f46e5"}`
	require.JSONEq(t, `{"success":true}`, ask(t, ann, "mesh/set-my-connection-metadata", `{"metadata":`+person+`}`))
	require.Contains(t, ask(t, ann, "mesh/join-room", `{"roomName":"lobby"}`), `"success":true`)

	bob, _, err := dial(t, visit, visit)
	require.NoError(t, err)
	await(t, bob, "mesh/assign-id")
	snapshot := subscribe(t, bob)
	require.True(t, snapshot.Success)
	require.Len(t, snapshot.Present, 1)
	require.JSONEq(t, annID, string(snapshot.Present[0].ID))
	var got struct{ UserID, Name, Color string }
	require.NoError(t, json.Unmarshal(snapshot.Present[0].Metadata, &got))
	require.Equal(t, []string{"Ann", "#4f46e5"}, []string{got.Name, got.Color})
	require.NotEmpty(t, got.UserID)

	require.NoError(t, ann.Close())
	require.Contains(t, await(t, bob, "mesh/presence-update"), `"leave"`)

	require.NoError(t, stop())
	for err == nil { // frames on the way, and then the end
		_, _, err = bob.ReadMessage()
	}
	_, err = http.Get(visit)
	require.Error(t, err, "the listener is closed")
}

func TestServeWithoutClientMetadata(t *testing.T) {
	t.Parallel()
	cfg, err := parseFlags([]string{"-addr", "127.0.0.1:0", "-client-metadata=false", "-track", "^lobby$"}, nil)
	require.NoError(t, err)
	visit, stop := startServe(t, cfg)
	ws, _, err := dial(t, visit, visit)
	require.NoError(t, err)
	require.Contains(t, ask(t, ws, "mesh/set-my-connection-metadata", `{"metadata":{"name":"Ann","color":"#4f46e5"}}`), `"error"`)
	require.Contains(t, ask(t, ws, "mesh/join-room", `{"roomName":"lobby"}`), `"success":true`)
	snapshot := subscribe(t, ws)
	require.Len(t, snapshot.Present, 1)
	require.Regexp(t, `"name":"Guest ....\"`, string(snapshot.Present[0].Metadata))
	require.Contains(t, ask(t, ws, "mesh/subscribe-presence", `{"roomName":"other"}`), `"success":false`)
	require.NoError(t, stop())
}

// net/http keeps the headers of a request for as long as the socket lives.
func TestServeRefusesLargeHeaders(t *testing.T) {
	t.Parallel()
	cfg, err := parseFlags([]string{"-addr", "127.0.0.1:0"}, nil)
	require.NoError(t, err)
	visit, stop := startServe(t, cfg)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, visit, nil)
	require.NoError(t, err)
	req.Header.Set("X", strings.Repeat("x", 64<<10))
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, res.StatusCode)
	require.NoError(t, stop())
}

func TestServeNeedsItsAddress(t *testing.T) {
	t.Parallel()
	cfg, err := parseFlags([]string{"-addr", "127.0.0.1:0"}, nil)
	require.NoError(t, err)
	visit, stop := startServe(t, cfg)
	cfg.addr = strings.TrimSuffix(strings.TrimPrefix(visit, "http://"), "/")
	err = serve(t.Context(), cfg, slog.New(slog.DiscardHandler))
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.NoError(t, stop())
}
