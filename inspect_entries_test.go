package mesh_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
)

func TestEntriesOfARoom(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s, p := w.Server(), w.Manager()
		s.Track(".*", mesh.PresenceOptions{TTL: time.Minute})
		page, err := s.Rooms().Entries(ctx, "lobby", mesh.EntryQuery{})
		require.NoError(t, err)
		began := time.Now()
		assert.WithinDuration(t, began, page.Now, w.Unhurried(20*time.Second))
		page.Now = time.Time{}
		assert.Equal(t, mesh.EntryPage{Room: "lobby", Entries: []mesh.Entry{}}, page)

		a := s.Dial()
		a.Join("lobby")
		a.State("lobby", map[string]any{"typing": true}, map[string]any{"expireAfter": 60000})
		require.NoError(t, p.Connect(ctx, "!sse", map[string]any{"name": "Bob"}))
		require.NoError(t, p.Join(ctx, "lobby", "!sse"))
		page, err = s.Rooms().Entries(ctx, "lobby", mesh.EntryQuery{})
		require.NoError(t, err)
		require.Equal(t, 2, page.Total)
		require.Len(t, page.Entries, 2)
		assert.EqualValues(t, 3, page.Seq)
		assert.NotEmpty(t, page.Epoch)
		assert.Empty(t, page.Next)

		bob, ann := page.Entries[0], page.Entries[1]
		assert.Equal(t, "!sse", bob.ConnectionID)
		assert.Equal(t, p.Stats().Incarnation, bob.Server)
		assert.JSONEq(t, `{"name":"Bob"}`, string(bob.Metadata))
		assert.Nil(t, bob.State)
		assert.Zero(t, bob.StateUntil)
		assert.Zero(t, bob.TTL, "its server has no rule")
		assert.EqualValues(t, 3, bob.Seq)

		assert.Equal(t, a.ID, ann.ConnectionID)
		assert.Equal(t, s.Stats().Incarnation, ann.Server)
		assert.Nil(t, ann.Metadata)
		assert.JSONEq(t, `{"typing":true}`, string(ann.State))
		assert.WithinDuration(t, began.Add(time.Minute), ann.StateUntil, w.Unhurried(20*time.Second))
		assert.WithinDuration(t, began, ann.JoinedAt, w.Unhurried(20*time.Second))
		assert.Equal(t, time.Minute, ann.TTL)
		assert.EqualValues(t, 2, ann.Seq)
		assert.NotEmpty(t, ann.ID)

		_, err = s.Rooms().Entries(ctx, "", mesh.EntryQuery{})
		require.ErrorIs(t, err, mesh.ErrInvalidRoom)
		for _, q := range []mesh.EntryQuery{{Limit: -1}, {Limit: 1001}, {Cursor: "x"}, {Cursor: "1.0."}} {
			_, err := s.Rooms().Entries(ctx, "lobby", q)
			require.ErrorIs(t, err, mesh.ErrInvalidOptions, "%+v", q)
		}
	})
}

// A large room comes in bounded pages that hold everybody.
func TestEntriesOfALargeRoom(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const members = 2000
		ops := make([]store.Op, members)
		for i := range ops {
			ops[i] = store.Op{Kind: store.OpJoin, Room: "lobby", Conn: fmt.Sprintf("c%04d", i), Entry: "e"}
		}
		w.Fill(ops)
		s := w.Server()
		seen, q := make(map[string]bool), mesh.EntryQuery{Limit: 200}
		for more := true; more; more = q.Cursor != "" {
			page, err := s.Rooms().Entries(t.Context(), "lobby", q)
			require.NoError(t, err)
			require.LessOrEqual(t, len(page.Entries), 300)
			assert.Equal(t, members, page.Total)
			assert.EqualValues(t, members, page.Seq)
			for _, e := range page.Entries {
				seen[e.ConnectionID] = true
			}
			q.Cursor = page.Next
		}
		assert.Len(t, seen, members)
	})
}
