package mesh_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

func TestListOfRooms(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		s.Track("^lobby$", mesh.PresenceOptions{})
		page, err := s.Rooms().List(t.Context(), mesh.RoomQuery{})
		require.NoError(t, err)
		assert.Equal(t, mesh.RoomPage{Rooms: []mesh.RoomInfo{}}, page)

		a, b := s.Dial(), s.Dial()
		for _, room := range []string{"lobby", "a*", "ab", "a[b]", `a\`, "a?"} {
			a.Join(room)
		}
		b.Join("lobby")
		rooms, _ := w.ListAll(s, mesh.RoomQuery{})
		assert.Equal(t, []mesh.RoomInfo{
			{"a*", 1, false}, {"a?", 1, false}, {"a[b]", 1, false}, {`a\`, 1, false}, {"ab", 1, false}, {"lobby", 2, true},
		}, rooms)
		for prefix, want := range map[string]string{
			"lob": "lobby", "a": "a* a? a[b] a\\ ab", "a*": "a*", "a?": "a?", "a[": "a[b]", `a\`: `a\`, "ab": "ab", "*": "", "z": "",
		} {
			rooms, _ := w.ListAll(s, mesh.RoomQuery{Prefix: prefix})
			var names []string
			for _, r := range rooms {
				names = append(names, r.Name)
			}
			assert.Equal(t, want, strings.Join(names, " "), "prefix %q", prefix)
		}
		page, err = s.Rooms().List(t.Context(), mesh.RoomQuery{Prefix: "z"})
		require.NoError(t, err)
		assert.Equal(t, 6, page.Total, "of all rooms")

		for _, q := range []mesh.RoomQuery{{Limit: -1}, {Limit: 1001}, {Cursor: "x"}, {Cursor: "0.1"}, {Cursor: "-1.0."}, {Cursor: "64.0."}, {Cursor: "0.-1."}} {
			_, err := s.Rooms().List(t.Context(), q)
			require.ErrorIs(t, err, mesh.ErrInvalidOptions, "%+v", q)
		}
	})
}

// 10,000 rooms are never read at once, and all of them are found; a prefix that
// few of them have finds those.
func TestListOfManyRooms(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		many := 10_000
		if w.Virtual {
			many = 2_000 // in this process it takes long, and shows no more
		}
		rooms := make([]string, many)
		for i := range rooms {
			rooms[i] = fmt.Sprintf("room-%05d", i)
		}
		w.FillRooms(rooms...)
		s := w.Server()
		got, pages := w.ListAll(s, mesh.RoomQuery{Limit: 500})
		require.Len(t, got, many)
		assert.GreaterOrEqual(t, pages, many/1000)
		for i, r := range got {
			require.Equal(t, mesh.RoomInfo{Name: rooms[i], Members: 1}, r)
		}
		page, err := s.Rooms().List(t.Context(), mesh.RoomQuery{})
		require.NoError(t, err)
		assert.Equal(t, many, page.Total)
		assert.InDelta(t, 100, len(page.Rooms), 50)
		assert.NotEmpty(t, page.Next)

		few, _ := w.ListAll(s, mesh.RoomQuery{Prefix: strings.TrimSuffix(rooms[many-1], "9")})
		assert.Len(t, few, 10)
	})
}

// A set of numbers comes from Redis all at once, whatever was asked for.
func TestListOfRoomsThatComeAllAtOnce(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		rooms := make([]string, 300)
		for i := range rooms {
			rooms[i] = fmt.Sprint(1000 + i)
		}
		w.FillRooms(rooms...)
		s := w.Server()
		seen, pages, q := 0, 0, mesh.RoomQuery{Limit: 40}
		for more := true; more; more = q.Cursor != "" {
			page, err := s.Rooms().List(t.Context(), q)
			require.NoError(t, err)
			require.LessOrEqual(t, len(page.Rooms), 60)
			seen, pages, q.Cursor = seen+len(page.Rooms), pages+1, page.Next
		}
		assert.Equal(t, 300, seen, "each once: nothing has changed meanwhile")
		assert.GreaterOrEqual(t, pages, 6)
	})
}
