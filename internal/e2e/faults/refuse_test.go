package faults

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/testhook"
)

var refuseCases = []faultCase{
	{"no replicas for a moment", shortRefusal(harness.NoReplicas, 1800*time.Millisecond, 2*time.Second, 2200*time.Millisecond)},
	{"no replicas for a moment, longer", shortRefusal(harness.NoReplicas, 500*time.Millisecond, 1600*time.Millisecond, 2400*time.Millisecond, 3*time.Second)},
	{"read only for a moment", shortRefusal(harness.ReadOnly, 1500*time.Millisecond, 2500*time.Millisecond)},
	{"memory full", takesNoWrites(harness.MemoryFull, 2*time.Second)},
	{"no replicas", takesNoWrites(harness.NoReplicas, 2*time.Second)},
	{"read only", takesNoWrites(harness.ReadOnly, 0)},
	{"save failed", takesNoWrites(harness.SaveFailed, 0)},
	{"loading", loading},
}

// takesNoWrites makes Redis refuse writes for longer than a lease, and longer than the
// TTL of one room. Clients get errors in time, sockets stay open, and no connection
// that stays is reported as left. Afterwards, all requests have taken effect. If only
// memory is full, leaves and heartbeats still work.
func takesNoWrites(r harness.Refusal, ttl time.Duration) func(t *testing.T) {
	const lease = 2 * time.Second
	full := r.Text == harness.MemoryFull.Text
	return func(t *testing.T) {
		w := harness.RealWorld(t)
		var log testlog.Warnings
		d := newDrill(w, 2, []string{"a", harness.RoomTimed}, harness.LeaseOf(lease), func(o *mesh.Options) { o.Logger = slog.New(&log) })
		for _, s := range d.servers {
			require.NoError(t, harness.TrackTimed(s.Server, ttl))
		}
		stay, gone := d.members(4), d.members(2)
		late, leaver := d.servers[0].Dial(), d.servers[1].Dial()
		d.note("a", leaver.ID, leaver.In("a"))
		d.settles(time.Now(), 5*time.Second)
		d.awaitContact()
		admin := w.Client()
		require.NoError(t, r.Begin(t.Context(), admin))
		began := time.Now()

		refused := func(p *harness.Peer, command string, payload map[string]any) {
			asked := time.Now()
			payload["roomName"] = "a"
			data := p.Call(command, payload)
			if testhook.AnswersFalse(command) {
				require.Equal(t, "false", string(data), command)
			} else {
				var answer harness.View
				require.NoError(t, json.Unmarshal(data, &answer), command)
				require.Equal(t, "EUNAVAILABLE", answer.Code, command)
				require.Equal(t, full, strings.Contains(answer.Error, "storage is full"), answer.Error)
			}
			require.LessOrEqual(t, time.Since(asked), w.Unhurried(2*time.Second+200*time.Millisecond))
		}
		asked := time.Now()
		joined := late.Join("a")
		require.True(t, joined.Stale)
		require.LessOrEqual(t, time.Since(asked), 2*time.Second+200*time.Millisecond)
		d.note("a", late.ID, harness.WantedEntry{In: true})
		refused(stay[0], "mesh/publish-presence-state", map[string]any{"state": json.RawMessage(`{"n":-1}`)})
		d.note("a", stay[0].ID, harness.WantedEntry{In: true, State: `{"n":-1}`})
		if full {
			leaver.Leave("a")
			for _, s := range d.streams[:1] {
				s.p.Expect(time.Second, "leave", leaver.ID)
			}
		} else {
			leaver.Out("a")
		}
		d.forget(leaver)
		for _, p := range gone {
			p.Close()
			d.forget(p)
		}
		w.Sleep(time.Until(began.Add(max(lease, ttl+time.Second) + lease/2)))
		if full {
			for i, s := range d.streams {
				for _, p := range gone {
					s.p.W.Eventually(time.Second, func() bool { return s.p.Count("leave", p.ID) == 1 }, "subscriber %d receives the leave of %s", i, p.ID)
				}
			}
			for _, s := range d.servers {
				require.Less(t, s.Stats().LeaseAge, lease)
			}
		}
		require.NoError(t, r.End(t.Context(), admin))
		took := d.settles(time.Now(), lease+2*time.Second)
		t.Logf("recovered %v after Redis took writes again", took.Round(time.Millisecond))
		d.awaitContact()
		require.Empty(t, d.diff())
		d.stayed(stay)
		for i, s := range d.streams {
			for id, times := range s.leaves() {
				require.Len(t, times, 1, "subscriber %d, %s", i, id)
			}
		}
		for _, s := range d.servers {
			require.Zero(t, s.Stats().Reregistered)
		}
		for _, p := range append(stay, late, leaver) {
			p.Call("mesh/noop", map[string]any{}) // the socket is open
		}
		require.Contains(t, strings.Join(log.Texts(), "\n"), r.Text)
		d.finish()
	}
}

// loading restarts Redis with so much data that it loads for longer than a lease.
func loading(t *testing.T) {
	const lease, keys = 2 * time.Second, 2100
	w := harness.RealWorld(t, redistest.WithRDB(), redistest.Args("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"))
	require.NoError(t, redistest.Fill(t.Context(), w.Client(), keys))
	var log testlog.Warnings
	d := newDrill(w, 2, []string{"a", "b"}, harness.LeaseOf(lease), func(o *mesh.Options) { o.Logger = slog.New(&log) })
	stay, gone := d.members(5), d.members(2)
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()
	require.NoError(t, w.Client().Save(t.Context()).Err())
	for _, p := range gone { // the saved data still has them
		p.Close()
		d.forget(p)
	}
	d.settles(time.Now(), 2*time.Second)
	began := time.Now()
	w.Real.Restart(false)
	loaded := time.Now()
	require.Greater(t, loaded.Sub(began), lease)
	took := d.settles(loaded, lease+2*time.Second)
	t.Logf("loaded in %v, recovered %v later", loaded.Sub(began).Round(time.Millisecond), took.Round(time.Millisecond))
	d.awaitContact()
	d.stayed(stay)
	require.Contains(t, strings.Join(log.Texts(), "\n"), "LOADING")
	d.finish()
}

// shortRefusal makes Redis refuse writes several times. Each time is too short to end
// the contact of a server, and most are longer than a key lives. No connection with
// signs of life may be reported as left, and the time limits must hold afterwards.
func shortRefusal(r harness.Refusal, lengths ...time.Duration) func(t *testing.T) {
	return func(t *testing.T) {
		w := harness.RealWorld(t)
		refuseShortly(newAppConns(w, "app", 3, 20, 10*time.Second), w.Client(), r, lengths...)
	}
}

// refuseShortly makes the Redis of admin refuse writes for each of the lengths.
func refuseShortly(c *appConns, admin redis.UniversalClient, r harness.Refusal, lengths ...time.Duration) {
	w, ctx := c.w, c.w.T.Context()
	for _, away := range lengths {
		c.awaitContact()
		before := c.leaves()
		c.starved()
		require.NoError(w.T, r.Begin(ctx, admin))
		w.Sleep(away)
		require.NoError(w.T, r.End(ctx, admin))
		w.Sleep(1500 * time.Millisecond)
		if c.starved() {
			w.T.Logf("after %v: the machine is too busy, nothing is checked", away)
			continue
		}
		require.Equal(w.T, before, c.leaves(), "after %v", away)
	}
	c.awaitContact()
	c.checkBounds(testhook.PartsOf(c.servers[0].Server).LeaseTTL)
}

// A cluster node refuses writes for longer than a lease. Another node has the leases,
// so all servers stay in contact.
func TestClusterNodeRefusesWrites(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	w := harness.OwnCluster(t)
	admin := w.Client().(*redis.ClusterClient)
	leases, err := admin.MasterForKey(t.Context(), w.Keys().Instances())
	require.NoError(t, err)
	for i := 0; ; i++ {
		room := fmt.Sprint("room", i)
		node, err := admin.MasterForKey(t.Context(), w.Keys().Members(room))
		require.NoError(t, err)
		if node.Options().Addr == leases.Options().Addr {
			continue
		}
		lacksReplicas := harness.Refusal{Begin: harness.Configured("min-replicas-to-write", "9"), End: harness.Configured("min-replicas-to-write", "0")}
		refuseShortly(newAppConns(w, room, 3, 20, 4*time.Second), node, lacksReplicas, 1800*time.Millisecond, 2*time.Second, 6*time.Second)
		return
	}
}
