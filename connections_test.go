package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

func TestConnectionMetadataAcrossServers(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		ctx := t.Context()
		p, watcher, late := s1.Dial(), s2.Dial(), s2.Dial()
		p.Join("lobby")
		watcher.Join("lobby")
		watcher.Subscribe("lobby")
		// s2 sets metadata of a connection of s1.
		require.NoError(t, s2.Connections().SetMetadata(ctx, p.ID, map[string]any{"name": "ann", "n": json.RawMessage(`1.10`)}, mesh.MetadataOptions{}))
		for _, s := range []*harness.Server{s1, s2} {
			w.Eventually(time.Second, func() bool {
				data, err := s.Connections().Metadata(ctx, p.ID)
				return err == nil && string(data) == `{"n":1.10,"name":"ann"}`
			}, "the metadata")
		}
		w.Eventually(2*time.Second, func() bool {
			members, err := s2.Presence().Members(ctx, "lobby")
			require.NoError(t, err)
			for _, m := range members {
				if m.ID == p.ID && m.Metadata != nil {
					return true
				}
			}
			return false
		}, "Members returns the metadata")
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(p.Call("mesh/get-my-connection-metadata", nil)))
		ask := map[string]any{"connectionId": p.ID}
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(watcher.Call("mesh/get-connection-metadata", ask)))
		assert.JSONEq(t, `{"metadata":null}`, string(late.Call("mesh/get-connection-metadata", ask)), "no room in common")
		var shown json.RawMessage
		w.Eventually(2*time.Second, func() bool { // the change reaches the mirror as an event
			var present []mesh.Member
			require.NoError(t, json.Unmarshal(late.Subscribe("lobby").Present, &present))
			for _, m := range present {
				if m.ID == p.ID {
					shown = m.Metadata
				}
			}
			return shown != nil && string(shown) != "null"
		}, "the snapshot has the metadata")
		assert.JSONEq(t, `{"name":"ann","n":1.10}`, string(shown))
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(late.Call("mesh/get-connection-metadata", ask)), "a subscription to a common room is enough")
		all, err := s2.Connections().RoomMetadata(ctx, "lobby")
		require.NoError(t, err)
		assert.Len(t, all, 2)
		assert.JSONEq(t, `{"name":"ann","n":1.10}`, string(all[p.ID]))
		assert.Nil(t, all[watcher.ID])
		w.Sleep(50 * time.Millisecond)
		assert.Empty(t, watcher.Got(), "updates are only joins, leaves and states")

		require.NoError(t, s2.Connections().SetMetadata(ctx, p.ID, nil, mesh.MetadataOptions{}))
		w.Eventually(time.Second, func() bool {
			data, err := s1.Connections().Metadata(ctx, p.ID)
			return err == nil && data == nil
		}, "nil removes the metadata")

		p.Close()
		w.Eventually(2*time.Second, func() bool {
			_, err := s2.Connections().Metadata(ctx, p.ID)
			return errors.Is(err, mesh.ErrUnknownConnection)
		}, "the metadata ends with the connection")
		require.ErrorIs(t, s2.Connections().SetMetadata(ctx, p.ID, 1, mesh.MetadataOptions{}), mesh.ErrUnknownConnection)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, p.ID, 1, mesh.MetadataOptions{}), mesh.ErrUnknownConnection)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, watcher.ID, make(chan int), mesh.MetadataOptions{}), mesh.ErrInvalidMetadata)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, watcher.ID, strings.Repeat("x", 17<<10), mesh.MetadataOptions{}), mesh.ErrTooLarge)
	})
}

func TestSimultaneousMergesOfConnectionMetadata(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		servers := []*harness.Server{w.Tracked(), w.Tracked()}
		p := servers[0].Dial()
		p.Join("lobby")
		mergeSimultaneously(t, func(server int, change map[string]any, strategy mesh.Strategy) error {
			return servers[server].Connections().SetMetadata(t.Context(), p.ID, change, mesh.MetadataOptions{Strategy: strategy})
		}, func(server int) json.RawMessage {
			// The last change reaches the memory of the owner a moment later.
			data := func(s *harness.Server) string {
				data, err := s.Connections().Metadata(t.Context(), p.ID)
				require.NoError(t, err)
				return string(data)
			}
			w.Eventually(2*time.Second, func() bool { return data(servers[0]) == data(servers[1]) }, "the same metadata on both servers")
			return json.RawMessage(data(servers[server]))
		})
	})
}

func TestClosingAndRecheckingAcrossServers(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Server(), w.Server()
		var allowed atomic.Bool
		allowed.Store(true)
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) { return allowed.Load(), nil }})
		}
		p := s2.Dial()
		p.Subscribe("lobby")
		allowed.Store(false)
		p.Subscribe("lobby") // the guard's answer is cached
		require.NoError(t, s1.Connections().Recheck(t.Context(), p.ID))
		w.Eventually(time.Second, func() bool { return p.Pushed("mesh/presence-ended") == 1 }, "the push mesh/presence-ended")
		require.ErrorIs(t, s1.Connections().Recheck(t.Context(), "unknown"), mesh.ErrUnknownConnection)

		require.NoError(t, s1.Connections().Close(t.Context(), p.ID))
		assert.Equal(t, 1000, p.Closed(2*time.Second))
	})
}

// TestFind checks that any server finds a connection with all its rooms.
func TestFind(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.RoomsPerConnection = -1 }))
		other := w.Manager()
		p := s.Dial()
		require.NoError(t, s.Connections().SetMetadata(t.Context(), p.ID, "ann", mesh.MetadataOptions{}))
		var rooms []string
		for i := range mesh.MaxFound + 3 {
			rooms = append(rooms, fmt.Sprint("doc-", i))
			require.NoError(t, s.Presence().Join(t.Context(), rooms[i], p.ID))
		}
		require.NoError(t, s.Presence().PublishState(t.Context(), rooms[0], p.ID, map[string]int{"x": 1}, mesh.StateOptions{}))
		slices.Sort(rooms)
		for i, m := range []*mesh.ConnectionManager{s.Connections(), other.Connections()} {
			info, err := m.Find(t.Context(), p.ID)
			require.NoError(t, err)
			assert.Equal(t, p.ID, info.ID)
			assert.Equal(t, s.Stats().Incarnation, info.Server)
			assert.Equal(t, i == 0, info.Self)
			assert.JSONEq(t, `"ann"`, string(info.Metadata))
			require.Len(t, info.Rooms, len(rooms))
			for i, r := range info.Rooms {
				require.Equal(t, rooms[i], r.Room)
				require.Equal(t, p.ID, r.Entry.ConnectionID)
				require.NotEmpty(t, r.Entry.ID)
				require.Equal(t, info.Server, r.Entry.Server)
				require.Equal(t, r.Room == "doc-0", r.Entry.State != nil)
			}
		}
		require.NoError(t, s.Presence().Disconnect(t.Context(), p.ID))
		for _, m := range []*mesh.ConnectionManager{s.Connections(), other.Connections()} {
			info, err := m.Find(t.Context(), p.ID)
			require.ErrorIs(t, err, mesh.ErrUnknownConnection)
			assert.Zero(t, info)
		}
	})
}

// TestFindIncomplete checks that Find returns the parts that it could read, and an
// error for the others.
func TestFindIncomplete(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		other, die := w.Doomed()
		require.NoError(t, other.Connect(t.Context(), "bob", "bob"))
		require.NoError(t, other.Join(t.Context(), "lobby", "bob"))
		require.NoError(t, s.Presence().Connect(t.Context(), "ann", nil))
		require.NoError(t, s.Presence().Join(t.Context(), "lobby", "ann"))
		find := func(id string, want error) mesh.ConnectionInfo {
			t.Helper()
			began := time.Now()
			info, err := s.Connections().Find(t.Context(), id)
			require.ErrorIs(t, err, want)
			assert.LessOrEqual(t, time.Since(began), 2*time.Second)
			return info
		}
		for _, id := range []string{"", "a:b", "a b", "\xff", strings.Repeat("a", 129)} {
			assert.Zero(t, find(id, mesh.ErrInvalidConnectionID))
		}

		// Redis has lost the entry. The server will write it again.
		require.NoError(t, w.Client().HDel(t.Context(), w.Keys().Members("lobby"), "ann").Err())
		info, err := s.Connections().Find(t.Context(), "ann")
		require.NoError(t, err)
		assert.Equal(t, []mesh.RoomEntry{{Room: "lobby"}}, info.Rooms)

		die()
		info = find("bob", mesh.ErrUnavailable)
		assert.Equal(t, other.Stats().Incarnation, info.Server)
		assert.JSONEq(t, `"bob"`, string(info.Metadata))
		assert.Empty(t, info.Rooms)

		w.Mem.Hang()
		info = find("ann", mesh.ErrUnavailable)
		assert.True(t, info.Self)
		assert.Equal(t, []mesh.RoomEntry{{Room: "lobby"}}, info.Rooms)
		assert.Zero(t, find("bob", mesh.ErrUnavailable))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err = s.Connections().Find(ctx, "bob")
		require.ErrorIs(t, err, context.Canceled)
		w.Mem.Resume()
	})
}

// customJSON encodes to JSON by a method of its own.
type customJSON struct{}

func (customJSON) MarshalJSON() ([]byte, error) { return []byte("1"), nil }

// TestSendAfterShutdown checks that Send returns the same error for every payload.
func TestSendAfterShutdown(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		conn, ok := s.Connection(s.Dial().ID)
		require.True(t, ok)
		require.NoError(t, s.Shutdown(t.Context()))
		for _, payload := range []any{1, customJSON{}} {
			require.ErrorIs(t, conn.Send("news", payload), mesh.ErrClosed, "%T", payload)
		}
	})
}
