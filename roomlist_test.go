package mesh

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// fill writes entries straight to Redis: what matters is how they are read. It
// repeats what a busy machine did not get done in time.
func (w *world) fill(ops []store.Op) {
	w.t.Helper()
	st := store.New(w.client(), w.keys())
	byBucket := make(map[int][]store.Op)
	for _, op := range ops {
		b := w.keys().RoomBucket(op.Room)
		byBucket[b] = append(byBucket[b], op)
	}
	for b, ops := range byBucket {
		batch := uint64(0)
		for part := range slices.Chunk(ops, store.MaxOps) {
			w.eventually(time.Minute, func() bool {
				batch++
				results, err := st.Commit(w.t.Context(), b, "filler", batch, 0, part)
				return err == nil && !slices.ContainsFunc(results, func(r store.OpResult) bool { return r.Err != nil })
			}, "%d entries are written", len(part))
		}
	}
}

// fillRooms writes rooms with one member each.
func (w *world) fillRooms(rooms ...string) {
	w.t.Helper()
	ops := make([]store.Op, len(rooms))
	for i, room := range rooms {
		ops[i] = store.Op{Kind: store.OpJoin, Room: room, Conn: "c", Entry: "e"}
	}
	w.fill(ops)
}

// listAll reads all pages, and says how many there were.
func (w *world) listAll(s *testServer, q RoomQuery) (rooms []RoomInfo, pages int) {
	w.t.Helper()
	seen := make(map[string]bool)
	for {
		page, err := s.Rooms().List(w.t.Context(), q)
		require.NoError(w.t, err)
		require.LessOrEqual(w.t, len(page.Rooms), 2*max(q.Limit, 50), "a page is bounded")
		pages++
		for _, r := range page.Rooms {
			if !seen[r.Name] {
				seen[r.Name] = true
				rooms = append(rooms, r)
			}
		}
		if q.Cursor = page.Next; q.Cursor == "" {
			slices.SortFunc(rooms, func(a, b RoomInfo) int { return strings.Compare(a.Name, b.Name) })
			return rooms, pages
		}
	}
}

func TestListOfRooms(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.server()
		s.track("^lobby$", PresenceOptions{})
		page, err := s.Rooms().List(t.Context(), RoomQuery{})
		require.NoError(t, err)
		assert.Equal(t, RoomPage{Rooms: []RoomInfo{}}, page)

		a, b := s.dial(), s.dial()
		for _, room := range []string{"lobby", "a*", "ab", "a[b]", `a\`, "a?"} {
			a.join(room)
		}
		b.join("lobby")
		rooms, _ := w.listAll(s, RoomQuery{})
		assert.Equal(t, []RoomInfo{
			{"a*", 1, false}, {"a?", 1, false}, {"a[b]", 1, false}, {`a\`, 1, false}, {"ab", 1, false}, {"lobby", 2, true},
		}, rooms)
		for prefix, want := range map[string]string{
			"lob": "lobby", "a": "a* a? a[b] a\\ ab", "a*": "a*", "a?": "a?", "a[": "a[b]", `a\`: `a\`, "ab": "ab", "*": "", "z": "",
		} {
			rooms, _ := w.listAll(s, RoomQuery{Prefix: prefix})
			var names []string
			for _, r := range rooms {
				names = append(names, r.Name)
			}
			assert.Equal(t, want, strings.Join(names, " "), "prefix %q", prefix)
		}
		page, err = s.Rooms().List(t.Context(), RoomQuery{Prefix: "z"})
		require.NoError(t, err)
		assert.Equal(t, 6, page.Total, "of all rooms")

		for _, q := range []RoomQuery{{Limit: -1}, {Limit: 1001}, {Cursor: "x"}, {Cursor: "0.1"}, {Cursor: "-1.0."}, {Cursor: "64.0."}, {Cursor: "0.-1."}} {
			_, err := s.Rooms().List(t.Context(), q)
			require.ErrorIs(t, err, ErrInvalidOptions, "%+v", q)
		}
	})
}

// 10,000 rooms are never read at once, and all of them are found; a prefix that
// few of them have finds those.
func TestListOfManyRooms(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		many := 10_000
		if w.virtual {
			many = 2_000 // in this process it takes long, and shows no more
		}
		rooms := make([]string, many)
		for i := range rooms {
			rooms[i] = fmt.Sprintf("room-%05d", i)
		}
		w.fillRooms(rooms...)
		s := w.server()
		got, pages := w.listAll(s, RoomQuery{Limit: 500})
		require.Len(t, got, many)
		assert.GreaterOrEqual(t, pages, many/1000)
		for i, r := range got {
			require.Equal(t, RoomInfo{Name: rooms[i], Members: 1}, r)
		}
		page, err := s.Rooms().List(t.Context(), RoomQuery{})
		require.NoError(t, err)
		assert.Equal(t, many, page.Total)
		assert.InDelta(t, 100, len(page.Rooms), 50)
		assert.NotEmpty(t, page.Next)

		few, _ := w.listAll(s, RoomQuery{Prefix: strings.TrimSuffix(rooms[many-1], "9")})
		assert.Len(t, few, 10)
	})
}

// A set of numbers comes from Redis all at once, whatever was asked for.
func TestListOfRoomsThatComeAllAtOnce(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		rooms := make([]string, 300)
		for i := range rooms {
			rooms[i] = fmt.Sprint(1000 + i)
		}
		w.fillRooms(rooms...)
		s := w.server()
		seen, pages, q := 0, 0, RoomQuery{Limit: 40}
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
