package mesh_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// A connection is found from any server, with all its rooms in whichever buckets.
func TestFind(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.RoomsPerConnection = -1 }))
		asked := w.Manager()
		p := s.Dial()
		require.NoError(t, s.Connections().SetMetadata(t.Context(), p.ID, "ann", mesh.MetadataOptions{}))
		var rooms []string
		for i := range mesh.MaxFound + 3 {
			rooms = append(rooms, fmt.Sprint("doc-", i))
			require.NoError(t, s.Presence().Join(t.Context(), rooms[i], p.ID))
		}
		require.NoError(t, s.Presence().PublishState(t.Context(), rooms[0], p.ID, map[string]int{"x": 1}, mesh.StateOptions{}))
		slices.Sort(rooms)
		for which, m := range []*mesh.ConnectionManager{s.Connections(), asked.Connections()} {
			info, err := m.Find(t.Context(), p.ID)
			require.NoError(t, err)
			assert.Equal(t, p.ID, info.ID)
			assert.Equal(t, s.Stats().Incarnation, info.Server)
			assert.Equal(t, which == 0, info.Self)
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
		for _, m := range []*mesh.ConnectionManager{s.Connections(), asked.Connections()} {
			info, err := m.Find(t.Context(), p.ID)
			require.ErrorIs(t, err, mesh.ErrUnknownConnection)
			assert.Zero(t, info)
		}
	})
}

// What cannot be found out is missing, and the error says why.
func TestFindOnlyInPart(t *testing.T) {
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

		// Redis has lost the entry, and the server will write it again.
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
