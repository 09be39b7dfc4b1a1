package mesh_test

import (
	"encoding/json"
	"fmt"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

func TestRoomsFromGo(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		watcher, a, b := s1.Dial(), s1.Dial(), s2.Dial()
		ctx, rooms := t.Context(), s1.Rooms()
		watcher.Subscribe("lobby")

		// Add connections of both servers. A second Add changes nothing.
		for range 2 {
			require.NoError(t, rooms.Add(ctx, "lobby", a.ID, mesh.AddOptions{}))
			require.NoError(t, rooms.Add(ctx, "lobby", b.ID, mesh.AddOptions{}))
		}
		require.NoError(t, rooms.Add(ctx, "attic", b.ID, mesh.AddOptions{}))
		watcher.Expect(time.Second, "join", a.ID)
		watcher.Expect(time.Second, "join", b.ID)
		for _, s := range []*harness.Server{s1, s2} {
			for _, p := range []*harness.Peer{a, b} {
				in, err := s.Rooms().Contains(ctx, "lobby", p.ID)
				require.NoError(t, err)
				assert.True(t, in)
			}
			in, err := s.Rooms().Contains(ctx, "lobby", watcher.ID)
			require.NoError(t, err)
			assert.False(t, in)
			ids, err := s.Rooms().ConnectionIDs(ctx, "lobby")
			require.NoError(t, err)
			assert.ElementsMatch(t, []string{a.ID, b.ID}, ids)
			all, err := s.Rooms().All(ctx)
			require.NoError(t, err)
			assert.ElementsMatch(t, []string{"lobby", "attic"}, all)
			count, err := s.Presence().Count(ctx, "lobby")
			require.NoError(t, err)
			assert.Equal(t, 2, count)
		}
		of, err := s2.Rooms().Of(ctx, b.ID)
		require.NoError(t, err)
		assert.ElementsMatch(t, []string{"lobby", "attic"}, of)
		far, err := s1.Rooms().Of(ctx, b.ID)
		require.NoError(t, err)
		assert.Equal(t, of, far, "both servers return the same rooms")
		_, err = s1.Rooms().Of(ctx, "unknown")
		require.ErrorIs(t, err, mesh.ErrUnknownConnection)
		assert.ElementsMatch(t, []string{a.ID, b.ID}, b.Join("lobby").IDs(t), "the client is already a member")

		for _, p := range []*harness.Peer{a, b} {
			removed, err := rooms.Remove(ctx, "lobby", p.ID)
			require.NoError(t, err)
			assert.True(t, removed)
			removed, err = rooms.Remove(ctx, "lobby", p.ID)
			require.NoError(t, err)
			assert.False(t, removed)
			watcher.Expect(time.Second, "leave", p.ID)
		}
		all, err := rooms.All(ctx)
		require.NoError(t, err)
		assert.Equal(t, []string{"attic"}, all, "empty rooms are not listed")
		assert.Len(t, watcher.Got(), 4)

		for _, err := range []error{
			rooms.Add(ctx, "lobby", "unknown", mesh.AddOptions{}),
			func() error { _, err := rooms.Remove(ctx, "lobby", "unknown"); return err }(),
		} {
			require.ErrorIs(t, err, mesh.ErrUnknownConnection)
		}
		require.ErrorIs(t, rooms.Add(ctx, "", a.ID, mesh.AddOptions{}), mesh.ErrInvalidRoom)
		require.ErrorIs(t, rooms.Add(ctx, "lobby", "a:b", mesh.AddOptions{}), mesh.ErrInvalidConnectionID)
	})
}

func TestLimitOfRoomsAcrossServers(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s1 := w.Tracked()
		s2 := w.Tracked(func(o *mesh.Options) { o.Limits.RoomsPerConnection = 1 })
		p := s2.Dial()
		require.NoError(t, s1.Rooms().Add(t.Context(), "one", p.ID, mesh.AddOptions{}))
		require.ErrorIs(t, s1.Rooms().Add(t.Context(), "two", p.ID, mesh.AddOptions{}), mesh.ErrLimit)
	})
}

func TestClearingARoom(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const each = 150 // more than one batch holds
		s1, s2 := w.Tracked(), w.Tracked(slowWrites(time.Millisecond))
		ctx := t.Context()
		w1, w2 := s1.Dial(), s2.Dial()
		w1.Subscribe("lobby")
		w2.Subscribe("lobby")
		var joined sync.WaitGroup
		for i := range each {
			for n, s := range []*harness.Server{s1, s2} {
				joined.Go(func() {
					id := fmt.Sprintf("c%d-%d", n, i)
					assert.NoError(t, s.Presence().Connect(ctx, id, nil))
					assert.NoError(t, s.Presence().Join(ctx, "lobby", id))
				})
			}
		}
		joined.Wait()
		require.NoError(t, s1.Rooms().SetMetadata(ctx, "lobby", map[string]any{"topic": "x"}, mesh.MetadataOptions{}))
		require.NoError(t, s1.Presence().Join(ctx, "attic", "c0-0"))

		before := s2.Stats().Batches
		require.NoError(t, s1.Rooms().Clear(ctx, "lobby"))
		w.LeftTogether(s2.Stats().Batches-before, each)
		ids, err := s2.Rooms().ConnectionIDs(ctx, "lobby")
		require.NoError(t, err)
		assert.Empty(t, ids)
		for _, p := range []*harness.Peer{w1, w2} {
			w.Eventually(3*time.Second, func() bool { return p.Count("leave", "") == 2*each }, "all leaves")
			seen := make(map[string]bool)
			for _, u := range p.Got() {
				if u.Type == "leave" {
					assert.False(t, seen[u.ConnectionID], "one leave each")
					seen[u.ConnectionID] = true
				}
			}
		}
		data, err := s2.Rooms().Metadata(ctx, "lobby")
		require.NoError(t, err)
		assert.JSONEq(t, `{"topic":"x"}`, string(data), "Clear keeps the room's metadata")
		of, err := s1.Rooms().Of(ctx, "c0-0")
		require.NoError(t, err)
		assert.Equal(t, []string{"attic"}, of, "Clear keeps entries in other rooms")
		require.NoError(t, s1.Rooms().Clear(ctx, "lobby"), "an empty room")

		require.NoError(t, s1.Presence().Join(ctx, "lobby", "c0-1"))
		require.NoError(t, s2.Rooms().Delete(ctx, "lobby"))
		w2.Expect(time.Second, "leave", "c0-1")
		data, err = s1.Rooms().Metadata(ctx, "lobby")
		require.NoError(t, err)
		assert.Nil(t, data)
		require.NoError(t, s2.Rooms().Delete(ctx, "lobby"))
	})
}

func TestRoomMetadata(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		ctx := t.Context()
		for i, step := range []struct {
			value    any
			strategy mesh.Strategy
			want     string
		}{
			{map[string]any{"a": 1, "in": map[string]any{"x": 1}}, "", `{"a":1,"in":{"x":1}}`},
			{map[string]any{"b": 2}, mesh.Merge, `{"a":1,"b":2,"in":{"x":1}}`},
			{json.RawMessage(`{"in":{"y":9007199254740993}}`), mesh.DeepMerge, `{"a":1,"b":2,"in":{"x":1,"y":9007199254740993}}`},
			{[]int{1}, mesh.DeepMerge, `[1]`},
			{map[string]any{"c": 3}, mesh.Merge, `{"c":3}`},
			{nil, mesh.Merge, ``},
			{"text", mesh.Replace, `"text"`},
			{nil, mesh.Replace, ``},
		} {
			s := []*harness.Server{s1, s2}[i%2]
			require.NoError(t, s.Rooms().SetMetadata(ctx, "lobby", step.value, mesh.MetadataOptions{Strategy: step.strategy}), "step %d", i)
			for _, s := range []*harness.Server{s1, s2} {
				data, err := s.Rooms().Metadata(ctx, "lobby")
				require.NoError(t, err)
				if step.want == "" {
					assert.Nil(t, data, "step %d", i)
					continue
				}
				assert.JSONEq(t, step.want, string(data), "step %d", i)
				assert.Equal(t, strings.Contains(step.want, "9007199254740993"), strings.Contains(string(data), "9007199254740993"))
			}
		}
		require.ErrorIs(t, s1.Rooms().SetMetadata(ctx, "lobby", make(chan int), mesh.MetadataOptions{}), mesh.ErrInvalidMetadata)
		require.ErrorIs(t, s1.Rooms().SetMetadata(ctx, "lobby", 1, mesh.MetadataOptions{Strategy: "x"}), mesh.ErrInvalidMetadata)
		require.ErrorIs(t, s1.Rooms().SetMetadata(ctx, "lobby", strings.Repeat("x", 16<<10), mesh.MetadataOptions{}), mesh.ErrTooLarge)
		// The limit applies to the merged metadata, not only to the change.
		require.NoError(t, s1.Rooms().SetMetadata(ctx, "lobby", map[string]any{"a": strings.Repeat("x", 9<<10)}, mesh.MetadataOptions{}))
		require.ErrorIs(t, s1.Rooms().SetMetadata(ctx, "lobby", map[string]any{"b": strings.Repeat("x", 9<<10)}, mesh.MetadataOptions{Strategy: mesh.Merge}), mesh.ErrTooLarge)
	})
}

// mergeSimultaneously lets two servers merge different fields at the same time, and
// checks that none is lost.
func mergeSimultaneously(t *testing.T, set func(server int, change map[string]any, strategy mesh.Strategy) error, read func(server int) json.RawMessage) {
	t.Helper()
	const writers, rounds = 4, 10
	var wg sync.WaitGroup
	var want []string
	for i := range writers {
		for r := range rounds {
			want = append(want, fmt.Sprintf("w%d-%d", i, r))
		}
		wg.Go(func() {
			for r := range rounds {
				field := map[string]any{fmt.Sprintf("w%d-%d", i, r): true}
				strategy := mesh.Merge
				if i%2 == 0 {
					field, strategy = map[string]any{"deep": field}, mesh.DeepMerge
				}
				assert.NoError(t, set(i/2, field, strategy))
			}
		})
	}
	wg.Wait()
	sort.Strings(want)
	for server := range 2 {
		var value map[string]any
		require.NoError(t, json.Unmarshal(read(server), &value))
		var got []string
		for k, v := range value {
			if k != "deep" {
				got = append(got, k)
				continue
			}
			for k := range v.(map[string]any) {
				got = append(got, k)
			}
		}
		sort.Strings(got)
		assert.Equal(t, want, got, "server %d", server)
	}
}

func TestSimultaneousMergesOfRoomMetadata(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		servers := []*harness.Server{w.Tracked(), w.Tracked()}
		mergeSimultaneously(t, func(server int, change map[string]any, strategy mesh.Strategy) error {
			return servers[server].Rooms().SetMetadata(t.Context(), "lobby", change, mesh.MetadataOptions{Strategy: strategy})
		}, func(server int) json.RawMessage {
			data, err := servers[server].Rooms().Metadata(t.Context(), "lobby")
			require.NoError(t, err)
			return data
		})
	})
}

func TestSendingToRoomsAndConnections(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		ctx := t.Context()
		a, b, outside := s1.Dial(), s2.Dial(), s2.Dial()
		a.Join("lobby")
		b.Join("lobby")
		require.NoError(t, s1.Rooms().Send(ctx, "lobby", "app/news", map[string]any{"n": json.Number("12345678901234567890")}))
		for _, p := range []*harness.Peer{a, b} {
			w.Eventually(time.Second, func() bool { return p.Pushed("app/news") == 1 }, "the push")
			assert.Contains(t, string(p.PushesOf("app/news")[0].Payload), "12345678901234567890")
		}
		for _, p := range []*harness.Peer{a, b} {
			require.NoError(t, s1.Connections().Send(ctx, p.ID, "app/you", "hello"))
			w.Eventually(time.Second, func() bool { return p.Pushed("app/you") == 1 }, "the push")
			assert.Equal(t, `"hello"`, string(p.PushesOf("app/you")[0].Payload))
			assert.Nil(t, p.PushesOf("app/you")[0].ID)
		}
		w.Sleep(50 * time.Millisecond)
		assert.Equal(t, 1, a.Pushed("app/news"), "one push per connection")
		assert.Zero(t, outside.Pushed("app/news"))
		assert.Zero(t, outside.Pushed("app/you"))

		require.ErrorIs(t, s1.Connections().Send(ctx, "unknown", "app/you", 1), mesh.ErrUnknownConnection)
		for _, command := range []string{"", "mesh/presence-update", "ping", "pong", "latency", "latency:request", "latency:response"} {
			require.ErrorIs(t, s1.Connections().Send(ctx, a.ID, command, 1), mesh.ErrInvalidCommand, "%q", command)
			require.ErrorIs(t, s1.Rooms().Send(ctx, "lobby", command, 1), mesh.ErrInvalidCommand, "%q", command)
			c, ok := s1.Connection(a.ID)
			require.True(t, ok)
			require.ErrorIs(t, c.Send(command, 1), mesh.ErrInvalidCommand, "%q", command)
		}
		require.Error(t, s1.Rooms().Send(ctx, "lobby", "app/news", make(chan int)))
		require.NoError(t, s1.Rooms().Send(ctx, "empty", "app/news", 1))
	})
}

// TestLimitOfNewRooms checks that NewRoomsPerMinute counts each room that a client joins
// or subscribes to, but only once as long as it is remembered.
func TestLimitOfNewRooms(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.NewRoomsPerMinute = 4 }))
		p := s.Dial()
		refused := func(room string) {
			t.Helper()
			for _, command := range []string{"mesh/join-room", "mesh/subscribe-presence"} {
				v := p.Room(command, room)
				assert.Equal(t, "ELIMIT", v.Code, "%s %s", command, room)
				assert.Contains(t, v.Error, "4 new rooms per minute")
			}
		}
		visit := func(room string) {
			t.Helper()
			p.Join(room)
			p.Leave(room)
		}
		p.Join("a")
		p.Subscribe("b")
		visit("c")
		p.Subscribe("a")
		p.Join("b")
		visit("d")
		refused("e")
		for _, room := range []string{"a", "b", "c", "d"} {
			visit(room)
			p.Subscribe(room)
			require.Equal(t, "true", string(p.Call("mesh/unsubscribe-presence", harness.InRoomPayload(room))))
		}
		refused("e")
		ids, err := s.Rooms().ConnectionIDs(t.Context(), "e")
		require.NoError(t, err)
		assert.Empty(t, ids, "a refused join has no effect")
		assert.False(t, testhook.PartsOf(s.Server).Hub.Watches("e"))
		assert.Equal(t, "true", string(p.Call("mesh/noop", nil)), "the connection stays open")
		require.True(t, s.Dial().Join("e").Success, "each connection has its own limit")

		w.Sleep(time.Minute)
		visit("a") // was used within the last minute
		for _, room := range []string{"e", "f", "g", "h"} {
			visit(room)
			visit(room)
		}
		refused("i")
		visit("a")
		w.Sleep(2 * time.Minute)
		for _, room := range []string{"a", "e", "f", "g"} {
			visit(room)
		}
		refused("h") // is no longer remembered
	})
}

// TestRoomsInUseAreNotNew checks that rooms that the connection is in or subscribed to
// are never new.
func TestRoomsInUseAreNotNew(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.NewRoomsPerMinute = 2 }))
		p := s.Dial()
		p.Join("in")
		p.Subscribe("watched")
		w.Sleep(10 * time.Minute)
		p.Join("x")
		p.Join("y")
		p.Subscribe("in")
		p.Join("watched")
		assert.Equal(t, "ELIMIT", p.Room("mesh/join-room", "z").Code)
		// Commands that only read do not count, nor do calls of the app.
		for i := range 5 {
			assert.Empty(t, harness.Code(t, p.Call("mesh/get-presence-state", harness.InRoomPayload(fmt.Sprint(i)))))
			assert.Empty(t, harness.Code(t, p.Call("mesh/get-room-metadata", harness.InRoomPayload(fmt.Sprint(i)))))
			require.NoError(t, s.Rooms().Add(t.Context(), fmt.Sprint("app", i), p.ID, mesh.AddOptions{}))
		}
	})
}

// TestRefusedRoomsAreNew checks that refused requests count too, because the guard had
// to run.
func TestRefusedRoomsAreNew(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.Limits(func(l *mesh.Limits) { l.NewRoomsPerMinute = 3 }))
		s.Track("^secret", mesh.PresenceOptions{Guard: harness.AdminsOnly, JoinGuard: harness.AdminsOnly})
		p := s.Dial()
		for _, room := range []string{"secret1", "untracked", "secret2"} {
			for range 2 {
				assert.Empty(t, p.Room("mesh/subscribe-presence", room).Code)
			}
		}
		assert.Equal(t, "ELIMIT", p.Room("mesh/subscribe-presence", "secret3").Code)
		assert.Equal(t, "ELIMIT", p.Room("mesh/join-room", "other").Code)
	})
}

// TestInventedNamesLeaveNothing lets a client without rights use invented names within
// all limits. Seconds later, no trace of the names may be left in Redis or in the memory
// of the server.
func TestInventedNamesLeaveNothing(t *testing.T) {
	t.Parallel()
	harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.NoCommandLimit, harness.AllowMetadata, harness.Limits(func(l *mesh.Limits) { l.NewRoomsPerMinute = -1 }))
		s.Track("^room", mesh.PresenceOptions{})
		s.Track("^short", mesh.PresenceOptions{TTL: 5 * time.Second})
		s.Track("^secret", mesh.PresenceOptions{Guard: harness.AdminsOnly})
		s.Track("^closed", mesh.PresenceOptions{JoinGuard: harness.AdminsOnly})
		before := w.KeysBut(s, "")
		p, gone := s.Dial(), s.Dial()
		for i := range 20 {
			for _, kind := range []string{"room", "short", "secret", "closed", "untracked"} {
				room := fmt.Sprint(kind, strings.Repeat("x", 100), i)
				for _, command := range []string{
					"mesh/join-room", "mesh/subscribe-presence", "mesh/publish-presence-state", "mesh/get-presence-state",
					"mesh/get-room-metadata", "mesh/clear-presence-state", "mesh/unsubscribe-presence", "mesh/leave-room",
				} {
					p.Call(command, map[string]any{"roomName": room, "state": map[string]any{"x": 1}, "expireAfter": 100_000})
				}
				p.Call("mesh/get-connection-metadata", map[string]any{"connectionId": fmt.Sprint("unknown", i)})
			}
			p.Call("mesh/set-my-connection-metadata", map[string]any{"metadata": i})
			gone.Join(fmt.Sprint("room-of-the-other", i))
			gone.State(fmt.Sprint("room-of-the-other", i), map[string]any{"x": 1})
			gone.Subscribe(fmt.Sprint("room-of-the-other", i))
		}
		gone.Close()
		w.Eventually(time.Second, func() bool { return s.Stats().Connections == 1 && s.Stats().Entries == 0 }, "the other connection has ended")
		for key, ttl := range w.KeysBut(s, p.ID) {
			if _, ok := before[key]; !ok {
				assert.LessOrEqual(t, ttl, 15*time.Second, key)
				assert.Positive(t, ttl, key)
			}
		}
		if w.Virtual {
			w.Sleep(16 * time.Second)
			assert.Equal(t, before, w.KeysBut(s, p.ID))
		}
		w.Eventually(10*time.Second, func() bool { return s.Stats().Watched == 0 }, "no mirror")
		kept, most := s.AnswersKept(p.ID)
		assert.LessOrEqual(t, kept, most)
	})
}
