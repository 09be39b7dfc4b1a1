package mesh_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

func TestServersOfTheGroup(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s, p := w.Tracked(), w.Manager()
		a, _ := s.Dial(), s.Dial()
		a.Join("lobby")
		a.Join("attic")

		list, err := s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 2)
		for _, info := range list {
			assert.False(t, info.Dead)
			assert.Zero(t, info.DeadFor)
			assert.Positive(t, info.LeaseLeft)
			assert.Less(t, info.LeaseAge, w.Unhurried(10*time.Second))
			assert.Equal(t, 10*time.Second, info.LeaseLeft+info.LeaseAge)
			if info.Self {
				assert.Equal(t, s.Stats().Incarnation, info.Incarnation)
				assert.Equal(t, 4, info.Owned, "two connections and two entries")
			} else {
				assert.Equal(t, p.Stats().Incarnation, info.Incarnation)
				assert.Zero(t, info.Owned)
			}
		}
		require.NoError(t, p.Shutdown(t.Context()))
		list, err = s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 1, "a server that was shut down is neither alive nor dead")
		assert.True(t, list[0].Self)
	})
}

// TestServersShowsADeath follows a server that dies. Its lease runs out, it is listed as
// dead for a moment, and then it is not listed any more.
func TestServersShowsADeath(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		p, die := w.Doomed()
		inc := p.Stats().Incarnation
		for i := range 3 {
			id := fmt.Sprint("c", i)
			require.NoError(t, p.Connect(t.Context(), id, nil))
			require.NoError(t, p.Join(t.Context(), "lobby", id))
		}
		// A server in contact declares others dead as soon as their leases run out.
		w.Sleep(11 * time.Second)
		info := w.Found(s, inc)
		require.NotNil(t, info)
		assert.Equal(t, 6, info.Owned)
		assert.Positive(t, info.LeaseLeft)

		die()
		before := info.LeaseLeft
		w.Eventually(12*time.Second, func() bool {
			if info = w.Found(s, inc); info == nil || info.Dead {
				return true
			}
			assert.Less(t, info.LeaseAge, w.Unhurried(11*time.Second), "the limit of the leave delay")
			before = min(before, info.LeaseLeft)
			return false
		}, "%s is declared dead", inc)
		if w.Virtual { // in real time, the last look may be long before the end of the lease
			assert.Less(t, before, 2*time.Second, "the list shows that the lease runs out")
		}
		w.Eventually(2*time.Second, func() bool { return w.Found(s, inc) == nil }, "%s is cleaned up", inc)
		count, err := s.Presence().Count(t.Context(), "lobby")
		require.NoError(t, err)
		assert.Zero(t, count)
	})
}

// TestServersOnTheLists checks that Servers returns the lists in Redis unchanged, with
// times by the clock of Redis.
func TestServersOnTheLists(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, c := w.Tracked(), w.Client()
		now := time.Now().UnixMilli()
		zadd := func(key string, score int64, inc string) {
			t.Helper()
			require.NoError(t, c.Do(t.Context(), "zadd", key, score, inc).Err())
		}
		zadd(w.Keys().Instances(), now-1500, "late")
		zadd(w.Keys().Dead(), now-2500, "dead")
		require.NoError(t, c.SAdd(t.Context(), w.Keys().Owned(0, "dead"), "c a", "c b").Err())
		list, err := s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 3)
		assert.Equal(t, mesh.ServerInfo{Incarnation: "late", LeaseLeft: -1500 * time.Millisecond, LeaseAge: 11500 * time.Millisecond}, list[0])
		assert.True(t, list[1].Self)
		assert.Equal(t, mesh.ServerInfo{Incarnation: "dead", Dead: true, DeadFor: 2500 * time.Millisecond, Owned: 2}, list[2])
	})
}

// TestOwnedIsCountedOnlyIfCheap checks that Servers does not count the entries of each
// server if that would take thousands of commands.
func TestOwnedIsCountedOnlyIfCheap(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, err := mesh.NewServer(w.Options())
		require.NoError(t, err)
		s.SetBuckets(mesh.MaxOwnedSizes) // as on a cluster
		require.NoError(t, s.Start(t.Context()))
		defer func() { require.NoError(t, s.Shutdown(context.Background())) }()
		c := w.Client()
		list, err := s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 1)
		require.NotEqual(t, -1, list[0].Owned)
		require.NoError(t, c.Do(t.Context(), "zadd", w.Keys().Dead(), 1, "dead").Err())
		list, err = s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 2)
		for _, info := range list {
			assert.Equal(t, -1, info.Owned)
		}
	})
}

func named(name string) func(*mesh.Options) { return func(o *mesh.Options) { o.Name = name } }

// TestNamesOfServers checks that each server returns the names of all servers on the
// lists.
func TestNamesOfServers(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s, other := w.Tracked(named("ann")), w.Server(named("bob ü"))
		hidden := w.Server(func(o *mesh.Options) { mesh.SetHost(o, "") })
		names := func() map[string]string {
			list, err := s.Servers(t.Context())
			require.NoError(t, err)
			found := make(map[string]string)
			for _, info := range list {
				found[info.Incarnation] = info.Name
			}
			return found
		}
		want := map[string]string{s.Stats().Incarnation: "ann", other.Stats().Incarnation: "bob ü", hidden.Stats().Incarnation: ""}
		require.Equal(t, want, names())

		// The name has a TTL, because servers of versions without names do not delete it.
		key := w.Keys().Name(other.Stats().Incarnation)
		left, err := w.Client().PTTL(t.Context(), key).Result()
		require.NoError(t, err)
		assert.Positive(t, left)
		assert.LessOrEqual(t, left, 24*time.Hour)
		require.Zero(t, w.Client().Exists(t.Context(), w.Keys().Name(hidden.Stats().Incarnation)).Val(), "no name, no key")

		// A server restores its name if it is lost or replaced by another type.
		require.NoError(t, w.Client().Del(t.Context(), key).Err())
		w.Eventually(20*time.Second, func() bool { return names()[other.Stats().Incarnation] == "bob ü" }, "the name is back")
		require.NoError(t, w.Client().Del(t.Context(), key).Err())
		require.NoError(t, w.Client().SAdd(t.Context(), key, "x").Err())
		require.Empty(t, names()[other.Stats().Incarnation], "a key of another type is no name")
		w.Eventually(20*time.Second, func() bool { return names()[other.Stats().Incarnation] == "bob ü" }, "the name is back")

		require.NoError(t, other.Shutdown(t.Context()))
		require.Zero(t, w.Client().Exists(t.Context(), key).Val(), "Shutdown removes the name")
		delete(want, testhook.PartsOf(other.Server).Lease.Incarnation())
		require.Equal(t, want, names())
	})
}

// TestInvalidNamesInRedis checks that an invalid name in Redis is left out.
func TestInvalidNamesInRedis(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, c := w.Tracked(named("ann")), w.Client()
		require.NoError(t, c.ZAdd(t.Context(), w.Keys().Instances(), redis.Z{Score: float64(w.Mem.Now().Add(time.Minute).UnixMilli()), Member: "x"}).Err())
		for _, name := range []string{"a\nb", "\xff", strings.Repeat("x", 129)} {
			require.NoError(t, c.Set(t.Context(), w.Keys().Name("x"), name, 0).Err())
			assert.Empty(t, w.Found(s, "x").Name)
		}
		require.NoError(t, c.Set(t.Context(), w.Keys().Name("x"), "xaver", 0).Err())
		assert.Equal(t, "xaver", w.Found(s, "x").Name)
	})
}

// TestNameAfterDeathAndReregistration checks that a dead server keeps its name until it
// has been cleaned up, and that a server that reregisters has its name again.
func TestNameAfterDeathAndReregistration(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "leases that run out")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(named("ann"))
		opts := w.Options()
		opts.Name = "bob"
		p, err := mesh.NewPresenceManager(opts)
		require.NoError(t, err)
		require.NoError(t, p.Start(t.Context()))
		inc := p.Stats().Incarnation
		w.Sleep(11 * time.Second)
		require.Equal(t, "bob", w.Found(s, inc).Name)
		_ = opts.Redis.Close()
		w.Eventually(13*time.Second, func() bool {
			info := w.Found(s, inc)
			if info != nil {
				require.Equal(t, "bob", info.Name)
			}
			return info == nil
		}, "it is cleaned up")
		require.Zero(t, w.Client().Exists(t.Context(), w.Keys().Name(inc)).Val())
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = p.Shutdown(ctx)

		old := s.Stats().Incarnation
		require.NoError(t, w.Client().FlushAll(t.Context()).Err())
		w.Eventually(20*time.Second, func() bool { return s.Stats().Incarnation != old }, "it has reregistered")
		require.Equal(t, "ann", w.Found(s, s.Stats().Incarnation).Name)
	})
}

// FuzzControl sends each input to the channel of a server and to those of rooms and
// expired keys. Such messages may come from peers of another version or from a stranger
// with access to Redis. Nothing may panic, and the server must still serve connections.
func FuzzControl(f *testing.F) {
	for _, s := range []string{
		"", " ", "echo:1", "echo:18446744073709551615", "echo:-1", "meta c 1 {}", "meta c 18446744073709551615 {", "meta c x {}", "meta",
		`call {"id":"1","from":"x","op":"add","room":"a","conn":"c"}`, `call {"id":"1","from":"x","op":"clear","room":"a"}`,
		`call {"id":"","from":"","op":"rooms","conn":"c"}`, `call {"id":"2","from":"*","op":"close","conn":"c"}`, `call {`, `call null`,
		`call {"id":"3","from":"x","op":"recheck","conn":"c"}`, `call {"id":"4","op":"add","room":"\u0000","conn":":"}`,
		`done {"id":"1","ok":true,"error":"limit"}`, `done {}`, `send {"conn":"c","command":"x","payload":{"a":1}}`, `send {"room":"a","command":"mesh/assign-id"}`,
		"J e t - 1 . c id inc 0 0 0 . 0 0 0 1 1\n", "S e t p 1 d c id inc 0 2 0 . 0 0 0 1 2\n{}", "\xff\x00",
	} {
		f.Add(s)
	}
	z := newFuzzServer(f)
	require.NoError(f, z.neighbour.WriteMessage(websocket.TextMessage, []byte(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"a"}}`)))
	require.NoError(f, alive(z.neighbour))
	f.Fuzz(func(t *testing.T, payload string) {
		n := testhook.PartsOf(z.srv)
		if _, ok := n.Local.Conn("c"); !ok { // a call closed it
			require.NoError(t, z.srv.Presence().Connect(t.Context(), "c", json.RawMessage(`{"x":1}`)))
			require.NoError(t, z.srv.Presence().Join(t.Context(), "a", "c"))
		}
		z.srv.HandleMessage(n.Keys.ServerChannel(n.Lease.Incarnation()), payload)
		z.srv.HandleMessage(n.Keys.EventsPrefix()+"a", payload)
		z.srv.HandleMessage(n.Keys.EventsPrefix()+payload, payload)
		z.srv.HandleMessage(payload, payload)
		z.srv.WaitForPeers()
		require.NoError(t, alive(z.neighbour), "the neighbour")
	})
}
