package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/limit"
)

// logbook is a slog.Handler that keeps what operators see: Info and above.
type logbook struct {
	mu    sync.Mutex
	lines []logLine
}

type logLine struct {
	at         time.Time
	text       string // message and attributes
	suppressed int64
}

func (b *logbook) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }
func (b *logbook) WithAttrs([]slog.Attr) slog.Handler           { return b }
func (b *logbook) WithGroup(string) slog.Handler                { return b }

func (b *logbook) Handle(_ context.Context, r slog.Record) error {
	line := logLine{at: r.Time, text: r.Message}
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "suppressed" {
			line.suppressed = a.Value.Int64()
		}
		if a.Key != "stack" {
			line.text += fmt.Sprintf(" %s=%v", a.Key, a.Value)
		}
		return true
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, line)
	return nil
}

func (b *logbook) written() []logLine {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.lines)
}

// told returns how many happenings the lines that hold a text stand for.
func (b *logbook) told(text string) (n int64) {
	for _, l := range b.written() {
		if strings.Contains(l.text, text) {
			n += 1 + l.suppressed
		}
	}
	return n
}

// busiest returns how many lines there were at most in limit.LogEvery.
func (b *logbook) busiest() (most int) {
	lines := b.written()
	for i := range lines {
		n := 0
		for _, l := range lines[i:] {
			if l.at.Sub(lines[i].at) < limit.LogEvery {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

// stormy is a server all of whose callbacks fail, and that has limits.
func stormy(w *world, log *logbook) *testServer {
	s := w.server(func(o *Options) {
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
	s.OnConnection(func(_ context.Context, c *Connection) {
		if string(c.Member().Metadata) == `"SECRET-FAILING"` {
			panic("hook")
		}
	})
	s.OnDisconnection(func(context.Context, *Connection, error) { panic("hook") })
	require.NoError(w.t, s.HandleCommand("app/boom", func(context.Context, *Connection, json.RawMessage) (any, error) { panic("command") }))
	s.track("^open", PresenceOptions{})
	s.track("^error", PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) { return false, errors.New("guard") }})
	s.track("^panic", PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) { panic("guard") }})
	s.track("^hang", PresenceOptions{Guard: func(ctx context.Context, _ Member, _ string) (bool, error) { <-ctx.Done(); return false, ctx.Err() }})
	return s
}

// trouble is one round of everything that goes wrong.
func trouble(w *world, s *testServer, round, size int) {
	w.t.Helper()
	boom := upgrading(w, s.Server, ConnOptions{Foreign: func(*Connection, int, []byte) { panic("foreign") }}, w.t.Context(), make(chan error, 10*size))
	var all sync.WaitGroup
	for i := range size {
		p := s.dial()
		all.Go(func() {
			for k := range 10 {
				for _, room := range []string{"error", "panic"} {
					_, _ = p.tryCall("mesh/subscribe-presence", map[string]any{"roomName": fmt.Sprint(room, round, i, k)})
				}
				_, _ = p.tryCall("app/boom", map[string]any{"SECRET-PAYLOAD": k})
			}
			_, _ = p.tryCall("mesh/subscribe-presence", map[string]any{"roomName": fmt.Sprint("hang", round, i)})
			time.Sleep(time.Millisecond) // who goes in the moment of the timeout makes it none
			p.close()
		})
		all.Go(func() { // refused upgrades
			for range 10 {
				for _, credential := range []string{"Bearer SECRET-PANIC", "Bearer SECRET-OTHER"} {
					_, _, err := s.tryDial(http.Header{"Authorization": {credential}})
					assert.Error(w.t, err)
				}
				_, _, err := s.tryDial(http.Header{"Origin": {"https://SECRET.example.com"}})
				assert.Error(w.t, err)
				p := s.dial(http.Header{"Authorization": {"Bearer SECRET-FAILING"}})
				assert.Equal(w.t, websocket.CloseInternalServerErr, p.closed(time.Minute))
			}
		})
		f := boom.raw()
		all.Go(func() {
			for range 10 {
				assert.NoError(w.t, f.ws.WriteMessage(websocket.TextMessage, []byte("SECRET-PAYLOAD")))
			}
			_ = f.ws.Close()
		})
	}
	all.Wait()
}

// slowReaders has members of a room send states that nobody reads.
func slowReaders(w *world, s *testServer, size int) {
	w.t.Helper()
	busy := s.dial()
	busy.join("open")
	before := s.Stats().Closed["slow"]
	for range size {
		slow := s.raw()
		slow.send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"open"}}`)
	}
	w.eventually(30*time.Second, func() bool {
		// Joins and leaves, which are not merged.
		busy.leave("open")
		busy.join("open")
		_ = busy.state("open", map[string]any{"SECRET-STATE": strings.Repeat("x", 4000)})
		return s.Stats().Closed["slow"]-before == uint64(size)
	}, "they are closed")
	busy.close()
}

// However much goes wrong, an operator's log holds one line of each kind in ten
// seconds, says how many it stands for, and nothing of what clients sent.
func TestLogsAreBounded(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		const (
			size   = 20
			rounds = 3
			kinds  = 20 // of lines that this storm may bring about
		)
		var log logbook
		s := stormy(w, &log)
		for round := range rounds {
			trouble(w, s, round, size)
			slowReaders(w, s, size)
			for range 3 { // Redis goes, and comes back
				w.mem.Cut()
				w.sleep(4 * time.Second)
				w.mem.Heal()
				w.sleep(time.Second)
			}
			w.mem.FlushAll()
			w.sleep(15 * time.Second)
		}
		before := s.n.calls.stats()
		trouble(w, s, rounds, 1) // the next lines bring what was held back
		w.sleep(limit.LogEvery)
		after := s.n.calls.stats()

		lines := log.written()
		for _, l := range lines {
			require.NotContains(t, l.text, "SECRET")
			require.Less(t, len(l.text), 600)
		}
		require.LessOrEqual(t, log.busiest(), kinds, "lines in %v: %v", limit.LogEvery, lines)
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
			require.Greater(t, log.told(c.text), int64(c.before), "lines say how many there were: %s", c.text)
			require.LessOrEqual(t, log.told(c.text), int64(c.after), c.text)
		}
		stats := s.Stats()
		require.EqualValues(t, rounds*size, stats.Closed["slow"])
		t.Logf("%d lines, at most %d in %v, for %d errors, %d panics and %d timeouts of callbacks, %d slow connections",
			len(lines), log.busiest(), limit.LogEvery, stats.CallbackErrors, stats.CallbackPanics, stats.CallbackTimeouts, stats.Closed["slow"])
	})
}
