package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/testhook"
)

// failingServer starts a server with limits whose callbacks all fail.
func failingServer(w *harness.World, log *testlog.Logbook) *harness.Server {
	s := w.Server(func(o *mesh.Options) {
		o.Logger = slog.New(log)
		o.Limits.CommandsPerSecond, o.Limits.QueueBytes = -1, 32<<10
		o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
			switch r.Header.Get("Authorization") {
			case "":
				return map[string]string{"name": "SECRET-METADATA"}, nil
			case "Bearer SECRET-PANIC":
				panic("authenticate")
			case "Bearer SECRET-FAILING":
				return "SECRET-FAILING", nil
			}
			return nil, errors.New("not known")
		}
	})
	s.OnConnection(func(_ context.Context, c *mesh.Connection) {
		if string(c.Member().Metadata) == `"SECRET-FAILING"` {
			panic("hook")
		}
	})
	s.OnDisconnection(func(context.Context, *mesh.Connection, error) { panic("hook") })
	require.NoError(w.T, s.HandleCommand("app/boom", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { panic("command") }))
	s.Track("^open", mesh.PresenceOptions{})
	s.Track("^error", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) { return false, errors.New("guard") }})
	s.Track("^panic", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) { panic("guard") }})
	s.Track("^hang", mesh.PresenceOptions{Guard: func(ctx context.Context, _ mesh.Member, _ string) (bool, error) {
		<-ctx.Done()
		return false, ctx.Err()
	}})
	return s
}

// causeFailures causes one round of all kinds of failures.
func causeFailures(w *harness.World, s *harness.Server, round, size int) {
	w.T.Helper()
	boom := harness.Upgrading(w, s.Server, mesh.ConnOptions{Foreign: func(*mesh.Connection, int, []byte) { panic("foreign") }}, w.T.Context(), make(chan error, 10*size))
	var all sync.WaitGroup
	for i := range size {
		p := s.Dial()
		all.Go(func() {
			for k := range 10 {
				for _, room := range []string{"error", "panic"} {
					_, _ = p.TryCall("mesh/subscribe-presence", map[string]any{"roomName": fmt.Sprint(room, round, i, k)})
				}
				_, _ = p.TryCall("app/boom", map[string]any{"SECRET-PAYLOAD": k})
			}
			_, _ = p.TryCall("mesh/subscribe-presence", map[string]any{"roomName": fmt.Sprint("hang", round, i)})
			time.Sleep(time.Millisecond) // let the timeout happen before the client closes
			p.Close()
		})
		all.Go(func() { // refused upgrades
			for range 10 {
				for _, credential := range []string{"Bearer SECRET-PANIC", "Bearer SECRET-OTHER"} {
					_, _, err := s.TryDial(http.Header{"Authorization": {credential}})
					assert.Error(w.T, err)
				}
				_, _, err := s.TryDial(http.Header{"Origin": {"https://SECRET:SECRET@foreign.example.com/SECRET?SECRET"}})
				assert.Error(w.T, err)
				p := s.Dial(http.Header{"Authorization": {"Bearer SECRET-FAILING"}})
				assert.Equal(w.T, websocket.CloseInternalServerErr, p.Closed(time.Minute))
			}
		})
		f := boom.Raw()
		all.Go(func() {
			for range 10 {
				assert.NoError(w.T, f.WS.WriteMessage(websocket.TextMessage, []byte("SECRET-PAYLOAD")))
			}
			_ = f.WS.Close()
		})
	}
	all.Wait()
}

// slowReaders makes a member send states to clients that do not read.
func slowReaders(w *harness.World, s *harness.Server, size int) {
	w.T.Helper()
	busy := s.Dial()
	busy.Join("open")
	before := s.Stats().Closed["slow"]
	for range size {
		slow := s.Raw()
		slow.Send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"open"}}`)
	}
	w.Eventually(30*time.Second, func() bool {
		// Joins and leaves do not coalesce.
		busy.Leave("open")
		busy.Join("open")
		_ = busy.State("open", map[string]any{"SECRET-STATE": strings.Repeat("x", 4000)})
		return s.Stats().Closed["slow"]-before == uint64(size)
	}, "the slow connections are closed")
	busy.Close()
}

// However many failures there are, the log has one line of each kind in ten seconds.
// The lines give the number of failures, and contain nothing that clients sent.
func TestLogsAreLimited(t *testing.T) {
	t.Parallel()
	harness.Long(t, "causes thousands of failures")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		const (
			size   = 20
			rounds = 3
			kinds  = 20 // kinds of lines that this test may cause
		)
		var log testlog.Logbook
		s := failingServer(w, &log)
		for round := range rounds {
			causeFailures(w, s, round, size)
			slowReaders(w, s, size)
			for range 3 { // Redis goes away and returns
				w.Mem.Cut()
				w.Sleep(4 * time.Second)
				w.Mem.Heal()
				w.Sleep(time.Second)
			}
			w.Mem.FlushAll()
			w.Sleep(15 * time.Second)
		}
		before := testhook.Callbacks(s.Server)
		causeFailures(w, s, rounds, 1) // the next lines contain the remaining counts
		w.Sleep(limit.LogEvery)
		after := testhook.Callbacks(s.Server)

		lines := log.Written()
		for _, l := range lines {
			require.NotContains(t, l.Text, "SECRET")
			require.Less(t, len(l.Text), 600)
		}
		require.LessOrEqual(t, log.Busiest(), kinds, "lines in %v: %v", limit.LogEvery, lines)
		for _, c := range []struct {
			text          string
			before, after uint64
		}{
			{"failed callback=guard", before["guard"].Errors, after["guard"].Errors},
			{"panicked callback=guard", before["guard"].Panics, after["guard"].Panics},
			{"timed out callback=guard", before["guard"].Timeouts, after["guard"].Timeouts},
			{"panicked callback=command", before["command"].Panics, after["command"].Panics},
			{"panicked callback=Authenticate", before["Authenticate"].Panics, after["Authenticate"].Panics},
			{"panicked callback=OnConnection", before["OnConnection"].Panics, after["OnConnection"].Panics},
			{"panicked callback=Foreign", before["Foreign"].Panics, after["Foreign"].Panics},
		} {
			require.GreaterOrEqual(t, c.before, uint64(size), c.text)
			require.Greater(t, log.Told(c.text), int64(c.before), "the counts in the lines: %s", c.text)
			require.LessOrEqual(t, log.Told(c.text), int64(c.after), c.text)
		}
		stats := s.Stats()
		require.EqualValues(t, rounds*size, stats.Closed["slow"])
		t.Logf("%d lines, at most %d in %v, for %d errors, %d panics and %d timeouts of callbacks, %d slow connections",
			len(lines), log.Busiest(), limit.LogEvery, stats.CallbackErrors, stats.CallbackPanics, stats.CallbackTimeouts, stats.Closed["slow"])
	})
}

// Every line says which server it is of.
func TestNameInLogs(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var out testlog.TextLog
		s := w.Tracked(func(o *mesh.Options) {
			o.Name = "web 1"
			o.Logger = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
		})
		s.OnConnection(nil)
		s.OnConnection(func(context.Context, *mesh.Connection) { panic("no") })
		p := s.Dial()
		p.Closed(10 * time.Second)
		require.NoError(t, w.Client().FlushAll(t.Context()).Err())
		w.Sleep(20 * time.Second)
		w.Mem.Hang()
		w.Sleep(5 * time.Second)
		w.Mem.Resume()
		w.Sleep(5 * time.Second)
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		require.Greater(t, len(lines), 3)
		for _, line := range lines {
			assert.Equal(t, 1, strings.Count(line, `server="web 1"`), line)
		}
	})
}
