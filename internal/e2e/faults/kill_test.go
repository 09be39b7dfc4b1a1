package faults

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

// killCase kills a server process with connections in a room.
type killCase struct {
	lease, ttl time.Duration
	events     bool // EnablePresenceExpirationEvents
	keys       int  // number of other keys with a TTL
	byTTL      bool // the leaves come with the TTL, not with the lease
}

var killCases = []faultCase{
	{"killed/ttl, few keys", killCase{lease: 10 * time.Second, ttl: 2 * time.Second, events: true, byTTL: true}.run},
	{"killed/ttl, 100,000 keys", killCase{lease: 3 * time.Second, ttl: 2 * time.Second, events: true, keys: 100_000}.run},
	{"killed", killCase{lease: 3 * time.Second, events: true}.run},
	{"killed/no expired events, 100,000 keys", killCase{lease: 3 * time.Second, keys: 100_000}.run},
	{"silent", silentCase(0)},
	{"silent/100,000 keys", silentCase(100_000)},
}

// run kills one of three servers with 200 connections in total. Each subscriber on the
// other servers must receive each leave once, in time.
func (c killCase) run(t *testing.T) {
	w := harness.RealWorld(t)
	require.NoError(t, redistest.Fill(t.Context(), w.Client(), c.keys))
	d := newDrill(w, 2, []string{"lobby"}, func(o *mesh.Options) {
		o.LeaseTTL, o.EnablePresenceExpirationEvents = c.lease, &c.events
	})
	for _, s := range d.servers {
		s.Track(".*", mesh.PresenceOptions{TTL: c.ttl})
		d.streams = append(d.streams, follow(s.Dial(), "lobby"))
	}
	victim := w.Child(harness.ChildConfig{Lease: c.lease, TTL: c.ttl, Events: c.events})
	stay := d.members(40)
	gone := make([]*harness.Peer, 120)
	for i := range gone {
		gone[i] = victim.Dial()
		d.note("lobby", gone[i].ID, gone[i].In("lobby"))
	}
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()
	for _, p := range gone { // so that each connection's silence begins at the kill
		p.Call("mesh/noop", map[string]any{})
	}
	killed := time.Now()
	victim.Die()
	for _, p := range gone {
		d.note("lobby", p.ID, harness.WantedEntry{})
	}
	score, err := w.Client().ZScore(t.Context(), "mesh:instances", victim.Incarnation).Result()
	require.NoError(t, err, "lease of the killed server")
	renewed := time.UnixMilli(int64(score)).Add(-c.lease)
	bound := renewed.Add(c.lease + time.Second)
	if c.byTTL {
		// Redis deletes the key TTL + 1 s after its last refresh. It looks for expired
		// keys every 0.1 s on a machine with time to spare. A server with an expired
		// hint lets the owner act first, for 0.8 s.
		bound = killed.Add(c.ttl + 2500*time.Millisecond)
	}
	d.settles(killed, time.Until(bound)+5*time.Second)
	w.Sleep(500 * time.Millisecond) // time for unexpected updates

	first, last := time.Time{}, time.Time{}
	for i, s := range d.streams {
		leaves := s.leaves()
		require.Len(t, leaves, len(gone), "subscriber %d", i)
		for _, p := range gone {
			times := leaves[p.ID]
			require.Len(t, times, 1, "subscriber %d, %s", i, p.ID)
			if first.IsZero() || times[0].Before(first) {
				first = times[0]
			}
			if times[0].After(last) {
				last = times[0]
			}
		}
	}
	t.Logf("LeaseTTL %v, TTL %v, %d other keys: leaves %v to %v after the kill, %v after the last renewal",
		c.lease, c.ttl, c.keys, first.Sub(killed).Round(time.Millisecond), last.Sub(killed).Round(time.Millisecond),
		last.Sub(renewed).Round(time.Millisecond))
	require.False(t, last.After(bound), "%v late", last.Sub(bound))
	d.stayed(stay)
	d.finish()
}

// silentCase lets connections with a TTL fall silent on a living server.
func silentCase(keys int) func(t *testing.T) {
	const ttl = 2 * time.Second
	return func(t *testing.T) {
		w := harness.RealWorld(t)
		require.NoError(t, redistest.Fill(t.Context(), w.Client(), keys))
		d := newDrill(w, 2, []string{"lobby"}, harness.LeaseOf(3*time.Second))
		for _, s := range d.servers {
			s.Track(".*", mesh.PresenceOptions{TTL: ttl})
		}
		stay, mute := d.members(10), d.members(10)
		d.settles(time.Now(), 5*time.Second)
		for _, p := range mute {
			p.Mute()
		}
		began := time.Now()
		for _, p := range mute {
			p.Call("mesh/noop", map[string]any{}) // the last sign of life
			d.note("lobby", p.ID, harness.WantedEntry{})
		}
		d.settles(began, ttl+5*time.Second)
		w.Sleep(500 * time.Millisecond) // time for unexpected updates
		var first, last time.Duration
		for _, s := range d.streams {
			leaves := s.leaves()
			require.Len(t, leaves, len(mute))
			for id, times := range leaves {
				require.Len(t, times, 1, id)
				took := times[0].Sub(began)
				if first == 0 || took < first {
					first = took
				}
				last = max(last, took)
			}
		}
		t.Logf("TTL %v, owner alive, %d other keys: leaves %v to %v after the last frame",
			ttl, keys, first.Round(time.Millisecond), last.Round(time.Millisecond))
		require.GreaterOrEqual(t, first, ttl)
		require.LessOrEqual(t, last, w.Unhurried(ttl+time.Second))
		d.stayed(stay)
		d.finish()
	}
}
