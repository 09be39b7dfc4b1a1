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

// beside returns a drill of one server, and another one in it that reaches
// Redis through a proxy and has subscribers of its own.
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

// halfOpened: every connection that a server has to Redis is dead one way, and
// nothing says so: no end, no reset, no refusal. New ones are whole. It finds
// out by itself. What it sends goes on arriving where only the answers are lost,
// so then nobody takes it for dead.
func halfOpened(half redistest.Half) func(t *testing.T) {
	const lease = 2 * time.Second
	return func(t *testing.T) {
		d, victim, proxy := beside(harness.RealWorld(t), lease)
		stay := d.members(5)
		d.churn(5)
		d.patient()
		require.Positive(t, proxy.Connections())
		proxy.HalfOpen(half)
		began := time.Now()
		d.Sleep(lease / 4) // under load
		d.calm()
		// Found out after two seconds without an own beat; or the lease runs
		// out over dead connections, and it begins anew.
		took := d.settles(began, 2*(lease+time.Second))
		t.Logf("as it should be %v after the connections were half open", took.Round(time.Millisecond))
		if half == redistest.Replies {
			require.Zero(t, victim.Stats().Reregistered)
			d.stayed(stay)
		}
		d.over()
	}
}

// requestsSwallowed: nothing that a server sends arrives, although Redis's
// events still reach it. It is taken for dead, each leave is told once, and
// when it gets through again everybody is back.
func requestsSwallowed(t *testing.T) {
	const lease = 2 * time.Second
	d, victim, proxy := beside(harness.RealWorld(t), lease)
	stay := d.members(5)
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	others := &drill{World: d.World, servers: d.servers[:1]}
	proxy.DropRequests(true)
	began := time.Now()
	hers := stay[len(stay)/2:] // of the last server
	for _, p := range hers {
		for _, s := range d.streams[:len(d.rooms)] {
			if _, in := d.want[s.room][p.ID]; in {
				others.toldBy(began.Add(lease+time.Second), lease, func() bool { return len(s.leaves()[p.ID]) == 1 },
					"%s is told that %s left", s.room, p.ID)
			}
		}
	}
	proxy.Heal()
	took := d.settles(time.Now(), lease+3*time.Second)
	t.Logf("back %v after the network", took.Round(time.Millisecond))
	require.EqualValues(t, 1, victim.Stats().Reregistered)
	for i, s := range d.streams[:len(d.rooms)] {
		for id, times := range s.leaves() {
			require.Len(t, times, 1, "subscriber %d, %s", i, id)
		}
	}
	d.stayed(stay[:len(stay)/2])
	d.over()
}

// repliesSwallowed: what a server sends is carried out, as far as it goes over
// connections that it has (new ones do not get beyond their greeting), and it
// learns nothing of it for longer than a lease. What it asked for holds.
func repliesSwallowed(t *testing.T) {
	const lease = 2 * time.Second
	d, victim, proxy := beside(harness.RealWorld(t), lease)
	stay := d.members(5)
	late := victim.Dial()
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	proxy.DropReplies(true)
	began := time.Now()
	var answer harness.View
	require.NoError(t, json.Unmarshal(late.Call("mesh/join-room", map[string]any{"roomName": "a"}), &answer))
	require.True(t, answer.Success && answer.Stale, "here nobody knows")
	d.note("a", late.ID, harness.Wish{In: true})
	d.Sleep(time.Until(began.Add(lease + lease/2)))
	proxy.Heal()
	took := d.settles(time.Now(), lease+2*time.Second)
	t.Logf("as it should be %v after the network", took.Round(time.Millisecond))
	for i, s := range d.streams {
		for id, times := range s.leaves() {
			require.LessOrEqual(t, len(times), int(victim.Stats().Reregistered), "subscriber %d, %s", i, id)
		}
	}
	joins, leaves := d.streams[0].p.Count("join", late.ID), d.streams[0].p.Count("leave", late.ID)
	require.Equal(t, leaves+1, joins, "its join was tried again and again, and told once")
	d.stayed(stay[:len(stay)/2])
	d.over()
}

// delayed: everything takes a tenth of a second, there and back. Presence works, nobody
// is taken for dead, and who is dead is noticed in time.
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
	d.patient()
	victim.Die()
	killed := time.Now()
	d.forget(p)
	for i, s := range d.streams {
		if s.room == "a" {
			// The last renewal may have been under way. Each of the five calls that
			// end an entry, and the telling of it, takes as long as it takes.
			d.toldBy(killed.Add(lease+time.Second+12*each), lease, func() bool { return len(s.leaves()[p.ID]) == 1 }, "subscriber %d is told", i)
		}
	}
	d.calm()
	took := d.settles(time.Now(), 2*time.Second)
	t.Logf("as it should be %v after the last call", took.Round(time.Millisecond))
	d.stayed(stay)
	proxy.Heal()
	d.over()
}
