package faults

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/testhook"
)

// behind counts the entries that Redis lacks or has with another state.
func (d *switchDrill) behind() int {
	n := 0
	for room, want := range d.wanted() {
		now, err := d.servers[0].InRedis(room)
		require.NoError(d.T, err)
		for id, state := range want {
			if got, ok := now[id]; !ok || got != state {
				n++
			}
		}
	}
	return n
}

// recovers waits until Redis and the streams have recovered, and returns both times
// since the switch.
func (d *switchDrill) recovers(since time.Time) (redis, streams time.Duration) {
	d.T.Helper()
	want := d.wanted()
	var wrong string
	for redis == 0 || streams == 0 {
		if redis == 0 {
			if wrong = d.redisDiff(want) + d.metaInRedis(); wrong == "" {
				redis = time.Since(since)
			}
		}
		if streams == 0 && redis != 0 {
			if wrong = d.streamsDiff(want) + d.metaShown(); wrong == "" {
				streams = time.Since(since)
			}
		}
		if wrong != "" && time.Since(since) > d.Unhurried(sentinelBound) {
			d.checkStreams()
			for i, s := range d.servers {
				d.T.Logf("server %d: hub %+v; local %+v", i, testhook.PartsOf(s.Server).Hub.Stats(), testhook.PartsOf(s.Server).Local.Stats())
			}
			require.FailNow(d.T, "no recovery within "+sentinelBound.String(), wrong)
		}
		d.Sleep(10 * time.Millisecond)
	}
	return redis, streams
}

// metaInRedis compares the metadata of markers in Redis, in the rooms and by
// connection, with the expected one.
func (d *switchDrill) metaInRedis() string {
	for _, room := range d.rooms {
		members, err := d.servers[0].Presence().Members(d.T.Context(), room)
		if err != nil {
			return err.Error()
		}
		if diff := d.metaOf(room, members); diff != "" {
			return "Redis, " + diff
		}
	}
	for _, m := range d.markers {
		for _, s := range d.servers {
			if s == m.on || m.meta == "" {
				continue
			}
			if got, err := s.Connections().Metadata(d.T.Context(), m.ID); err != nil || string(got) != m.meta {
				return fmt.Sprintf("connection %s has metadata %s (%v), not %s", m.ID, got, err, m.meta)
			}
			break
		}
	}
	return ""
}

// metaShown compares the metadata of markers in new snapshots with the expected one.
func (d *switchDrill) metaShown() string {
	for i, s := range d.servers {
		p := s.Dial()
		defer p.Close()
		for _, room := range d.rooms {
			var members []mesh.Member
			shown := p.Subscribe(room)
			require.NoError(d.T, json.Unmarshal(shown.Present, &members))
			if diff := d.metaOf(room, members); diff != "" {
				return fmt.Sprintf("server %d, %s", i, diff)
			}
		}
	}
	return ""
}

func (d *switchDrill) metaOf(room string, members []mesh.Member) string {
	has := make(map[string]string, len(members))
	for _, m := range members {
		has[m.ID] = string(m.Metadata)
	}
	for _, m := range d.markers {
		if m.room == room && m.meta != "" && has[m.ID] != m.meta {
			return fmt.Sprintf("%s: %s has metadata %s, not %s", room, m.ID, has[m.ID], m.meta)
		}
	}
	return ""
}

// expires waits until the new master sends expired events and every server receives
// them.
func (d *switchDrill) expires(sw redistest.Switch) {
	d.T.Helper()
	const setting = "notify-keyspace-events"
	admin := sw.To.Client(d.T)
	d.Eventually(time.Until(sw.Announced.Add(sentinelBound)), func() bool {
		set, err := admin.ConfigGet(d.T.Context(), setting).Result()
		require.NoError(d.T, err)
		for _, s := range d.servers {
			if !s.Stats().ExpiredEventsWorking {
				return false
			}
		}
		return strings.Contains(set[setting], "E") && strings.ContainsAny(set[setting], "xA")
	}, "expired events of the new master")
}

// checkTTL checks that the entries of a killed server end with their TTL.
func (d *switchDrill) checkTTL() {
	const lease, ttl = 10 * time.Second, 2 * time.Second
	victim := d.Child(harness.ChildConfig{Lease: lease, TTL: ttl, Events: true})
	p := victim.Dial()
	d.note("a", p.ID, p.In("a"))
	d.settles(time.Now(), 2*time.Second)
	p.Call("mesh/noop", map[string]any{})
	killed := time.Now()
	victim.Die()
	d.forget(p)
	took := d.settles(killed, ttl+2*time.Second)
	d.T.Logf("an entry of a killed server left after %v", ms(took))
}

// checkVisits checks that every subscriber received one join and one leave of every
// visit. If a visit overlaps with the switch, both may be missing or repeated. The
// order of each stream and its result are checked elsewhere.
func (d *switchDrill) checkVisits(sw redistest.Switch, calm time.Time) {
	d.T.Helper()
	exact := 0
	for i, s := range d.streams {
		leaves, joins := s.leaves(), s.times("join")
		for _, v := range d.visits {
			if v.room != s.room {
				continue
			}
			require.Len(d.T, joins[v.id], len(leaves[v.id]), "subscriber %d, %s: joins and leaves", i, v.id)
			if v.gone.Add(time.Second).Before(sw.Began) || v.came.After(calm) {
				exact++
				require.Len(d.T, leaves[v.id], 1, "subscriber %d, %s", i, v.id)
			}
		}
	}
	require.Positive(d.T, exact)
}

// count returns the number of updates.
func (s *stream) count() int {
	n := 0
	for _, u := range s.p.Got() {
		if u.RoomName == s.room {
			n++
		}
	}
	return n
}
