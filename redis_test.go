package mesh_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/meshtest"
)

func TestRedisAway(t *testing.T) {
	t.Parallel()
	// Not on a cluster, because nodes that were paused replace each other as masters.
	harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		watcher, p, late := s.Dial(), s.Dial(), s.Dial()
		var others []*harness.Peer
		for range 5 {
			others = append(others, s.Dial())
		}
		watcher.Subscribe("lobby")
		p.Join("lobby")
		watcher.Expect(time.Second, "join", p.ID)
		require.Equal(t, "true", p.State("lobby", map[string]any{"a": 1}))
		watcher.Expect(time.Second, "state", p.ID)
		w.Away()

		var wg sync.WaitGroup
		within := func(p *harness.Peer, command string, payload any, check func(answer json.RawMessage)) {
			wg.Go(func() {
				begun := time.Now()
				answer, err := p.TryCall(command, payload)
				if assert.NoError(t, err, command) {
					assert.LessOrEqual(t, time.Since(begun), w.Unhurried(2100*time.Millisecond), command)
					check(answer)
				}
			})
		}
		unavailable := func(answer json.RawMessage) {
			assert.JSONEq(t, `{"error":"Temporarily unavailable","code":"EUNAVAILABLE","name":"CommandError"}`, string(answer))
		}
		stale := func(answer json.RawMessage) {
			var v harness.View
			if assert.NoError(t, json.Unmarshal(answer, &v)) {
				assert.True(t, v.Success && v.Stale, "%s", answer)
			}
		}
		within(late, "mesh/join-room", harness.InRoomPayload("lobby"), stale)
		within(p, "mesh/publish-presence-state", map[string]any{"roomName": "lobby", "state": map[string]any{"a": 2}},
			func(answer json.RawMessage) { assert.Equal(t, "false", string(answer)) })
		within(others[0], "mesh/subscribe-presence", harness.InRoomPayload("elsewhere"), stale)
		within(others[1], "mesh/get-presence-state", harness.InRoomPayload("elsewhere"), unavailable)
		within(others[2], "mesh/get-room-metadata", harness.InRoomPayload("lobby"), unavailable)
		within(others[3], "mesh/noop", nil, func(answer json.RawMessage) { assert.Equal(t, "true", string(answer)) })
		wg.Wait()
		// The server soon notices that it receives no events.
		for _, command := range []string{"mesh/subscribe-presence", "mesh/get-presence-state"} {
			c := others[4]
			w.Eventually(6*time.Second, func() bool { return c.Room(command, "lobby").Stale }, "%s: stale", command)
			v := c.Room(command, "lobby")
			assert.True(t, v.Success)
			assert.True(t, v.Stale)
			assert.Contains(t, string(v.Present), p.ID)
			assert.JSONEq(t, `{"a":1}`, string(v.States[p.ID]))
		}
		assert.Zero(t, watcher.Pushed("mesh/presence-ended"))
		assert.Zero(t, watcher.Count("leave", ""))

		w.Back()
		watcher.Expect(8*time.Second, "join", late.ID)
		w.Eventually(8*time.Second, func() bool {
			got := watcher.Got()
			return string(got[len(got)-1].State) == `{"a":2}` || watcher.Count("state", p.ID) == 2
		}, "the state that was not written before")
		w.Eventually(5*time.Second, func() bool { return s.Stats().Stale == 0 }, "no stale room")
		assert.Zero(t, watcher.Count("leave", ""), "%v", watcher.Got())
		assert.ElementsMatch(t, []string{p.ID, late.ID}, s.Dial().Subscribe("lobby").IDs(t))
		assert.Zero(t, s.Stats().Reregistered)
	})
}

// TestSuspectedFailovers suspects a failover again and again, as if the connection to
// one node of a cluster broke all the time. Expired events must be ignored during this
// time, and dead servers must still be declared dead.
func TestSuspectedFailovers(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		const lease = 4 * time.Second
		a, b := w.Tracked(harness.LeaseOf(lease)), w.Tracked(harness.LeaseOf(lease))
		w.Sleep(2 * lease)
		compared := 0
		flap := func(d time.Duration) {
			for range d / (100 * time.Millisecond) {
				a.RedisState().FailoverSuspected()
				w.Sleep(100 * time.Millisecond)
				if a.RedisState().TakeMissed() {
					compared++
				}
				require.True(t, a.ExpiredPaused())
				_, ok := testhook.PartsOf(a.Server).Lease.ClockProof()
				require.True(t, ok, "the server is not in contact")
			}
		}
		flap(3 * lease)
		require.LessOrEqual(t, compared, int(3*lease/(3*time.Second))+1)
		require.Positive(t, compared)
		require.NoError(t, testhook.PartsOf(b.Server).Lease.Stop(t.Context()), "b stops renewing its lease")
		flap(lease + time.Second)
		require.EqualValues(t, 1, testhook.PartsOf(a.Server).Lease.Stats().DeclaredDead)
		w.Sleep(lease)
		require.False(t, a.ExpiredPaused())
	})
}

// TestFailoverOfAMaster checks that a server is out of contact for one lease after
// another process has answered as Redis. If it also has no listener, it stays out of
// contact until the listener is back.
func TestFailoverOfAMaster(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		const lease = 4 * time.Second
		s := w.Tracked(harness.LeaseOf(lease))
		w.Sleep(2 * lease)
		inContact := func() bool { _, ok := testhook.PartsOf(s.Server).Lease.ClockProof(); return ok }
		require.True(t, inContact())
		s.RedisState().NoteGeneration("another one")
		s.RedisState().FailoverSuspected()
		w.Sleep(lease - 100*time.Millisecond)
		require.False(t, inContact())
		w.Sleep(time.Second)
		require.True(t, inContact())

		s.Disconnected()
		s.RedisState().NoteGeneration("another one")
		s.RedisState().FailoverSuspected()
		w.Sleep(2 * lease)
		require.False(t, inContact(), "the listener is not back")
		s.RedisState().Connected()
		w.Sleep(time.Millisecond)
		require.True(t, inContact())
	})
}

// TestBlackHoleWithoutReadTimeout cuts all connections to Redis. New connections are
// accepted, but never answered. With a Redis client without timeouts, the deadlines of
// the calls must end them, subscriptions included.
func TestBlackHoleWithoutReadTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := meshtest.StartRedis(t)
		opts := mem.Options()
		opts.ReadTimeout, opts.WriteTimeout, opts.ContextTimeoutEnabled = -1, -1, true
		var hole atomic.Bool
		dial := opts.Dialer
		opts.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if err := ctx.Err(); err != nil {
				return nil, err // as a net.Dialer does
			}
			if hole.Load() {
				here, there := net.Pipe() // nothing is read or written at the other end
				t.Cleanup(func() { _ = there.Close() })
				return here, nil
			}
			return dial(ctx, network, addr)
		}
		client := redis.NewClient(opts)
		defer func() { _ = client.Close() }()
		m, err := mesh.NewPresenceManager(mesh.Options{Redis: client})
		require.NoError(t, err)
		require.NoError(t, m.Start(t.Context()))
		defer func() { require.NoError(t, m.Shutdown(t.Context())) }()
		require.NoError(t, m.TrackPresence(mesh.Exact("room"), mesh.PresenceOptions{}))
		require.NoError(t, m.Connect(t.Context(), "a", nil))
		hole.Store(true)
		mem.CutOnce()
		time.Sleep(30 * time.Second)
		hole.Store(false)
		time.Sleep(20 * time.Second) // LeaseTTL, and the time of a call
		require.NoError(t, m.Join(t.Context(), "room", "a"))
		for event, err := range m.Subscribe(t.Context(), "room", mesh.SubscribeOptions{}) {
			require.NoError(t, err)
			require.Len(t, event.Snapshot.Members, 1)
			require.False(t, event.Snapshot.Stale)
			break
		}
	})
}

// TestPushesAboutStaleRooms checks which pushes a client gets while rooms become stale and
// recover, also one by one as on a Redis Cluster.
func TestPushesAboutStaleRooms(t *testing.T) {
	t.Parallel()
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("many%02d", i)
	}
	none, recovered := "", `{"stale":false}`
	type look struct {
		stale, away []string
		want        string
	}
	a, b, ab := []string{"a"}, []string{"b"}, []string{"a", "b"}
	for name, test := range map[string]struct {
		rooms    []string
		answered string // told by the answer to the subscription
		looks    []look
	}{
		"all rooms": {ab, "", []look{{ab, nil, none}, {ab, ab, `{"stale":true}`}, {ab, ab, none}, {a, a, none}, {nil, nil, recovered}, {nil, nil, none}}},
		"too short": {ab, "", []look{{ab, nil, none}, {nil, nil, none}}},
		"one room":  {ab, "", []look{{a, a, `{"stale":true,"roomNames":["a"]}`}, {a, a, none}, {nil, nil, recovered}}},
		"one more":  {ab, "", []look{{a, a, `{"stale":true,"roomNames":["a"]}`}, {ab, a, none}, {ab, ab, `{"stale":true}`}, {b, b, none}, {nil, nil, recovered}}},
		"another":   {[]string{"a", "b", "c"}, "", []look{{a, a, `{"stale":true,"roomNames":["a"]}`}, {b, b, `{"stale":true,"roomNames":["b"]}`}, {nil, nil, recovered}}},
		"of others": {ab, "", []look{{[]string{"c"}, []string{"c"}, none}, {nil, nil, none}}},
		"few of many": {many, "", []look{
			{many[:2], []string{many[1], many[0]}, `{"stale":true,"roomNames":["many00","many01"]}`}, {nil, nil, recovered},
		}},
		"many of many":       {many, "", []look{{many[:50], many[:50], `{"stale":true}`}, {many, many, none}, {many[:1], many[:1], none}, {nil, nil, recovered}}},
		"answered":           {ab, "a", []look{{a, nil, none}, {a, a, none}, {ab, ab, `{"stale":true}`}, {nil, nil, recovered}, {nil, nil, none}}},
		"answered, short":    {ab, "a", []look{{a, nil, none}, {nil, nil, recovered}}},
		"no subscriptions":   {nil, "", []look{{ab, ab, none}, {nil, nil, none}}},
		"not answered":       {b, "", []look{{a, a, none}, {ab, ab, `{"stale":true}`}, {a, a, none}, {nil, nil, recovered}}},
		"answered elsewhere": {b, "a", []look{{a, a, none}, {nil, nil, none}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := mesh.NewStaleClient(test.rooms...)
			switch {
			case test.answered != "":
				c.Answered(test.answered)
			case name == "not answered":
				c.Subscribing("a")
			}
			for i, at := range test.looks {
				p, due := c.Look(at.stale, at.away)
				got := none
				if due {
					got = string(p.AppendJSON(nil))
				}
				require.Equal(t, at.want, got, "look %d", i)
			}
		})
	}
}
