package harness

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// KeysBut returns the keys in Redis with their TTLs (-1 ns without a TTL), except for
// the registration of one connection and the keys of servers.
func (w *World) KeysBut(s *Server, conn string) map[string]time.Duration {
	w.T.Helper()
	all := make(map[string]time.Duration)
	names, err := w.Client().Keys(w.T.Context(), "*").Result()
	require.NoError(w.T, err)
	client := w.Client()
	for _, key := range names {
		if conn != "" && key == testhook.PartsOf(s.Server).Keys.ConnMeta(conn) ||
			strings.Contains(key, "fence:") || strings.Contains(key, "owned:") || strings.Contains(key, "server-name:") || strings.Contains(key, "canary") {
			continue
		}
		ttl, err := client.PTTL(w.T.Context(), key).Result()
		require.NoError(w.T, err)
		if ttl != -2 { // the key has just expired
			all[key] = ttl
		}
	}
	return all
}

// Fill writes entries directly to Redis, for tests that read them. It repeats batches
// that time out on a busy machine.
func (w *World) Fill(ops []store.Op) {
	w.T.Helper()
	st := store.New(w.Client(), w.Keys())
	byBucket := make(map[int][]store.Op)
	for _, op := range ops {
		b := w.Keys().RoomBucket(op.Room)
		byBucket[b] = append(byBucket[b], op)
	}
	for b, ops := range byBucket {
		batch := uint64(0)
		for part := range slices.Chunk(ops, store.MaxOps) {
			w.Eventually(time.Minute, func() bool {
				batch++
				results, err := st.Commit(w.T.Context(), b, "filler", batch, 0, part)
				return err == nil && !slices.ContainsFunc(results, func(r store.OpResult) bool { return r.Err != nil })
			}, "%d entries are written", len(part))
		}
	}
}

// FillRooms writes rooms with one member each.
func (w *World) FillRooms(rooms ...string) {
	w.T.Helper()
	ops := make([]store.Op, len(rooms))
	for i, room := range rooms {
		ops[i] = store.Op{Kind: store.OpJoin, Room: room, Conn: "c", Entry: "e"}
	}
	w.Fill(ops)
}

// ListAll reads all pages and returns their number.
func (w *World) ListAll(s *Server, q mesh.RoomQuery) (rooms []mesh.RoomInfo, pages int) {
	w.T.Helper()
	seen := make(map[string]bool)
	for {
		page, err := s.Rooms().List(w.T.Context(), q)
		require.NoError(w.T, err)
		require.LessOrEqual(w.T, len(page.Rooms), 2*max(q.Limit, 50), "a page is too long")
		pages++
		for _, r := range page.Rooms {
			if !seen[r.Name] {
				seen[r.Name] = true
				rooms = append(rooms, r)
			}
		}
		if q.Cursor = page.Next; q.Cursor == "" {
			slices.SortFunc(rooms, func(a, b mesh.RoomInfo) int { return strings.Compare(a.Name, b.Name) })
			return rooms, pages
		}
	}
}

// Doomed starts a manager. die cuts it off from Redis for good.
func (w *World) Doomed() (p *mesh.PresenceManager, die func()) {
	w.T.Helper()
	opts := w.Options()
	p, err := mesh.NewPresenceManager(opts)
	require.NoError(w.T, err)
	w.T.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = p.Shutdown(ctx) // Redis is out of reach
	})
	require.NoError(w.T, p.Start(w.T.Context()))
	return p, func() { _ = opts.Redis.Close() }
}

// Found returns the information of a server about an incarnation, or nil if it is
// neither alive nor dead.
func (w *World) Found(s interface {
	Servers(context.Context) ([]mesh.ServerInfo, error)
}, inc string) *mesh.ServerInfo {
	w.T.Helper()
	list, err := s.Servers(w.T.Context())
	require.NoError(w.T, err)
	for _, info := range list {
		if info.Incarnation == inc {
			return &info
		}
	}
	return nil
}
