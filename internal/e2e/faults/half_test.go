package faults

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

var halfCases = []faultCase{
	{"half open, requests", halfOpened(redistest.Requests)},
	{"half open, replies", halfOpened(redistest.Replies)},
	{"requests swallowed", requestsSwallowed},
	{"replies swallowed", repliesSwallowed},
	{"delayed", delayed},
}

// beside returns a drill with one direct server and one server that reaches Redis
// through a proxy. Both have subscribers.
func beside(w *harness.World, lease time.Duration) (*drill, *harness.Server, *redistest.ProxyServer) {
	w.T.Helper()
	d := newDrill(w, 1, []string{"a", "b"}, harness.LeaseOf(lease))
	proxy := redistest.Proxy(w.T, w.Real.Addr())
	s := w.Tracked(harness.LeaseOf(lease), through(w.T, proxy))
	d.servers = append(d.servers, s)
	p := s.Dial()
	for _, room := range d.rooms {
		d.streams = append(d.streams, follow(p, room))
	}
	return d, s, proxy
}

// halfOpened breaks one direction of all connections between a server and Redis. The
// connections are not closed, so the server has to find out by itself. New connections
// work. If only replies are lost, heartbeats still reach Redis, and the server must not
// be declared dead.
func halfOpened(half redistest.Half) func(t *testing.T) {
	const lease = 2 * time.Second
	return func(t *testing.T) {
		d, victim, proxy := beside(harness.RealWorld(t), lease)
		stay := d.members(5)
		d.churn(5)
		d.awaitContact()
		require.Positive(t, proxy.Connections())
		proxy.HalfOpen(half)
		began := time.Now()
		d.Sleep(lease / 4) // under load
		d.stopChurn()
		// The server resets its listener after two seconds without an echo. Otherwise
		// its lease runs out, and it reregisters.
		took := d.settles(began, 2*(lease+time.Second))
		t.Logf("recovered %v after the connections were half open", took.Round(time.Millisecond))
		if half == redistest.Replies {
			require.Zero(t, victim.Stats().Reregistered)
			d.stayed(stay)
		}
		d.finish()
	}
}

// requestsSwallowed drops all requests of a server, which still receives events. The
// server is declared dead, each leave is reported once, and all members return when the
// requests arrive again.
func requestsSwallowed(t *testing.T) {
	const lease = 2 * time.Second
	d, victim, proxy := beside(harness.RealWorld(t), lease)
	stay := d.members(5)
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()
	others := &drill{World: d.World, servers: d.servers[:1]}
	proxy.DropRequests(true)
	began := time.Now()
	victims := stay[len(stay)/2:] // members of the last server
	for _, p := range victims {
		for _, s := range d.streams[:len(d.rooms)] {
			if _, in := d.want[s.room][p.ID]; in {
				others.reportedBy(began.Add(lease+time.Second), lease, func() bool { return len(s.leaves()[p.ID]) == 1 },
					"%s receives the leave of %s", s.room, p.ID)
			}
		}
	}
	proxy.Heal()
	took := d.settles(time.Now(), lease+3*time.Second)
	t.Logf("recovered %v after the network", took.Round(time.Millisecond))
	require.EqualValues(t, 1, victim.Stats().Reregistered)
	for i, s := range d.streams[:len(d.rooms)] {
		for id, times := range s.leaves() {
			require.Len(t, times, 1, "subscriber %d, %s", i, id)
		}
	}
	d.stayed(stay[:len(stay)/2])
	d.finish()
}

// repliesSwallowed drops all replies to a server for longer than a lease. Redis carries
// out requests on the existing connections. New connections fail at their handshake.
// All requests of the server must take effect.
func repliesSwallowed(t *testing.T) {
	const lease = 2 * time.Second
	d, victim, proxy := beside(harness.RealWorld(t), lease)
	stay := d.members(5)
	late := victim.Dial()
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()
	proxy.DropReplies(true)
	began := time.Now()
	var answer harness.View
	require.NoError(t, json.Unmarshal(late.Call("mesh/join-room", map[string]any{"roomName": "a"}), &answer))
	require.True(t, answer.Success && answer.Stale, "the server cannot know the answer of Redis")
	d.note("a", late.ID, harness.WantedEntry{In: true})
	d.Sleep(time.Until(began.Add(lease + lease/2)))
	proxy.Heal()
	took := d.settles(time.Now(), lease+2*time.Second)
	t.Logf("recovered %v after the network", took.Round(time.Millisecond))
	for i, s := range d.streams {
		for id, times := range s.leaves() {
			require.LessOrEqual(t, len(times), int(victim.Stats().Reregistered), "subscriber %d, %s", i, id)
		}
	}
	joins, leaves := d.streams[0].p.Count("join", late.ID), d.streams[0].p.Count("leave", late.ID)
	require.Equal(t, leaves+1, joins, "the join was retried, and reported once")
	d.stayed(stay[:len(stay)/2])
	d.finish()
}

// delayed delays all data by 50 ms in each direction. No living server may be declared
// dead, and the leaves of a dead server must be reported in time.
func delayed(t *testing.T) {
	const lease, each = 3 * time.Second, 50 * time.Millisecond
	w := harness.RealWorld(t)
	proxy := redistest.Proxy(t, w.Real.Addr())
	d := newDrill(w, 2, []string{"a", "b"}, harness.LeaseOf(lease), through(t, proxy))
	victim := w.Child(harness.ChildConfig{Lease: lease, Redis: proxy.Addr()})
	stay := d.members(5)
	p := victim.Dial()
	d.note("a", p.ID, p.In("a"))
	proxy.Delay(each)
	d.churn(5)
	d.Sleep(lease)
	d.awaitContact()
	victim.Die()
	killed := time.Now()
	d.forget(p)
	for i, s := range d.streams {
		if s.room == "a" {
			// The last heartbeat may have been in flight. Ending an entry takes five
			// calls, and the event is delayed, too.
			d.reportedBy(killed.Add(lease+time.Second+12*each), lease, func() bool { return len(s.leaves()[p.ID]) == 1 }, "subscriber %d receives the leave", i)
		}
	}
	d.stopChurn()
	took := d.settles(time.Now(), 2*time.Second)
	t.Logf("recovered %v after the last call", took.Round(time.Millisecond))
	d.stayed(stay)
	proxy.Heal()
	d.finish()
}
