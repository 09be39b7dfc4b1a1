package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
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
func dial(visit, origin string) (*meshtest.Client, error) {
	return meshtest.Dial(visit+"ws", meshtest.WithHeader("Origin", strings.TrimSuffix(origin, "/")), meshtest.WithTimeout(2*time.Minute))
}

// connect opens a socket as the page does.
func connect(t *testing.T, visit string) *meshtest.Client {
	t.Helper()
	c, err := dial(visit, visit)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func TestServe(t *testing.T) {
	t.Parallel()
	cfg, err := parseFlags([]string{"-addr", "127.0.0.1:0"}, nil)
	require.NoError(t, err)
	visit, stop := startServe(t, cfg)

	_, err = dial(visit, "http://elsewhere.example")
	refused, ok := errors.AsType[*meshtest.HandshakeError](err)
	require.True(t, ok, "a page of another site: %v", err)
	require.Equal(t, http.StatusForbidden, refused.Status)

	ann := connect(t, visit)
	_, err = ann.Call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":{"name":"","color":""}}`))
	require.ErrorContains(t, err, "a name is needed")
	ann.SetMetadata(map[string]string{"name": "Ann", "color": "#4f46e5"}, "")
	require.True(t, ann.Join("lobby").Success)

	bob := connect(t, visit)
	snapshot := bob.Subscribe("lobby")
	require.True(t, snapshot.Success)
	require.Equal(t, []string{ann.ID()}, snapshot.IDs())
	var got struct{ UserID, Name, Color string }
	require.NoError(t, json.Unmarshal(snapshot.Present[0].Metadata, &got))
	require.Equal(t, []string{"Ann", "#4f46e5"}, []string{got.Name, got.Color})
	require.NotEmpty(t, got.UserID)

	ann.Kill()
	bob.ExpectUpdate("leave", "lobby", ann.ID())

	require.NoError(t, stop())
	bob.AwaitClose()
	_, err = http.Get(visit)
	require.Error(t, err, "the listener is closed")
}

func TestServeWithoutClientMetadata(t *testing.T) {
	t.Parallel()
	cfg, err := parseFlags([]string{"-addr", "127.0.0.1:0", "-client-metadata=false", "-track", "^lobby$"}, nil)
	require.NoError(t, err)
	visit, stop := startServe(t, cfg)
	ann := connect(t, visit)
	_, err = ann.Call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":{"name":"Ann","color":"#4f46e5"}}`))
	require.NotEmpty(t, meshtest.CodeOf(err), "%v", err)
	require.True(t, ann.Join("lobby").Success)
	snapshot := ann.Subscribe("lobby")
	require.Len(t, snapshot.Present, 1)
	require.Regexp(t, `"name":"Guest ....\"`, string(snapshot.Present[0].Metadata))
	require.False(t, ann.Subscribe("other").Success)
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
