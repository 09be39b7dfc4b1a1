package mesh

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
)

func TestRoomsFromGo(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		watcher, a, b := s1.dial(), s1.dial(), s2.dial()
		ctx, rooms := t.Context(), s1.Rooms()
		watcher.subscribe("lobby")

		// Here, and on the other server; twice changes nothing.
		for range 2 {
			require.NoError(t, rooms.Add(ctx, "lobby", a.id))
			require.NoError(t, rooms.Add(ctx, "lobby", b.id))
		}
		require.NoError(t, rooms.Add(ctx, "attic", b.id))
		watcher.expect(time.Second, "join", a.id)
		watcher.expect(time.Second, "join", b.id)
		for _, s := range []*testServer{s1, s2} {
			for _, p := range []*peer{a, b} {
				in, err := s.Rooms().Contains(ctx, "lobby", p.id)
				require.NoError(t, err)
				assert.True(t, in)
			}
			in, err := s.Rooms().Contains(ctx, "lobby", watcher.id)
			require.NoError(t, err)
			assert.False(t, in)
			ids, err := s.Rooms().Members(ctx, "lobby")
			require.NoError(t, err)
			assert.ElementsMatch(t, []string{a.id, b.id}, ids)
			all, err := s.Rooms().All(ctx)
			require.NoError(t, err)
			assert.ElementsMatch(t, []string{"lobby", "attic"}, all)
			count, err := s.Presence().Count(ctx, "lobby")
			require.NoError(t, err)
			assert.Equal(t, 2, count)
		}
		of, err := s2.Rooms().Of(ctx, b.id)
		require.NoError(t, err)
		assert.ElementsMatch(t, []string{"lobby", "attic"}, of)
		far, err := s1.Rooms().Of(ctx, b.id)
		require.NoError(t, err)
		assert.Equal(t, of, far, "on whichever server it is")
		_, err = s1.Rooms().Of(ctx, "nobody")
		require.ErrorIs(t, err, ErrUnknownConnection)
		assert.ElementsMatch(t, []string{a.id, b.id}, b.join("lobby").ids(t), "the client finds itself in")

		for _, p := range []*peer{a, b} {
			was, err := rooms.Remove(ctx, "lobby", p.id)
			require.NoError(t, err)
			assert.True(t, was)
			was, err = rooms.Remove(ctx, "lobby", p.id)
			require.NoError(t, err)
			assert.False(t, was)
			watcher.expect(time.Second, "leave", p.id)
		}
		all, err := rooms.All(ctx)
		require.NoError(t, err)
		assert.Equal(t, []string{"attic"}, all, "empty rooms are none")
		assert.Len(t, watcher.got(), 4)

		for _, err := range []error{
			rooms.Add(ctx, "lobby", "nobody"),
			func() error { _, err := rooms.Remove(ctx, "lobby", "nobody"); return err }(),
		} {
			require.ErrorIs(t, err, ErrUnknownConnection)
		}
		require.ErrorIs(t, rooms.Add(ctx, "", a.id), ErrInvalidRoom)
		require.ErrorIs(t, rooms.Add(ctx, "lobby", "a:b"), ErrInvalidConnectionID)
	})
}

func TestLimitOfRoomsHoldsAcrossServers(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s1 := w.tracked()
		s2 := w.tracked(func(o *Options) { o.Limits.RoomsPerConnection = 1 })
		p := s2.dial()
		require.NoError(t, s1.Rooms().Add(t.Context(), "one", p.id))
		require.ErrorIs(t, s1.Rooms().Add(t.Context(), "two", p.id), ErrLimit)
	})
}

func TestClearingARoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const each = 150 // more than one batch holds
		s1, s2 := w.tracked(), w.tracked()
		ctx := t.Context()
		w1, w2 := s1.dial(), s2.dial()
		w1.subscribe("lobby")
		w2.subscribe("lobby")
		var joined sync.WaitGroup
		for i := range each {
			for n, s := range []*testServer{s1, s2} {
				joined.Go(func() {
					id := fmt.Sprintf("c%d-%d", n, i)
					assert.NoError(t, s.Presence().Connect(ctx, id, nil))
					assert.NoError(t, s.Presence().Join(ctx, "lobby", id))
				})
			}
		}
		joined.Wait()
		require.NoError(t, s1.Rooms().SetMetadata(ctx, "lobby", map[string]any{"topic": "x"}, MetadataOptions{}))
		require.NoError(t, s1.Presence().Join(ctx, "attic", "c0-0"))

		before := s2.Stats().Batches
		require.NoError(t, s1.Rooms().Clear(ctx, "lobby"))
		assert.LessOrEqual(t, s2.Stats().Batches-before, uint64(10), "leaves go together")
		ids, err := s2.Rooms().Members(ctx, "lobby")
		require.NoError(t, err)
		assert.Empty(t, ids)
		for _, p := range []*peer{w1, w2} {
			w.eventually(3*time.Second, func() bool { return p.count("leave", "") == 2*each }, "all leaves")
			seen := make(map[string]bool)
			for _, u := range p.got() {
				if u.Type == "leave" {
					assert.False(t, seen[u.ConnectionID], "once each")
					seen[u.ConnectionID] = true
				}
			}
		}
		data, err := s2.Rooms().Metadata(ctx, "lobby")
		require.NoError(t, err)
		assert.JSONEq(t, `{"topic":"x"}`, string(data), "what a room is about stays")
		of, err := s1.Rooms().Of(ctx, "c0-0")
		require.NoError(t, err)
		assert.Equal(t, []string{"attic"}, of, "and so does who is elsewhere")
		require.NoError(t, s1.Rooms().Clear(ctx, "lobby"), "an empty one too")

		require.NoError(t, s1.Presence().Join(ctx, "lobby", "c0-1"))
		require.NoError(t, s2.Rooms().Delete(ctx, "lobby"))
		w2.expect(time.Second, "leave", "c0-1")
		data, err = s1.Rooms().Metadata(ctx, "lobby")
		require.NoError(t, err)
		assert.Nil(t, data)
		require.NoError(t, s2.Rooms().Delete(ctx, "lobby"))
	})
}

func TestRoomMetadata(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		ctx := t.Context()
		for i, step := range []struct {
			value    any
			strategy Strategy
			want     string
		}{
			{map[string]any{"a": 1, "in": map[string]any{"x": 1}}, "", `{"a":1,"in":{"x":1}}`},
			{map[string]any{"b": 2}, Merge, `{"a":1,"b":2,"in":{"x":1}}`},
			{json.RawMessage(`{"in":{"y":9007199254740993}}`), DeepMerge, `{"a":1,"b":2,"in":{"x":1,"y":9007199254740993}}`},
			{[]int{1}, DeepMerge, `[1]`},
			{map[string]any{"c": 3}, Merge, `{"c":3}`},
			{nil, Merge, ``},
			{"text", Replace, `"text"`},
			{nil, Replace, ``},
		} {
			s := []*testServer{s1, s2}[i%2]
			require.NoError(t, s.Rooms().SetMetadata(ctx, "lobby", step.value, MetadataOptions{Strategy: step.strategy}), "step %d", i)
			for _, s := range []*testServer{s1, s2} {
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
		require.ErrorIs(t, s1.Rooms().SetMetadata(ctx, "lobby", make(chan int), MetadataOptions{}), ErrInvalidMetadata)
		require.ErrorIs(t, s1.Rooms().SetMetadata(ctx, "lobby", 1, MetadataOptions{Strategy: "x"}), ErrInvalidMetadata)
		require.ErrorIs(t, s1.Rooms().SetMetadata(ctx, "lobby", strings.Repeat("x", 16<<10), MetadataOptions{}), ErrTooLarge)
		// Not the change alone is measured, but what comes of it.
		require.NoError(t, s1.Rooms().SetMetadata(ctx, "lobby", map[string]any{"a": strings.Repeat("x", 9<<10)}, MetadataOptions{}))
		require.ErrorIs(t, s1.Rooms().SetMetadata(ctx, "lobby", map[string]any{"b": strings.Repeat("x", 9<<10)}, MetadataOptions{Strategy: Merge}), ErrTooLarge)
	})
}

// mergeAtOnce has both servers add fields of their own at the same time, and
// checks that none is lost.
func mergeAtOnce(t *testing.T, set func(server int, change map[string]any, strategy Strategy) error, read func(server int) json.RawMessage) {
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
				strategy := Merge
				if i%2 == 0 {
					field, strategy = map[string]any{"deep": field}, DeepMerge
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

func TestRoomMetadataMergedAtOnceLosesNothing(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		servers := []*testServer{w.tracked(), w.tracked()}
		mergeAtOnce(t, func(server int, change map[string]any, strategy Strategy) error {
			return servers[server].Rooms().SetMetadata(t.Context(), "lobby", change, MetadataOptions{Strategy: strategy})
		}, func(server int) json.RawMessage {
			data, err := servers[server].Rooms().Metadata(t.Context(), "lobby")
			require.NoError(t, err)
			return data
		})
	})
}

func TestSendingToRoomsAndConnections(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		ctx := t.Context()
		a, b, outside := s1.dial(), s2.dial(), s2.dial()
		a.join("lobby")
		b.join("lobby")
		require.NoError(t, s1.Rooms().Send(ctx, "lobby", "app/news", map[string]any{"n": json.Number("12345678901234567890")}))
		for _, p := range []*peer{a, b} {
			w.eventually(time.Second, func() bool { return p.pushed("app/news") == 1 }, "the frame")
			assert.Contains(t, string(p.pushesOf("app/news")[0].Payload), "12345678901234567890")
		}
		for _, p := range []*peer{a, b} {
			require.NoError(t, s1.Connections().Send(ctx, p.id, "app/you", "hello"))
			w.eventually(time.Second, func() bool { return p.pushed("app/you") == 1 }, "the frame")
			assert.Equal(t, `"hello"`, string(p.pushesOf("app/you")[0].Payload))
			assert.Nil(t, p.pushesOf("app/you")[0].ID)
		}
		w.sleep(50 * time.Millisecond)
		assert.Equal(t, 1, a.pushed("app/news"), "once")
		assert.Zero(t, outside.pushed("app/news"))
		assert.Zero(t, outside.pushed("app/you"))

		require.ErrorIs(t, s1.Connections().Send(ctx, "nobody", "app/you", 1), ErrUnknownConnection)
		for _, command := range []string{"", "mesh/presence-update", "ping", "pong", "latency", "latency:request", "latency:response"} {
			require.ErrorIs(t, s1.Connections().Send(ctx, a.id, command, 1), ErrInvalidCommand, "%q", command)
			require.ErrorIs(t, s1.Rooms().Send(ctx, "lobby", command, 1), ErrInvalidCommand, "%q", command)
			c, ok := s1.Connection(a.id)
			require.True(t, ok)
			require.ErrorIs(t, c.Send(command, 1), ErrInvalidCommand, "%q", command)
		}
		require.Error(t, s1.Rooms().Send(ctx, "lobby", "app/news", make(chan int)))
		require.NoError(t, s1.Rooms().Send(ctx, "empty", "app/news", 1))
	})
}
