package mesh_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

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
		inOrder := func() bool {
			page, err = s1.Rooms().Watched(ctx, mesh.WatchedQuery{Prefix: "a", Limit: 1})
			return err == nil && len(page.Rooms) == 1 && !page.Rooms[0].Stale
		}
		w.Eventually(2*time.Second, inOrder, "a1 is in order: %+v", page)
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
		assert.True(t, known, "nothing ever happened there")
		_, err = s1.Rooms().Watched(ctx, mesh.WatchedQuery{Limit: -1})
		require.ErrorIs(t, err, mesh.ErrInvalidOptions)
	})
}

// Where an event is lost, the lag shows until it is noticed.
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
		further := fmt.Sprintf("%s %d %s", at[0].Epoch, at[0].Seq+3, at[0].Tag)
		require.NoError(t, w.Client().Set(t.Context(), w.Keys().Seq("lobby"), further, 0).Err()) // no event is published
		page, err := s.Rooms().Watched(t.Context(), mesh.WatchedQuery{})
		require.NoError(t, err)
		behind, known := page.Rooms[0].Behind()
		assert.True(t, known)
		assert.EqualValues(t, 3, behind)
		w.Sleep(12 * time.Second) // everything is compared each 10 s
		page, err = s.Rooms().Watched(t.Context(), mesh.WatchedQuery{})
		require.NoError(t, err)
		behind, known = page.Rooms[0].Behind()
		assert.True(t, known)
		assert.Zero(t, behind)
	})
}

// What is here is known while Redis is away, that it may be stale among it.
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
		"not compared":    {mesh.WatchedRoom{Epoch: "e", Seq: 1, RedisEpoch: "e", RedisSeq: 9}, 0, false},
		"behind":          {mesh.WatchedRoom{Epoch: "e", Seq: 1, RedisEpoch: "e", RedisSeq: 9, Compared: true}, 8, true},
		"in step":         {mesh.WatchedRoom{Epoch: "e", Seq: 9, RedisEpoch: "e", RedisSeq: 9, Compared: true}, 0, true},
		"ahead by now":    {mesh.WatchedRoom{Epoch: "e", Seq: 9, RedisEpoch: "e", RedisSeq: 5, Compared: true}, 0, true},
		"another epoch":   {mesh.WatchedRoom{Epoch: "e", Seq: 9, RedisEpoch: "f", RedisSeq: 5, Compared: true}, 0, false},
		"forgotten":       {mesh.WatchedRoom{Epoch: "e", Seq: 9, Compared: true}, 0, true},
		"members, but no": {mesh.WatchedRoom{Epoch: "e", Seq: 9, Members: 1, Compared: true}, 0, false},
	} {
		n, known := c.w.Behind()
		assert.Equal(t, c.n, n, name)
		assert.Equal(t, c.known, known, name)
	}
}

// beforeCommand is a hook that does something once, before a command goes out.
type beforeCommand struct{ what atomic.Pointer[func()] }

func (b *beforeCommand) fire() {
	if f := b.what.Swap(nil); f != nil {
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

// What happens while Redis is being asked is no lag of the copy.
func TestWatchedEventOnItsWayIsNoLag(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		hook := new(beforeCommand)
		s := w.Tracked(func(o *mesh.Options) { o.Redis.AddHook(hook) })
		p, other := s.Dial(), s.Dial()
		p.Join("lobby")
		p.Subscribe("lobby")
		meanwhile := func() {
			other.Join("lobby")
			p.Expect(time.Second, "join", other.ID)
		}
		hook.what.Store(&meanwhile)
		page, err := s.Rooms().Watched(t.Context(), mesh.WatchedQuery{})
		require.NoError(t, err)
		require.Nil(t, hook.what.Load())
		require.Len(t, page.Rooms, 1)
		room := page.Rooms[0]
		assert.Equal(t, 2, room.Members)
		assert.Equal(t, room.RedisSeq, room.Seq)
	})
}
