package api

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/meshtest"
)

// awayKinds are the ways in which Redis refuses or does not answer any write.
var awayKinds = func() map[string]harness.OutageKind {
	kinds := maps.Clone(harness.Outages)
	for name, text := range map[string]string{
		"loading":      "LOADING Redis is loading the dataset in memory",
		"moved":        "MOVED 3999 127.0.0.1:6381",
		"cluster down": "CLUSTERDOWN The cluster is down",
		"misconf":      "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
		"forbidden":    "NOPERM this user has no permissions to run the 'evalsha' command",
		"failing":      "ERR something is wrong",
	} {
		kinds[name] = harness.OutageKind{
			Begin: func(r *meshtest.Redis) { r.SetError(text) }, End: func(r *meshtest.Redis) { r.SetError("") },
		}
	}
	kinds["restart, empty"] = harness.OutageKind{Begin: (*meshtest.Redis).Cut, End: func(r *meshtest.Redis) {
		_ = r.Restart()
		r.Heal()
	}}
	return kinds
}()

// A client joins and subscribes in one burst while Redis is away, before or after the
// server has noticed the outage. Some of the rooms have a mirror on this server, others
// do not. The requests succeed. When Redis is back, the client is a member and has
// received everything.
func TestStockClientWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	for name, kind := range awayKinds {
		for known, wait := range map[string]time.Duration{"": 0, ", known": 6 * time.Second} {
			t.Run(name+known, func(t *testing.T) {
				t.Parallel()
				harness.Embedded(t, func(t *testing.T, w *harness.World) {
					burstWhileAway(t, w, wait, func() { kind.Begin(w.Mem) }, func() { kind.End(w.Mem) })
				})
			})
		}
	}
}

// The same on a real Redis that is paused, or killed and restarted empty.
func TestStockClientWhileRealRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Long(t, "real seconds")
	for _, wait := range []time.Duration{0, 6 * time.Second} {
		t.Run("paused, after "+wait.String(), func(t *testing.T) {
			t.Parallel()
			w := harness.RealWorld(t)
			burstWhileAway(t, w, wait, w.Away, w.Back)
		})
		t.Run("killed, after "+wait.String(), func(t *testing.T) {
			t.Parallel()
			w := harness.RealWorld(t)
			burstWhileAway(t, w, wait, w.Real.Kill, func() { w.Real.Restart(true) })
		})
	}
}

func burstWhileAway(t *testing.T, w *harness.World, wait time.Duration, begin, end func()) {
	s, far := w.Tracked(), w.Tracked()
	member, watcher, stranger, leaver := s.Dial(), s.Dial(), far.Dial(), far.Dial()
	watcher.Subscribe("mirrored")
	for _, room := range []string{"mirrored", "unknown"} {
		member.Join(room)
		stranger.Join(room)
		leaver.Join(room)
	}
	require.Equal(t, "true", stranger.State("unknown", map[string]any{"n": 1}))
	w.Eventually(5*time.Second, func() bool { return watcher.Count("join", "") == 3 }, "the mirror has all joins")
	c := s.Stock("")
	w.Eventually(5*time.Second, func() bool { return s.Stats().Unwritten == 0 }, "the connection is registered")
	w.Sleep(3 * time.Second)

	begin()
	w.Sleep(wait)
	began := time.Now()
	joins, subscribes := map[string]*harness.StockCall{}, map[string]*harness.StockCall{}
	rooms := []string{"mirrored", "unknown", "empty"}
	for _, room := range rooms {
		joins[room], subscribes[room] = c.JoinRoom(room), c.SubscribePresence(room)
	}
	first := map[string]harness.View{}
	for _, room := range rooms {
		joined := c.StaleOK(joins[room])
		require.Contains(t, joined.IDs(t), c.ID)
		if room != "empty" {
			require.Contains(t, joined.IDs(t), member.ID, "this server knows its own members")
		}
		first[room] = c.ViewOf(subscribes[room])
		require.True(t, first[room].Success)
		require.NotContains(t, first[room].IDs(t), c.ID)
	}
	require.ElementsMatch(t, []string{member.ID, stranger.ID, leaver.ID}, first["mirrored"].IDs(t))
	for _, room := range []string{"unknown", "empty"} {
		require.True(t, first[room].Stale)
		require.Empty(t, first[room].IDs(t))
		require.Empty(t, first[room].Epoch)
	}
	limit := 6 * testhook.LimitsOf().Away // one request after the other
	if wait == 0 {
		limit += 2 * testhook.LimitsOf().Call
	}
	require.LessOrEqual(t, time.Since(began), w.Unhurried(limit))
	leaver.Close()
	w.Sleep(4 * time.Second)
	for _, room := range rooms {
		require.Empty(t, c.Got(room), "Redis is away")
	}

	end()
	fits := func(room string, want harness.MemberStates) func() bool {
		return func() bool { return c.Sees(first[room], room).Diff(want) == "" }
	}
	w.Eventually(30*time.Second, fits("mirrored", harness.MemberStates{member.ID: "", stranger.ID: "", c.ID: ""}), "mirrored: %v", c.Got("mirrored"))
	w.Eventually(10*time.Second, fits("unknown", harness.MemberStates{member.ID: "", stranger.ID: `{"n":1}`, c.ID: ""}), "unknown: %v", c.Got("unknown"))
	w.Eventually(10*time.Second, fits("empty", harness.MemberStates{c.ID: ""}), "empty: %v", c.Got("empty"))
	for _, room := range rooms {
		members, err := far.InRedis(room)
		require.NoError(t, err)
		require.Contains(t, members, c.ID)
	}
	// From now on, every update arrives in order.
	stranger.Leave("unknown")
	require.True(t, c.Wait(c.Publish("unknown", map[string]any{"n": 2})).Ok())
	w.Eventually(5*time.Second, fits("unknown", harness.MemberStates{member.ID: "", c.ID: `{"n":2}`}), "updates continue")
	w.Sleep(12 * time.Second) // long enough for a comparison, which must change nothing
	for _, room := range rooms {
		require.Equal(t, 1, c.JoinsOf(first[room], room, c.ID), "the client's own join in %s: %v", room, c.Got(room))
		last := map[string]uint64{}
		for _, u := range c.Got(room) {
			require.GreaterOrEqual(t, u.Seq, last[u.Epoch], "%v", u)
			last[u.Epoch] = u.Seq
			require.NotEmpty(t, u.Epoch)
		}
	}
	require.True(t, fits("mirrored", harness.MemberStates{member.ID: "", stranger.ID: "", c.ID: ""})())
}

// A client changes its rooms between the stale answers and the return of Redis.
// Afterwards it must only be in the rooms that it still wants, and only receive their
// updates.
func TestStockClientChangesItsMindWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, far := w.Tracked(), w.Tracked()
		var joinable, visible atomic.Bool
		joinable.Store(true)
		visible.Store(true)
		s.Track("^guarded", mesh.PresenceOptions{
			Guard:     func(context.Context, mesh.Member, string) (bool, error) { return visible.Load(), nil },
			JoinGuard: func(context.Context, mesh.Member, string) (bool, error) { return joinable.Load(), nil },
		})
		other := far.Dial()
		rooms := []string{"left", "again", "removed", "guarded", "unsubscribed", "twice", "stays"}
		for _, room := range rooms {
			other.Join(room)
		}
		c, gone := s.Stock(""), s.Stock("")
		w.Sleep(3 * time.Second)
		w.Mem.Cut() // not Hang, after which Redis would first carry out the calls that it has already received
		w.Sleep(6 * time.Second)
		for _, room := range rooms {
			c.StaleOK(c.JoinRoom(room))
			c.StaleOK(c.SubscribePresence(room))
		}
		gone.StaleOK(gone.JoinRoom("stays"))
		gone.StaleOK(gone.SubscribePresence("stays"))

		c.Wait(c.Room("mesh/leave-room", "left"))
		c.Wait(c.Room("mesh/leave-room", "again"))
		c.StaleOK(c.JoinRoom("again"))
		_, err := s.Rooms().Remove(t.Context(), "removed", c.ID)
		require.ErrorIs(t, err, mesh.ErrUnavailable)
		joinable.Store(false)
		visible.Store(false)
		_ = s.Connections().Recheck(t.Context(), c.ID)
		require.Equal(t, "true", string(c.Wait(c.Room("mesh/unsubscribe-presence", "unsubscribed")).Payload))
		require.Equal(t, "false", string(c.Wait(c.Room("mesh/unsubscribe-presence", "unsubscribed")).Payload))
		second := c.StaleOK(c.SubscribePresence("twice"))
		require.False(t, c.Wait(c.Room("mesh/join-room", "guarded")).Ok(), "a refusal is no stale success")
		gone.Close()
		w.Sleep(time.Second)
		pushed := func(command string) (rooms []string) {
			c.Mu.Lock()
			defer c.Mu.Unlock()
			for _, f := range c.Pushes {
				var p struct{ RoomName string }
				require.NoError(t, json.Unmarshal(f.Payload, &p))
				if f.Command == command {
					rooms = append(rooms, p.RoomName)
				}
			}
			return rooms
		}
		require.Equal(t, []string{"guarded"}, pushed("mesh/presence-ended"))
		require.Equal(t, []string{"guarded"}, pushed("mesh/membership-ended"))

		w.Mem.Heal()
		w.Sleep(20 * time.Second)
		for room, in := range map[string]bool{
			"left": false, "again": true, "removed": false, "guarded": false, "unsubscribed": true, "twice": true, "stays": true,
		} {
			members, err := far.InRedis(room)
			require.NoError(t, err)
			want := harness.MemberStates{other.ID: ""}
			if in {
				want[c.ID] = ""
			}
			require.Empty(t, members.Diff(want), room)
			switch room {
			case "guarded", "unsubscribed":
				require.Empty(t, c.Got(room), room)
			default:
				first := second
				first.Present = json.RawMessage("[]")
				require.Empty(t, c.Sees(first, room).Diff(want), room)
				for _, u := range c.Got(room) {
					require.Equal(t, "join", u.Type, "%s: no leave is reported", room)
					require.Equal(t, 1, c.JoinsOf(first, room, u.ConnectionID), room)
				}
			}
		}
		require.Equal(t, 5, s.Stats().Subscriptions)
	})
}

// Guards also decide while Redis is away. One room refuses subscriptions, one refuses
// joins, and one is not tracked.
func TestGuardsWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		no := func(context.Context, mesh.Member, string) (bool, error) { return false, nil }
		s.Track("^unseen$", mesh.PresenceOptions{Guard: no})
		s.Track("^closed$", mesh.PresenceOptions{JoinGuard: no})
		c, hidden := s.Stock(""), s.Dial()
		hidden.Join("unseen")
		w.Sleep(3 * time.Second)
		w.Away()
		w.Sleep(6 * time.Second)
		require.Empty(t, c.StaleOK(c.JoinRoom("unseen")).IDs(t), "the answer lists no members")
		require.JSONEq(t, `{"success":false,"present":[]}`, string(c.Wait(c.SubscribePresence("unseen")).Payload))
		require.JSONEq(t, `{"success":false,"present":[],"code":"EREFUSED"}`, string(c.Wait(c.JoinRoom("closed")).Payload))
		require.Equal(t, []string{c.ID}, c.StaleOK(c.JoinRoom("untracked")).IDs(t))
		require.JSONEq(t, `{"success":false,"present":[]}`, string(c.Wait(c.SubscribePresence("untracked")).Payload))
		w.Back()
		w.Sleep(10 * time.Second)
		for room, want := range map[string][]string{"unseen": {hidden.ID, c.ID}, "closed": nil, "untracked": {c.ID}} {
			members, err := s.InRedis(room)
			require.NoError(t, err)
			require.ElementsMatch(t, want, slices.Collect(maps.Keys(members)), room)
		}
	})
}

// Stale subscriptions count towards the limit of subscriptions. They leave no mirror
// when they end.
func TestStaleSubscriptionsAreLimited(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.Limits.SubscriptionsPerConnection = 2 })
		c := s.Stock("")
		w.Sleep(3 * time.Second)
		w.Away()
		w.Sleep(6 * time.Second)
		c.StaleOK(c.SubscribePresence("a"))
		c.StaleOK(c.SubscribePresence("b"))
		require.Equal(t, "ELIMIT", c.Wait(c.SubscribePresence("c")).Code())
		require.Equal(t, "true", string(c.Wait(c.Room("mesh/unsubscribe-presence", "a")).Payload))
		c.StaleOK(c.SubscribePresence("c"))
		require.Len(t, testhook.PartsOf(s.Server).Hub.RoomStatuses(), 3)
		c.Close()
		w.Sleep(10 * time.Second)
		require.Empty(t, testhook.PartsOf(s.Server).Hub.RoomStatuses())
		w.Back()
		w.Sleep(10 * time.Second)
		require.Zero(t, s.Stats().Subscriptions)
	})
}
