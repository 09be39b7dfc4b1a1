package mesh_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
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
		assert.Equal(t, 6, page.Total, "Total counts all rooms")

		for _, q := range []mesh.RoomQuery{{Limit: -1}, {Limit: 1001}, {Cursor: "x"}, {Cursor: "0.1"}, {Cursor: "-1.0."}, {Cursor: "64.0."}, {Cursor: "0.-1."}} {
			_, err := s.Rooms().List(t.Context(), q)
			require.ErrorIs(t, err, mesh.ErrInvalidOptions, "%+v", q)
		}
	})
}

// TestListOfManyRooms checks that List finds all of 10,000 rooms, in pages, and those
// with a prefix.
func TestListOfManyRooms(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		many := 10_000
		if w.Virtual {
			many = 2_000 // more take long on the in-process Redis
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

// TestListOfRoomsWithNumericNames checks that pages stay small although Redis returns a
// set of integers at once, whatever COUNT says.
func TestListOfRoomsWithNumericNames(t *testing.T) {
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
		assert.Equal(t, 300, seen, "each room once, because none has changed")
		assert.GreaterOrEqual(t, pages, 6)
	})
}

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
		assert.Zero(t, bob.TTL, "the server of the entry has no rule")
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

// TestEntriesOfALargeRoom checks that the pages of a large room are bounded and contain
// all members.
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

func TestWatchedRooms(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s1, s2 := w.Tracked(), w.Tracked()
		page, err := s1.Rooms().Watched(ctx, mesh.WatchedQuery{})
		require.NoError(t, err)
		assert.Equal(t, mesh.WatchedPage{Rooms: []mesh.WatchedRoom{}}, page)

		a, b, far := s1.Dial(), s1.Dial(), s2.Dial()
		for _, room := range []string{"a1", "a2", "b"} {
			a.Subscribe(room)
		}
		b.Subscribe("a1")
		far.Join("a1")
		a.Expect(2*time.Second, "join", far.ID)
		ready := func() bool {
			page, err = s1.Rooms().Watched(ctx, mesh.WatchedQuery{Prefix: "a", Limit: 1})
			return err == nil && len(page.Rooms) == 1 && !page.Rooms[0].Stale
		}
		w.Eventually(2*time.Second, ready, "a1 is not stale: %+v", page)
		assert.Equal(t, 2, page.Total)
		assert.Equal(t, "a1", page.Next)
		one := page.Rooms[0]
		assert.Equal(t, "a1", one.Name)
		assert.Equal(t, 2, one.Subscriptions)
		assert.Equal(t, 1, one.Members)
		assert.EqualValues(t, 1, one.Seq)
		assert.EqualValues(t, 1, one.RedisSeq)
		assert.Equal(t, one.RedisEpoch, one.Epoch)
		behind, known := one.Behind()
		assert.True(t, known)
		assert.Zero(t, behind)

		page, err = s1.Rooms().Watched(ctx, mesh.WatchedQuery{After: "a1"})
		require.NoError(t, err)
		require.Len(t, page.Rooms, 2)
		assert.Equal(t, "a2", page.Rooms[0].Name)
		assert.Equal(t, "b", page.Rooms[1].Name)
		assert.Empty(t, page.Next)
		_, known = page.Rooms[1].Behind()
		assert.True(t, known, "the room never had an event")
		_, err = s1.Rooms().Watched(ctx, mesh.WatchedQuery{Limit: -1})
		require.ErrorIs(t, err, mesh.ErrInvalidOptions)
	})
}

// TestWatchedRoomThatIsBehind checks that Behind counts lost events until the
// comparison finds them.
func TestWatchedRoomThatIsBehind(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		a := s.Dial()
		a.Subscribe("lobby")
		a.Join("lobby")
		w.Sleep(time.Second)
		at, err := testhook.PartsOf(s.Server).Store.Positions(t.Context(), []string{"lobby"})
		require.NoError(t, err)
		later := fmt.Sprintf("%s %d %s", at[0].Epoch, at[0].Seq+3, at[0].Tag)
		require.NoError(t, w.Client().Set(t.Context(), w.Keys().Seq("lobby"), later, 0).Err()) // no event is published
		page, err := s.Rooms().Watched(t.Context(), mesh.WatchedQuery{})
		require.NoError(t, err)
		behind, known := page.Rooms[0].Behind()
		assert.True(t, known)
		assert.EqualValues(t, 3, behind)
		w.Sleep(12 * time.Second) // the next comparison is within 10 s
		page, err = s.Rooms().Watched(t.Context(), mesh.WatchedQuery{})
		require.NoError(t, err)
		behind, known = page.Rooms[0].Behind()
		assert.True(t, known)
		assert.Zero(t, behind)
	})
}

// TestWatchedRoomsWhileRedisIsAway checks that Watched still describes the mirrors while
// Redis is away, and marks them as stale.
func TestWatchedRoomsWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		a := s.Dial()
		for i := range 5 {
			a.Subscribe(fmt.Sprint("r", i))
		}
		a.Join("r1")
		w.Sleep(time.Second)
		w.Mem.Cut()
		w.Sleep(5 * time.Second)
		page, err := s.Rooms().Watched(t.Context(), mesh.WatchedQuery{Stale: true})
		require.ErrorIs(t, err, mesh.ErrUnavailable)
		require.Len(t, page.Rooms, 5)
		for i, r := range page.Rooms {
			assert.True(t, r.Stale)
			assert.False(t, r.Compared)
			assert.Equal(t, 1, r.Subscriptions)
			_, known := r.Behind()
			assert.False(t, known)
			if i == 1 {
				assert.Equal(t, 1, r.Members)
				assert.EqualValues(t, 1, r.Seq)
			}
		}
		w.Mem.Heal()
		w.Sleep(5 * time.Second)
		page, err = s.Rooms().Watched(t.Context(), mesh.WatchedQuery{Stale: true})
		require.NoError(t, err)
		assert.Empty(t, page.Rooms)
	})
}

func TestBehind(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		w     mesh.WatchedRoom
		n     uint64
		known bool
	}{
		"not compared":          {mesh.WatchedRoom{Epoch: "e", Seq: 1, RedisEpoch: "e", RedisSeq: 9}, 0, false},
		"behind":                {mesh.WatchedRoom{Epoch: "e", Seq: 1, RedisEpoch: "e", RedisSeq: 9, Compared: true}, 8, true},
		"up to date":            {mesh.WatchedRoom{Epoch: "e", Seq: 9, RedisEpoch: "e", RedisSeq: 9, Compared: true}, 0, true},
		"ahead":                 {mesh.WatchedRoom{Epoch: "e", Seq: 9, RedisEpoch: "e", RedisSeq: 5, Compared: true}, 0, true},
		"another epoch":         {mesh.WatchedRoom{Epoch: "e", Seq: 9, RedisEpoch: "f", RedisSeq: 5, Compared: true}, 0, false},
		"empty, not in Redis":   {mesh.WatchedRoom{Epoch: "e", Seq: 9, Compared: true}, 0, true},
		"members, not in Redis": {mesh.WatchedRoom{Epoch: "e", Seq: 9, Members: 1, Compared: true}, 0, false},
	} {
		n, known := c.w.Behind()
		assert.Equal(t, c.n, n, name)
		assert.Equal(t, c.known, known, name)
	}
}

// beforeCommand is a hook that calls a function once, before the next command is sent.
type beforeCommand struct{ call atomic.Pointer[func()] }

func (b *beforeCommand) fire() {
	if f := b.call.Swap(nil); f != nil {
		(*f)()
	}
}

func (b *beforeCommand) DialHook(next redis.DialHook) redis.DialHook { return next }

func (b *beforeCommand) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { b.fire(); return next(ctx, cmd) }
}

func (b *beforeCommand) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error { b.fire(); return next(ctx, cmds) }
}

// TestEventsDuringWatchedAreNoLag checks that an event that arrives while Watched reads
// from Redis does not count as lag.
func TestEventsDuringWatchedAreNoLag(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		hook := new(beforeCommand)
		s := w.Tracked(func(o *mesh.Options) { o.Redis.AddHook(hook) })
		p, other := s.Dial(), s.Dial()
		p.Join("lobby")
		p.Subscribe("lobby")
		join := func() {
			other.Join("lobby")
			p.Expect(time.Second, "join", other.ID)
		}
		hook.call.Store(&join)
		page, err := s.Rooms().Watched(t.Context(), mesh.WatchedQuery{})
		require.NoError(t, err)
		require.Nil(t, hook.call.Load())
		require.Len(t, page.Rooms, 1)
		room := page.Rooms[0]
		assert.Equal(t, 2, room.Members)
		assert.Equal(t, room.RedisSeq, room.Seq)
	})
}

func TestReadsNeedARunningServer(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, err := mesh.NewServer(w.Options())
		require.NoError(t, err)
		reads := map[string]func() error{
			"Servers": func() error { _, err := s.Servers(t.Context()); return err },
			"List":    func() error { _, err := s.Rooms().List(t.Context(), mesh.RoomQuery{}); return err },
			"Entries": func() error { _, err := s.Rooms().Entries(t.Context(), "r", mesh.EntryQuery{}); return err },
			"Counts":  func() error { _, err := s.Presence().Counts(t.Context(), "r"); return err },
		}
		for name, read := range reads {
			require.ErrorIs(t, read(), mesh.ErrNotStarted, name)
		}
		_, err = s.Rooms().Watched(t.Context(), mesh.WatchedQuery{})
		require.NoError(t, err, "without a watched room, Watched needs no Redis")
		require.NoError(t, s.Start(t.Context()))
		for name, read := range reads {
			require.NoError(t, read(), name)
		}
		w.Mem.Hang()
		for name, read := range reads {
			began := time.Now()
			require.ErrorIs(t, read(), mesh.ErrUnavailable, name)
			assert.LessOrEqual(t, time.Since(began), 2*time.Second, name)
		}
		w.Mem.Resume()
		require.NoError(t, s.Shutdown(t.Context()))
		for name, read := range reads {
			require.ErrorIs(t, read(), mesh.ErrClosed, name)
		}
	})
}
