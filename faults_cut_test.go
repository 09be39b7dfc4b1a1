package mesh

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
		w := realWorld(t)
		proxy := redistest.Proxy(t, w.real.Addr())
		d := newDrill(w, 2, []string{"a", "b"}, leaseOf(lease), through(t, proxy))
		stay, go1, go2 := d.members(10), d.members(2), d.members(2)
		late := d.servers[0].dial()
		d.settles(time.Now(), 5*time.Second)
		d.patient()

		begin(proxy)
		began := time.Now()
		for _, p := range go1 {
			p.close()
			d.forget(p)
		}
		asked := time.Now()
		var answer view
		require.NoError(t, json.Unmarshal(late.call("mesh/join-room", map[string]any{"roomName": "a"}), &answer))
		require.Equal(t, "EUNAVAILABLE", answer.Code)
		require.LessOrEqual(t, time.Since(asked), 2*time.Second+200*time.Millisecond)
		d.note("a", late.id, wish{in: true})
		w.sleep(time.Until(began.Add(3 * lease)))
		for _, p := range go2 {
			p.close()
			d.forget(p)
		}
		proxy.Heal()
		healed := time.Now()
		took := d.settles(healed, 3*lease+3*time.Second)
		t.Logf("after %v without Redis: as it should be within %v", healed.Sub(began).Round(time.Millisecond), took.Round(time.Millisecond))
		// Patience is back, and still nobody who stayed is told to have left.
		d.patient()
		w.sleep(lease / 2)
		require.Empty(t, d.state())
		d.stayed(stay)
		d.over()
	}
}

// bereft is a server of a watched room whose Redis is taken away now.
func bereft(t *testing.T, begin func(p *redistest.ProxyServer)) *testServer {
	w := realWorld(t)
	proxy := redistest.Proxy(t, w.real.Addr())
	d := newDrill(w, 1, []string{"a"}, leaseOf(3*time.Second), through(t, proxy), func(o *Options) { o.Limits.CommandsPerSecond = -1 })
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
		p := s.dial()
		s.w.eventually(4*time.Second, func() bool {
			asked := time.Now()
			shown := p.room("mesh/subscribe-presence", "a")
			require.True(t, shown.Success, shown.Code)
			require.Len(t, shown.ids(t), 3)
			require.Less(t, time.Since(asked), 2*time.Second)
			require.JSONEq(t, "true", string(p.call("mesh/unsubscribe-presence", map[string]any{"roomName": "a"})))
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
		s.stop.Do(func() { // what the harness would do, but for another shutdown
			_ = s.http.Close()
			<-s.done
		})
		require.Error(t, err, "entries could not be taken away")
		require.Less(t, took, 1500*time.Millisecond, "bounded by its context")
	}
}

// forget notes that a peer is in no room any more.
func (d *drill) forget(p *peer) {
	for _, room := range d.rooms {
		d.note(room, p.id, wish{})
	}
}

// connectionsKilled: the connections that carry events, or those that carry
// commands, are killed again and again while members come and go.
func connectionsKilled(kind string) func(t *testing.T) {
	return func(t *testing.T) {
		w := realWorld(t)
		d := newDrill(w, 2, []string{"a", "b", "c"})
		stay := d.members(2)
		d.churn(8)
		admin := w.client()
		var cut int64
		for range 8 {
			w.sleep(200 * time.Millisecond) // load, not synchronisation
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
	w := realWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, leaseOf(2*time.Second))
	proxy := redistest.Proxy(t, w.real.Addr())
	owner := w.tracked(leaseOf(2*time.Second), through(t, proxy))
	d.servers = append(d.servers, owner)
	for _, held := range []time.Duration{50 * time.Millisecond, 500 * time.Millisecond, 2500 * time.Millisecond} {
		peers := []*peer{owner.dial(), owner.dial(), owner.dial()}
		d.settles(time.Now(), 5*time.Second)
		proxy.Stall(true)
		for _, p := range peers {
			require.NoError(t, p.send(map[string]any{"id": 1, "command": "mesh/join-room", "payload": map[string]any{"roomName": "lobby"}}))
		}
		d.eventually(2*time.Second, func() bool { return owner.Stats().Entries == len(peers) }, "joins on their way")
		for _, p := range peers {
			p.close()
		}
		w.sleep(held)
		proxy.Heal()
		d.eventually(10*time.Second, func() bool {
			s := owner.Stats()
			return s.Entries == 0 && s.Unwritten == 0 && s.Connections == 0
		}, "everything written")
		d.settles(time.Now(), 3*time.Second)
	}
	w.sleep(500 * time.Millisecond)
	require.Empty(t, d.state())
	d.over()
}

// lateJoinAfterLeave: the join comes out of the proxy when its connection has
// closed and everything about that has been written another way.
func lateJoinAfterLeave(t *testing.T) {
	w := realWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, leaseOf(time.Minute))
	proxy := redistest.Proxy(t, w.real.Addr())
	var direct atomic.Bool // new connections bypass the proxy
	client := redis.NewClient(&redis.Options{
		Addr: proxy.Addr(),
		Dialer: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if direct.Load() {
				addr = w.real.Addr()
			}
			var d net.Dialer
			return d.DialContext(ctx, network, addr)
		},
	})
	t.Cleanup(func() { _ = client.Close() })
	owner := w.tracked(leaseOf(time.Minute), func(o *Options) { o.Redis = client })
	d.servers = append(d.servers, owner)
	p := owner.dial()
	d.eventually(2*time.Second, func() bool { return owner.Stats().Unwritten == 0 }, "connection registered")
	proxy.Stall(true)
	var answer view
	require.NoError(t, json.Unmarshal(p.call("mesh/join-room", map[string]any{"roomName": "lobby"}), &answer))
	require.Equal(t, "EUNAVAILABLE", answer.Code, "the join is in the proxy")
	direct.Store(true)
	p.close()
	d.eventually(10*time.Second, func() bool {
		s := owner.Stats()
		return s.Unwritten == 0 && s.Connections == 0
	}, "the leave written past the proxy")
	admin := w.client()
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
	d.t.Helper()
	proxy.Heal()
	d.eventually(5*time.Second, out, "the join comes out of the proxy")
	d.sleep(300 * time.Millisecond) // for what must not come
	require.Empty(d.t, d.state())
}

// lateJoinOfKilled: the server process is killed, and buried, while a join of
// it sits in a proxy.
func lateJoinOfKilled(t *testing.T) {
	const lease = 2 * time.Second
	w := realWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, leaseOf(lease))
	proxy := redistest.Proxy(t, w.real.Addr())
	victim := w.child(childConfig{Redis: proxy.Addr(), Lease: lease})
	first, second := victim.dial(), victim.dial()
	d.note("lobby", first.id, first.in("lobby"))
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	proxy.Stall(true)
	var answer view
	require.NoError(t, json.Unmarshal(second.call("mesh/join-room", map[string]any{"roomName": "lobby"}), &answer))
	require.Equal(t, "EUNAVAILABLE", answer.Code, "the join is in the proxy")
	victim.die()
	d.forget(first)
	d.settles(time.Now(), lease+2*time.Second)
	admin := w.client()
	d.eventually(2*time.Second, func() bool {
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
	w := realWorld(t)
	d := newDrill(w, 1, []string{"lobby"}, leaseOf(lease))
	proxy := redistest.Proxy(t, w.real.Addr())
	owner := w.tracked(leaseOf(lease), through(t, proxy))
	d.servers = append(d.servers, owner)
	stay, gone := owner.dial(), owner.dial()
	d.note("lobby", stay.id, stay.in("lobby"))
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	proxy.Stall(true)
	require.NoError(t, gone.send(map[string]any{"id": 1, "command": "mesh/join-room", "payload": map[string]any{"roomName": "lobby"}}))
	d.eventually(2*time.Second, func() bool { return owner.Stats().Entries == 2 }, "join on its way")
	gone.close()
	// The others cannot know better than that this server is dead.
	d.streams[0].p.expect(lease+2*time.Second, "leave", stay.id)
	proxy.Heal()
	took := d.settles(time.Now(), lease+4*time.Second)
	t.Logf("back %v after the network", took.Round(time.Millisecond))
	require.Equal(t, 2, d.streams[0].p.count("join", stay.id))
	require.Equal(t, 1, d.streams[0].p.count("leave", stay.id))
	require.EqualValues(t, 1, owner.Stats().Reborn)
	w.sleep(500 * time.Millisecond)
	require.Empty(t, d.state())
	d.over()
}
