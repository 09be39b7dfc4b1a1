package faults

import (
	"context"
	"encoding/json"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

var cutCases = []faultCase{
	{"cut off", outage((*redistest.ProxyServer).Cut)},
	{"black hole", outage(func(p *redistest.ProxyServer) { p.BlackHole(true) })},
	{"cut off, stale snapshot", stale((*redistest.ProxyServer).Cut)},
	{"black hole, stale snapshot", stale(func(p *redistest.ProxyServer) { p.BlackHole(true) })},
	{"cut off, shutdown", shutdownWithout((*redistest.ProxyServer).Cut)},
	{"black hole, shutdown", shutdownWithout(func(p *redistest.ProxyServer) { p.BlackHole(true) })},
	{"late join", lateJoin},
	{"late join after its leave", lateJoinAfterLeave},
	{"late join of a server declared dead", lateJoinOfDeclaredDead},
	{"late join of a killed server", lateJoinOfKilled},
	{"subscriptions killed", connectionsKilled("pubsub")},
	{"connections killed", connectionsKilled("normal")},
}

// outage cuts all servers off from Redis for three leases, while some connections close
// and others send requests. Connections that stay must not be reported as left, and
// Redis must have all changes afterwards.
func outage(begin func(p *redistest.ProxyServer)) func(t *testing.T) {
	const lease = 2 * time.Second
	return func(t *testing.T) {
		w := harness.RealWorld(t)
		proxy := redistest.Proxy(t, w.Real.Addr())
		d := newDrill(w, 2, []string{"a", "b"}, harness.LeaseOf(lease), through(t, proxy))
		stay, closeFirst, closeLast := d.members(10), d.members(2), d.members(2)
		late := d.servers[0].Dial()
		d.settles(time.Now(), 5*time.Second)
		d.awaitContact()

		begin(proxy)
		began := time.Now()
		for _, p := range closeFirst {
			p.Close()
			d.forget(p)
		}
		asked := time.Now()
		var answer harness.View
		require.NoError(t, json.Unmarshal(late.Call("mesh/join-room", map[string]any{"roomName": "a"}), &answer))
		require.True(t, answer.Success && answer.Stale, answer.Code)
		require.LessOrEqual(t, time.Since(asked), w.Unhurried(2*time.Second+200*time.Millisecond))
		d.note("a", late.ID, harness.WantedEntry{In: true})
		w.Sleep(time.Until(began.Add(3 * lease)))
		for _, p := range closeLast {
			p.Close()
			d.forget(p)
		}
		proxy.Heal()
		healed := time.Now()
		took := d.settles(healed, 3*lease+3*time.Second)
		t.Logf("after %v without Redis: recovered within %v", healed.Sub(began).Round(time.Millisecond), took.Round(time.Millisecond))
		// The servers are in contact again, and no connection that stayed is reported
		// as left.
		d.awaitContact()
		w.Sleep(lease / 2)
		require.Empty(t, d.diff())
		d.stayed(stay)
		d.finish()
	}
}

// withoutRedis returns a server with a watched room whose connection to Redis is
// broken.
func withoutRedis(t *testing.T, begin func(p *redistest.ProxyServer)) *harness.Server {
	w := harness.RealWorld(t)
	proxy := redistest.Proxy(t, w.Real.Addr())
	d := newDrill(w, 1, []string{"a"}, harness.LeaseOf(3*time.Second), through(t, proxy), func(o *mesh.Options) { o.Limits.CommandsPerSecond = -1 })
	t.Cleanup(proxy.Heal) // runs before the servers are shut down
	d.members(3)
	d.settles(time.Now(), 5*time.Second)
	begin(proxy)
	return d.servers[0]
}

// stale checks the snapshots of a watched room while Redis is away. They have the last
// known members. They are marked as stale once an echo, which is sent every second, has
// not come back for two seconds.
func stale(begin func(p *redistest.ProxyServer)) func(t *testing.T) {
	return func(t *testing.T) {
		s := withoutRedis(t, begin)
		began := time.Now()
		p := s.Dial()
		s.W.Eventually(4*time.Second, func() bool {
			asked := time.Now()
			shown := p.Room("mesh/subscribe-presence", "a")
			require.True(t, shown.Success, shown.Code)
			require.Len(t, shown.IDs(t), 3)
			require.Less(t, time.Since(asked), s.W.Unhurried(2*time.Second))
			require.JSONEq(t, "true", string(p.Call("mesh/unsubscribe-presence", map[string]any{"roomName": "a"})))
			return shown.Stale
		}, "the snapshot is stale")
		t.Logf("stale %v after the outage began", time.Since(began).Round(time.Millisecond))
	}
}

// shutdownWithout checks that the context bounds a shutdown while Redis is away.
func shutdownWithout(begin func(p *redistest.ProxyServer)) func(t *testing.T) {
	return func(t *testing.T) {
		s := withoutRedis(t, begin)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		asked := time.Now()
		err := s.Shutdown(ctx)
		took := time.Since(asked)
		t.Logf("shutdown took %v", took.Round(time.Millisecond))
		s.Stop.Do(func() { // the harness must not call Shutdown again
			_ = s.HTTP.Close()
			<-s.Done
		})
		require.Error(t, err, "entries could not be removed")
		require.Less(t, took, s.W.Unhurried(1500*time.Millisecond), "the context bounds the shutdown")
	}
}

// forget records that a peer is in no room any more.
func (d *drill) forget(p *harness.Peer) {
	for _, room := range d.rooms {
		d.note(room, p.ID, harness.WantedEntry{})
	}
}

// connectionsKilled kills all connections to Redis of a type several times while
// members join and leave.
func connectionsKilled(kind string) func(t *testing.T) {
	return func(t *testing.T) {
		w := harness.RealWorld(t)
		d := newDrill(w, 2, []string{"a", "b", "c"})
		stay := d.members(2)
		d.churn(8)
		admin := w.Client()
		var cut int64
		for range 8 {
			w.Sleep(200 * time.Millisecond) // load, not synchronisation
			n, err := admin.ClientKillByFilter(t.Context(), "TYPE", kind, "SKIPME", "yes").Result()
			require.NoError(t, err)
			cut += n
		}
		last := time.Now()
		d.stopChurn()
		took := d.settles(last, 2*time.Second)
		t.Logf("%d connections killed, %d calls: recovered %v after the last one", cut, d.calls.Load(),
			took.Round(time.Millisecond))
		require.Positive(t, cut)
		d.stayed(stay)
		d.finish()
	}
}

// lateJoin closes connections while their joins are held in a proxy. The room must be
// empty after the proxy delivers them, whenever that is.
func lateJoin(t *testing.T) {
	w := harness.RealWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, harness.LeaseOf(2*time.Second))
	proxy := redistest.Proxy(t, w.Real.Addr())
	owner := w.Tracked(harness.LeaseOf(2*time.Second), through(t, proxy))
	d.servers = append(d.servers, owner)
	for _, held := range []time.Duration{50 * time.Millisecond, 500 * time.Millisecond, 2500 * time.Millisecond} {
		peers := []*harness.Peer{owner.Dial(), owner.Dial(), owner.Dial()}
		d.settles(time.Now(), 5*time.Second)
		proxy.Stall(true)
		for _, p := range peers {
			require.NoError(t, p.Send(map[string]any{"id": 1, "command": "mesh/join-room", "payload": map[string]any{"roomName": "lobby"}}))
		}
		d.Eventually(2*time.Second, func() bool { return owner.Stats().Entries == len(peers) }, "the joins are sent")
		for _, p := range peers {
			p.Close()
		}
		w.Sleep(held)
		proxy.Heal()
		d.Eventually(10*time.Second, func() bool {
			s := owner.Stats()
			return s.Entries == 0 && s.Unwritten == 0 && s.Connections == 0
		}, "everything is written")
		d.settles(time.Now(), 3*time.Second)
	}
	w.Sleep(500 * time.Millisecond)
	require.Empty(t, d.diff())
	d.finish()
}

// lateJoinAfterLeave delivers a join after its connection has closed and the leave has
// reached Redis over another connection.
func lateJoinAfterLeave(t *testing.T) {
	w := harness.RealWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, harness.LeaseOf(time.Minute))
	proxy := redistest.Proxy(t, w.Real.Addr())
	var direct atomic.Bool // new connections bypass the proxy
	client := redis.NewClient(&redis.Options{
		Addr: proxy.Addr(),
		Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if direct.Load() {
				addr = w.Real.Addr()
			}
			var d net.Dialer
			return d.DialContext(ctx, network, addr)
		},
	})
	t.Cleanup(func() { _ = client.Close() })
	owner := w.Tracked(harness.LeaseOf(time.Minute), func(o *mesh.Options) { o.Redis = client })
	d.servers = append(d.servers, owner)
	p := owner.Dial()
	d.Eventually(2*time.Second, func() bool { return owner.Stats().Unwritten == 0 }, "the connection is registered")
	proxy.Stall(true)
	var answer harness.View
	require.NoError(t, json.Unmarshal(p.Call("mesh/join-room", map[string]any{"roomName": "lobby"}), &answer))
	require.True(t, answer.Success && answer.Stale, "the proxy holds the join")
	direct.Store(true)
	p.Close()
	d.Eventually(10*time.Second, func() bool {
		s := owner.Stats()
		return s.Unwritten == 0 && s.Connections == 0
	}, "the leave is written without the proxy")
	admin := w.Client()
	require.NoError(t, admin.ConfigResetStat(t.Context()).Err())
	d.deliver(proxy, func() bool { // these leases cause no other script calls
		info, err := admin.Info(t.Context(), "commandstats").Result()
		require.NoError(t, err)
		return strings.Contains(info, "cmdstat_evalsha:")
	})
	d.finish()
}

// deliver lets the proxy deliver the join that it holds, and waits until delivered
// returns true. The late join must not change anything.
func (d *drill) deliver(proxy *redistest.ProxyServer, delivered func() bool) {
	d.T.Helper()
	proxy.Heal()
	d.Eventually(5*time.Second, delivered, "the proxy delivers the join")
	d.Sleep(300 * time.Millisecond) // time for unexpected updates
	require.Empty(d.T, d.diff())
}

// lateJoinOfKilled kills a server process while a proxy holds one of its joins. The
// join is delivered after the server was declared dead and cleaned up.
func lateJoinOfKilled(t *testing.T) {
	const lease = 2 * time.Second
	w := harness.RealWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, harness.LeaseOf(lease))
	proxy := redistest.Proxy(t, w.Real.Addr())
	victim := w.Child(harness.ChildConfig{Redis: proxy.Addr(), Lease: lease})
	first, second := victim.Dial(), victim.Dial()
	d.note("lobby", first.ID, first.In("lobby"))
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()
	proxy.Stall(true)
	var answer harness.View
	require.NoError(t, json.Unmarshal(second.Call("mesh/join-room", map[string]any{"roomName": "lobby"}), &answer))
	require.True(t, answer.Success && answer.Stale, "the proxy holds the join")
	victim.Die()
	d.forget(first)
	d.settles(time.Now(), lease+2*time.Second)
	admin := w.Client()
	d.Eventually(2*time.Second, func() bool {
		dead, err := admin.ZCard(t.Context(), "mesh:dead").Result()
		require.NoError(t, err)
		return dead == 0
	}, "the dead server is cleaned up")
	// Redis closes a connection of the dead process after reading all of its data.
	d.deliver(proxy, func() bool { return proxy.Connections() == 0 })
	d.finish()
}

// lateJoinOfDeclaredDead holds a join in a proxy until its server is declared dead.
func lateJoinOfDeclaredDead(t *testing.T) {
	const lease = 2 * time.Second
	w := harness.RealWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, harness.LeaseOf(lease))
	proxy := redistest.Proxy(t, w.Real.Addr())
	owner := w.Tracked(harness.LeaseOf(lease), through(t, proxy))
	d.servers = append(d.servers, owner)
	stay, gone := owner.Dial(), owner.Dial()
	d.note("lobby", stay.ID, stay.In("lobby"))
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()
	proxy.Stall(true)
	require.NoError(t, gone.Send(map[string]any{"id": 1, "command": "mesh/join-room", "payload": map[string]any{"roomName": "lobby"}}))
	d.Eventually(2*time.Second, func() bool { return owner.Stats().Entries == 2 }, "the join is sent")
	gone.Close()
	// The others cannot know that this server is alive.
	d.streams[0].p.Expect(lease+2*time.Second, "leave", stay.ID)
	proxy.Heal()
	took := d.settles(time.Now(), lease+4*time.Second)
	t.Logf("recovered %v after the network", took.Round(time.Millisecond))
	require.Equal(t, 2, d.streams[0].p.Count("join", stay.ID))
	require.Equal(t, 1, d.streams[0].p.Count("leave", stay.ID))
	require.EqualValues(t, 1, owner.Stats().Reregistered)
	w.Sleep(500 * time.Millisecond)
	require.Empty(t, d.diff())
	d.finish()
}
