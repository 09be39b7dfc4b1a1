package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
)

// methodsWithContext returns all methods of a running server that take a context and
// wait for Redis or other servers.
func methodsWithContext(s *mesh.Server, conn string) map[string]func(ctx context.Context) error {
	p, c, r := s.Presence(), s.Connections(), s.Rooms()
	return map[string]func(ctx context.Context) error{
		"Presence.Connect":            func(ctx context.Context) error { return p.Connect(ctx, "a:b", nil) },
		"Presence.Disconnect":         func(ctx context.Context) error { return p.Disconnect(ctx, "own2") },
		"Presence.Join":               func(ctx context.Context) error { return p.Join(ctx, "new", conn) },
		"Presence.Leave":              func(ctx context.Context) error { _, err := p.Leave(ctx, "lobby", conn); return err },
		"Presence.Members":            func(ctx context.Context) error { _, err := p.Members(ctx, "lobby"); return err },
		"Presence.PresentConnections": func(ctx context.Context) error { _, err := p.PresentConnections(ctx, "lobby"); return err },
		"Presence.Count":              func(ctx context.Context) error { _, err := p.Count(ctx, "lobby"); return err },
		"Presence.CleanExpired":       func(ctx context.Context) error { _, err := p.CleanExpired(ctx, "lobby"); return err },
		"Presence.PublishState": func(ctx context.Context) error {
			return p.PublishState(ctx, "stays", conn, map[string]int{"a": 1}, mesh.StateOptions{})
		},
		"Presence.ClearState": func(ctx context.Context) error { return p.ClearState(ctx, "stays", conn) },
		"Presence.Servers":    func(ctx context.Context) error { _, err := p.Servers(ctx); return err },
		"Presence.Subscribe": func(ctx context.Context) error {
			for _, err := range p.Subscribe(ctx, "unwatched", mesh.SubscribeOptions{}) {
				return err
			}
			return nil
		},
		"Connections.SetMetadata":  func(ctx context.Context) error { return c.SetMetadata(ctx, conn, 1, mesh.MetadataOptions{}) },
		"Connections.Metadata":     func(ctx context.Context) error { _, err := c.Metadata(ctx, "elsewhere"); return err },
		"Connections.RoomMetadata": func(ctx context.Context) error { _, err := c.RoomMetadata(ctx, "lobby"); return err },
		"Connections.Recheck":      func(ctx context.Context) error { return c.Recheck(ctx, "elsewhere") },
		"Connections.Close":        func(ctx context.Context) error { return c.Close(ctx, "elsewhere") },
		"Connections.Send":         func(ctx context.Context) error { return c.Send(ctx, "elsewhere", "x", nil) },
		"Rooms.Add":                func(ctx context.Context) error { return r.Add(ctx, "lobby", "elsewhere", mesh.AddOptions{}) },
		"Rooms.Remove":             func(ctx context.Context) error { _, err := r.Remove(ctx, "lobby", "elsewhere"); return err },
		"Rooms.Contains":           func(ctx context.Context) error { _, err := r.Contains(ctx, "lobby", conn); return err },
		"Rooms.Members":            func(ctx context.Context) error { _, err := r.ConnectionIDs(ctx, "lobby"); return err },
		"Rooms.All":                func(ctx context.Context) error { _, err := r.All(ctx); return err },
		"Rooms.Of":                 func(ctx context.Context) error { _, err := r.Of(ctx, "elsewhere"); return err },
		"Rooms.Clear":              func(ctx context.Context) error { return r.Clear(ctx, "lobby") },
		"Rooms.Delete":             func(ctx context.Context) error { return r.Delete(ctx, "lobby") },
		"Rooms.SetMetadata":        func(ctx context.Context) error { return r.SetMetadata(ctx, "lobby", 1, mesh.MetadataOptions{}) },
		"Rooms.Metadata":           func(ctx context.Context) error { _, err := r.Metadata(ctx, "lobby"); return err },
		"Rooms.Send":               func(ctx context.Context) error { return r.Send(ctx, "lobby", "x", nil) },
		"Rooms.List":               func(ctx context.Context) error { _, err := r.List(ctx, mesh.RoomQuery{}); return err },
		"Rooms.Entries":            func(ctx context.Context) error { _, err := r.Entries(ctx, "lobby", mesh.EntryQuery{}); return err },
	}
}

// TestCancelledContexts checks that a context which the caller cancels is not reported
// as a failure of Redis.
func TestCancelledContexts(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		conn := connected(t, s)
		cause := errors.New("the user left")
		w.Away()
		for name, f := range methodsWithContext(s.Server, conn) {
			if name == "Presence.Connect" { // refuses the id before it waits
				continue
			}
			for _, after := range []time.Duration{0, 10 * time.Millisecond} {
				ctx, cancel := context.WithCancelCause(t.Context())
				begun := time.Now()
				if after == 0 {
					cancel(cause)
				}
				time.AfterFunc(after, func() { cancel(cause) })
				err := f(ctx)
				if after > 0 && time.Since(begun) < after {
					continue // Redis is known to be away
				}
				require.ErrorIs(t, err, context.Canceled, "%s after %v", name, after)
				assert.ErrorIs(t, err, cause, name)
				assert.NotErrorIs(t, err, mesh.ErrUnavailable, name)
			}
		}
		// If a deadline passes while Redis does not answer, both errors are reported.
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := s.Rooms().All(ctx)
		require.ErrorIs(t, err, mesh.ErrUnavailable)
		assert.ErrorIs(t, err, context.DeadlineExceeded)

		other, err := mesh.NewServer(w.Options())
		require.NoError(t, err)
		ctx, stop := context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, stop)
		err = other.Start(ctx)
		require.ErrorIs(t, err, context.Canceled)
		assert.NotErrorIs(t, err, mesh.ErrUnavailable)
		w.Back()
		require.NoError(t, other.Shutdown(t.Context()))
	})
}

// connected adds connections of the app's own transport to two rooms.
func connected(t *testing.T, s *harness.Server) string {
	for _, id := range []string{"own", "own2"} {
		require.NoError(t, s.Presence().Connect(t.Context(), id, nil))
		require.NoError(t, s.Presence().Join(t.Context(), "lobby", id))
		require.NoError(t, s.Presence().Join(t.Context(), "stays", id))
	}
	return "own"
}

// TestNilArguments checks that nil arguments return an error or log one, and that the
// server keeps working.
func TestNilArguments(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var log testlog.TextLog
		s := w.Tracked(func(o *mesh.Options) { o.Logger = log.Logger() })
		conn := connected(t, s)
		var none context.Context
		methods := methodsWithContext(s.Server, conn)
		methods["Start"] = s.Start
		methods["Shutdown"] = s.Shutdown
		methods["Drain"] = func(ctx context.Context) error { return s.Drain(ctx, 0) }
		for name, f := range methods {
			require.ErrorIs(t, f(none), mesh.ErrInvalidOptions, name)
		}
		for name, ws := range map[string]*websocket.Conn{"nil": nil, "zero": {}} {
			require.ErrorIs(t, s.ServeConn(t.Context(), ws, mesh.ConnOptions{}), mesh.ErrInvalidOptions, name)
		}
		s.OnConnection(nil)
		s.OnDisconnection(nil)
		s.ServeHTTP(nil, nil)
		require.ErrorIs(t, s.HandleCommand("x", nil), mesh.ErrInvalidOptions)
		assert.Equal(t, 3, strings.Count(log.String(), "level=ERROR"), "%s", &log)
		p := s.Dial()
		p.Join("lobby")
		assert.Equal(t, 3, s.Stats().Connections, "a nil argument was registered")
	})
}

// TestMetadataThatPanics checks that ServeConn returns an error and closes the socket
// if encoding the metadata panics.
func TestMetadataThatPanics(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		ends := make(chan error, 1)
		app := harness.Upgrading(w, s.Server, mesh.ConnOptions{Metadata: harness.Panicking{}}, t.Context(), ends)
		_, _, err := app.TryDial()
		require.Error(t, err, "closed before its first frame")
		require.ErrorIs(t, <-ends, mesh.ErrInvalidMetadata)
		assert.Zero(t, s.Stats().Connections)
		assert.EqualValues(t, 1, s.Stats().CallbackPanics)
		require.ErrorIs(t, s.Connections().SetMetadata(t.Context(), "x", harness.Panicking{}, mesh.MetadataOptions{}), mesh.ErrInvalidMetadata)
		require.ErrorContains(t, s.Connections().Send(t.Context(), "x", "y", harness.Panicking{}), "panicked")
	})
}

// TestCloseChecksItsFrame checks that Close refuses codes and reasons that a close
// frame cannot contain, and does not close the connection.
func TestCloseChecksItsFrame(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		bad := map[int]string{1000: strings.Repeat("x", 124), 4000: "\xff"}
		for _, code := range []int{-1, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 1 << 16, 1000 + 1<<16} {
			bad[code] = ""
		}
		p := s.Dial()
		c, ok := s.Connection(p.ID)
		require.True(t, ok)
		for code, reason := range bad {
			require.ErrorIs(t, c.Close(code, reason), mesh.ErrInvalidOptions, "%d %q", code, reason)
		}
		require.ErrorIs(t, c.Close(0, strings.Repeat("é", 62)), mesh.ErrInvalidOptions, "124 bytes")
		p.Join("lobby")
		for _, code := range []int{0, 1000, 1003, 1007, 1011, 1013, 3000, 4999} {
			p := s.Dial()
			c, ok := s.Connection(p.ID)
			require.True(t, ok)
			require.NoError(t, c.Close(code, strings.Repeat("é", 61)+"x"))
			require.NoError(t, c.Close(code, ""), "second call")
			if code == 0 {
				code = websocket.CloseNormalClosure
			}
			assert.Equal(t, code, p.Closed(5*time.Second))
		}
	})
}

// TestErrorsForClientsSpeakOfJSON checks that errors for clients use the terms of JSON,
// not of Go.
func TestErrorsForClientsSpeakOfJSON(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.AllowMetadata)
		require.NoError(t, s.HandleCommand("typed", func(_ context.Context, _ *mesh.Connection, payload json.RawMessage) (any, error) {
			var v struct {
				Name string
				In   struct{ Age int8 }
				List []bool
			}
			return v, json.Unmarshal(payload, &v)
		}))
		require.NoError(t, s.HandleCommand("metadata", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
			return mesh.MetadataOf[struct{ A int }](mesh.Member{Metadata: json.RawMessage(`{"A":"x"}`)})
		}))
		require.NoError(t, s.HandleCommand("unencodable", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
			return map[string]any{"f": func() {}}, nil
		}))
		p := s.Level2().Dial()
		for _, c := range []struct{ command, payload, message, code string }{
			{"mesh/join-room", `{"roomName":5}`, "invalid payload: roomName must be a string", "EINVALID"},
			{"mesh/join-room", `{"ROOMNAME":"a"}`, "invalid room name: it is empty", "EINVALID"},
			{"mesh/join-room", `[]`, "invalid payload: payload must be an object", "EINVALID"},
			{"mesh/join-room", `null`, "invalid room name: it is empty", "EINVALID"},
			{"mesh/join-room", `{"roomName":"a\u0001"}`, `invalid room name: "a\u0001" holds a control character`, "EINVALID"},
			{"mesh/publish-presence-state", `{"roomName":"a","state":{},"expireAfter":"1"}`, "invalid payload: expireAfter must be a number", "EINVALID"},
			{"mesh/publish-presence-state", `{"roomName":"a","state":{},"expireAfter":1e999}`, "invalid payload: expireAfter is too large", "EINVALID"},
			{"mesh/publish-presence-state", `{"roomName":"a","state":[]}`, "invalid presence state: not a JSON object", "EINVALID"},
			{"mesh/get-connection-metadata", `{"connectionId":{}}`, "invalid payload: connectionId must be a string", "EINVALID"},
			{"mesh/set-my-connection-metadata", `{"metadata":1,"options":{"strategy":"up"}}`, `invalid metadata: unknown metadata strategy "up"`, "EINVALID"},
			{"mesh/set-my-connection-metadata", `{"metadata":1,"options":7}`, "invalid payload: options must be an object", "EINVALID"},
			{"typed", `{"Name":1}`, "Name must be a string", "ESERVER"},
			{"typed", `{"In":{"Age":"x"}}`, "In.Age must be a number", "ESERVER"},
			{"typed", `{"In":{"Age":1000}}`, "In.Age is out of range", "ESERVER"},
			{"typed", `{"List":{}}`, "List must be an array", "ESERVER"},
			{"typed", `[]`, "it must be an object", "ESERVER"},
			{"metadata", `{}`, "invalid metadata: A must be a number", "EINVALID"},
			{"unencodable", `{}`, "Internal error", "ESERVER"},
		} {
			var e struct{ Error, Code string }
			require.NoError(t, json.Unmarshal(p.Call(c.command, json.RawMessage(c.payload)), &e))
			assert.Equal(t, [2]string{c.message, c.code}, [2]string{e.Error, e.Code}, "%s %s", c.command, c.payload)
		}
		assert.EqualValues(t, 1, s.Stats().CallbackErrors, "only the result that cannot be encoded")
	})
}

// TestShutdownInsideACallback checks that Shutdown and Drain inside a callback do not
// wait for it.
func TestShutdownInsideACallback(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]func(ctx context.Context, s *mesh.Server) error{
		"Shutdown":                      func(_ context.Context, s *mesh.Server) error { return s.Shutdown(context.Background()) },
		"Shutdown with its context":     func(ctx context.Context, s *mesh.Server) error { return s.Shutdown(ctx) },
		"Drain":                         func(_ context.Context, s *mesh.Server) error { return s.Drain(context.Background(), 0) },
		"Shutdown on another goroutine": func(_ context.Context, s *mesh.Server) error { return shutdownOnGoroutine(s) },
	} {
		for _, place := range []string{"Authenticate", "OnConnection", "OnDisconnection", "command", "guard", "Foreign", "ClientMetadata"} {
			t.Run(fmt.Sprint(name, "/", place), func(t *testing.T) {
				t.Parallel()
				harness.Embedded(t, func(t *testing.T, w *harness.World) {
					returned := make(chan error, 1)
					var m *harness.Misbehaving
					m = harness.NewMisbehaving(t, w, func(ctx context.Context) error {
						err := stop(ctx, m.S.Server)
						select {
						case returned <- err:
						default:
						}
						return nil
					})
					m.Name.Store(&place)
					begun := time.Now()
					var client sync.WaitGroup
					defer func() {
						client.Wait()
						for _, s := range []*harness.Server{m.S, m.App} {
							s.Stop.Do(func() {
								_ = s.Shutdown(t.Context())
								_ = s.HTTP.Close()
								<-s.Done
							})
						}
					}()
					client.Go(func() {
						s := m.S
						if place == "Foreign" {
							s = m.App
						}
						p, _, err := s.TryDial()
						if err != nil {
							return
						}
						_ = p.Send(map[string]any{"command": "mesh/join-room", "payload": map[string]any{"roomName": "guarded"}})
						_ = p.Send(map[string]any{"command": "mesh/subscribe-presence", "payload": map[string]any{"roomName": "guarded"}})
						_ = p.Send(map[string]any{"command": "mesh/set-my-connection-metadata", "payload": map[string]any{"metadata": 1}})
						_ = p.Send(map[string]any{"command": "work"})
						_ = p.Client.Write(websocket.BinaryMessage, []byte("x"))
						time.Sleep(time.Second)
						p.Close()
					})
					select {
					case err := <-returned:
						if name != "Shutdown on another goroutine" {
							require.NoError(t, err)
							assert.Less(t, time.Since(begun), 3*time.Second)
						}
					case <-time.After(time.Minute):
						require.Fail(t, "the call has not returned")
					}
				})
			})
		}
	}
}

// shutdownOnGoroutine shuts a server down on a goroutine that the callback waits for.
func shutdownOnGoroutine(s *mesh.Server) error {
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(context.Background()) }()
	return <-done
}

// Errors name the room or connection, and Redis only once.
func TestErrorsNameTheirSubject(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		conn := connected(t, s)
		assert.ErrorContains(t, s.Presence().PublishState(t.Context(), "lobby", conn, map[string]any{}, mesh.StateOptions{}), `not tracked: "lobby"`)
		s.Track(".*", mesh.PresenceOptions{})
		err := s.Connections().SetMetadata(t.Context(), "stranger", 1, mesh.MetadataOptions{})
		require.ErrorIs(t, err, mesh.ErrUnknownConnection)
		assert.ErrorContains(t, err, "stranger")
		w.Away()
		for name, f := range methodsWithContext(s.Server, conn) {
			if err := f(t.Context()); errors.Is(err, mesh.ErrUnavailable) {
				assert.NotContains(t, err.Error(), "store:", name)
				assert.NotContains(t, err.Error(), "local:", name)
			}
		}
		w.Back()
	})
}
