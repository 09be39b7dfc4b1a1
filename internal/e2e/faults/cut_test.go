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
	{"cut off, seen", stale((*redistest.ProxyServer).Cut)},
	{"black hole, seen", stale(func(p *redistest.ProxyServer) { p.BlackHole(true) })},
	{"cut off, shutdown", shutdownWithout((*redistest.ProxyServer).Cut)},
	{"black hole, shutdown", shutdownWithout(func(p *redistest.ProxyServer) { p.BlackHole(true) })},
	{"late join", lateJoin},
	{"late join after its leave", lateJoinAfterLeave},
	{"late join of a buried server", lateJoinOfBuried},
	{"late join of a killed server", lateJoinOfKilled},
	{"subscriptions killed", connectionsKilled("pubsub")},
	{"connections killed", connectionsKilled("normal")},
}

// outage: all servers are out of touch with Redis for three leases, while some
// connections close and others ask for things. No leave is told of who stayed,
// and afterwards everything is as asked.
func outage(begin func(p *redistest.ProxyServer)) func(t *testing.T) {
	const lease = 2 * time.Second
	return func(t *testing.T) {
		w := harness.RealWorld(t)
		proxy := redistest.Proxy(t, w.Real.Addr())
		d := newDrill(w, 2, []string{"a", "b"}, harness.LeaseOf(lease), through(t, proxy))
		stay, go1, go2 := d.members(10), d.members(2), d.members(2)
		late := d.servers[0].Dial()
		d.settles(time.Now(), 5*time.Second)
		d.patient()

		begin(proxy)
		began := time.Now()
		for _, p := range go1 {
			p.Close()
			d.forget(p)
		}
		asked := time.Now()
		var answer harness.View
		require.NoError(t, json.Unmarshal(late.Call("mesh/join-room", map[string]any{"roomName": "a"}), &answer))
		require.True(t, answer.Success && answer.Stale, answer.Code)
		require.LessOrEqual(t, time.Since(asked), w.Unhurried(2*time.Second+200*time.Millisecond))
		d.note("a", late.ID, harness.Wish{In: true})
		w.Sleep(time.Until(began.Add(3 * lease)))
		for _, p := range go2 {
			p.Close()
			d.forget(p)
		}
		proxy.Heal()
		healed := time.Now()
		took := d.settles(healed, 3*lease+3*time.Second)
		t.Logf("after %v without Redis: as it should be within %v", healed.Sub(began).Round(time.Millisecond), took.Round(time.Millisecond))
		// Patience is back, and still nobody who stayed is told to have left.
		d.patient()
		w.Sleep(lease / 2)
		require.Empty(t, d.state())
		d.stayed(stay)
		d.over()
	}
}

// bereft is a server of a watched room whose Redis is taken away now.
func bereft(t *testing.T, begin func(p *redistest.ProxyServer)) *harness.Server {
	w := harness.RealWorld(t)
	proxy := redistest.Proxy(t, w.Real.Addr())
	d := newDrill(w, 1, []string{"a"}, harness.LeaseOf(3*time.Second), through(t, proxy), func(o *mesh.Options) { o.Limits.CommandsPerSecond = -1 })
	t.Cleanup(proxy.Heal) // before the shutdown of servers
	d.members(3)
	d.settles(time.Now(), 5*time.Second)
	begin(proxy)
	return d.servers[0]
}

// stale: while Redis is away a watched room is shown as it was, and as stale
// as soon as a beat, one a second, has not come back for two.
func stale(begin func(p *redistest.ProxyServer)) func(t *testing.T) {
	return func(t *testing.T) {
		s := bereft(t, begin)
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
		}, "the room is shown as stale")
		t.Logf("shown as stale %v after Redis was gone", time.Since(began).Round(time.Millisecond))
	}
}

// shutdownWithout: a shutdown is bounded by its context although Redis is away.
func shutdownWithout(begin func(p *redistest.ProxyServer)) func(t *testing.T) {
	return func(t *testing.T) {
		s := bereft(t, begin)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		asked := time.Now()
		err := s.Shutdown(ctx)
		took := time.Since(asked)
		t.Logf("shutdown took %v", took.Round(time.Millisecond))
		s.Stop.Do(func() { // what the harness would do, but for another shutdown
			_ = s.HTTP.Close()
			<-s.Done
		})
		require.Error(t, err, "entries could not be taken away")
		require.Less(t, took, s.W.Unhurried(1500*time.Millisecond), "bounded by its context")
	}
}

// forget notes that a peer is in no room any more.
func (d *drill) forget(p *harness.Peer) {
	for _, room := range d.rooms {
		d.note(room, p.ID, harness.Wish{})
	}
}

// connectionsKilled: the connections that carry events, or those that carry
// commands, are killed again and again while members come and go.
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
		d.calm()
		took := d.settles(last, 2*time.Second)
		t.Logf("%d connections killed, %d calls: as it should be %v after the last one", cut, d.calls.Load(),
			took.Round(time.Millisecond))
		require.Positive(t, cut)
		d.stayed(stay)
		d.over()
	}
}

// lateJoin: the connection closes while its join sits in a proxy. Whenever it
// comes out, the room is empty in the end, and stays so.
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
		d.Eventually(2*time.Second, func() bool { return owner.Stats().Entries == len(peers) }, "joins on their way")
		for _, p := range peers {
			p.Close()
		}
		w.Sleep(held)
		proxy.Heal()
		d.Eventually(10*time.Second, func() bool {
			s := owner.Stats()
			return s.Entries == 0 && s.Unwritten == 0 && s.Connections == 0
		}, "everything written")
		d.settles(time.Now(), 3*time.Second)
	}
	w.Sleep(500 * time.Millisecond)
	require.Empty(t, d.state())
	d.over()
}

// lateJoinAfterLeave: the join comes out of the proxy when its connection has
// closed and everything about that has been written another way.
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
	d.Eventually(2*time.Second, func() bool { return owner.Stats().Unwritten == 0 }, "connection registered")
	proxy.Stall(true)
	var answer harness.View
	require.NoError(t, json.Unmarshal(p.Call("mesh/join-room", map[string]any{"roomName": "lobby"}), &answer))
	require.True(t, answer.Success && answer.Stale, "the join is in the proxy")
	direct.Store(true)
	p.Close()
	d.Eventually(10*time.Second, func() bool {
		s := owner.Stats()
		return s.Unwritten == 0 && s.Connections == 0
	}, "the leave written past the proxy")
	admin := w.Client()
	require.NoError(t, admin.ConfigResetStat(t.Context()).Err())
	d.comesOut(proxy, func() bool { // nothing else is due with such leases
		info, err := admin.Info(t.Context(), "commandstats").Result()
		require.NoError(t, err)
		return strings.Contains(info, "cmdstat_evalsha:")
	})
	d.over()
}

// comesOut lets the proxy deliver what it holds, until out says that Redis has
// it. It must not change anything.
func (d *drill) comesOut(proxy *redistest.ProxyServer, out func() bool) {
	d.T.Helper()
	proxy.Heal()
	d.Eventually(5*time.Second, out, "the join comes out of the proxy")
	d.Sleep(300 * time.Millisecond) // for what must not come
	require.Empty(d.T, d.state())
}

// lateJoinOfKilled: the server process is killed, and buried, while a join of
// it sits in a proxy.
func lateJoinOfKilled(t *testing.T) {
	const lease = 2 * time.Second
	w := harness.RealWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, harness.LeaseOf(lease))
	proxy := redistest.Proxy(t, w.Real.Addr())
	victim := w.Child(harness.ChildConfig{Redis: proxy.Addr(), Lease: lease})
	first, second := victim.Dial(), victim.Dial()
	d.note("lobby", first.ID, first.In("lobby"))
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	proxy.Stall(true)
	var answer harness.View
	require.NoError(t, json.Unmarshal(second.Call("mesh/join-room", map[string]any{"roomName": "lobby"}), &answer))
	require.True(t, answer.Success && answer.Stale, "the join is in the proxy")
	victim.Die()
	d.forget(first)
	d.settles(time.Now(), lease+2*time.Second)
	admin := w.Client()
	d.Eventually(2*time.Second, func() bool {
		dead, err := admin.ZCard(t.Context(), "mesh:dead").Result()
		require.NoError(t, err)
		return dead == 0
	}, "the dead server cleaned up after")
	// Redis ends a connection of the dead process when it has read all of it.
	d.comesOut(proxy, func() bool { return proxy.Connections() == 0 })
	d.over()
}

// lateJoinOfBuried: the join sits in a proxy for so long that its server is
// declared dead.
func lateJoinOfBuried(t *testing.T) {
	const lease = 2 * time.Second
	w := harness.RealWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, harness.LeaseOf(lease))
	proxy := redistest.Proxy(t, w.Real.Addr())
	owner := w.Tracked(harness.LeaseOf(lease), through(t, proxy))
	d.servers = append(d.servers, owner)
	stay, gone := owner.Dial(), owner.Dial()
	d.note("lobby", stay.ID, stay.In("lobby"))
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	proxy.Stall(true)
	require.NoError(t, gone.Send(map[string]any{"id": 1, "command": "mesh/join-room", "payload": map[string]any{"roomName": "lobby"}}))
	d.Eventually(2*time.Second, func() bool { return owner.Stats().Entries == 2 }, "join on its way")
	gone.Close()
	// The others cannot know better than that this server is dead.
	d.streams[0].p.Expect(lease+2*time.Second, "leave", stay.ID)
	proxy.Heal()
	took := d.settles(time.Now(), lease+4*time.Second)
	t.Logf("back %v after the network", took.Round(time.Millisecond))
	require.Equal(t, 2, d.streams[0].p.Count("join", stay.ID))
	require.Equal(t, 1, d.streams[0].p.Count("leave", stay.ID))
	require.EqualValues(t, 1, owner.Stats().Reregistered)
	w.Sleep(500 * time.Millisecond)
	require.Empty(t, d.state())
	d.over()
}
