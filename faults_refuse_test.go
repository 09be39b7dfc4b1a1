package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// refusal is a Redis that answers and takes no writes.
type refusal struct {
	text       string // in its errors
	begin, end func(ctx context.Context, admin redis.UniversalClient) error
}

var (
	memoryFull = refusal{"OOM", configured("maxmemory", "1"), configured("maxmemory", "0")}
	noReplicas = refusal{"NOREPLICAS", configured("min-replicas-to-write", "1"), configured("min-replicas-to-write", "0")}
	readOnly   = refusal{"READONLY", replicaOf("127.0.0.1", "1"), replicaOf("NO", "ONE")}
	saveFailed = refusal{"MISCONF", saveFails, configured("stop-writes-on-bgsave-error", "no")}
)

func configured(name, value string) func(context.Context, redis.UniversalClient) error {
	return func(ctx context.Context, admin redis.UniversalClient) error {
		return admin.ConfigSet(ctx, name, value).Err()
	}
}

// replicaOf makes Redis the replica of somebody, who is not there.
func replicaOf(host, port string) func(context.Context, redis.UniversalClient) error {
	return func(ctx context.Context, admin redis.UniversalClient) error {
		return admin.Do(ctx, "REPLICAOF", host, port).Err()
	}
}

// saveFails makes saving fail, on which Redis takes no more writes: something
// that is not a file stands where the dump should be.
func saveFails(ctx context.Context, admin redis.UniversalClient) error {
	dir, err := admin.ConfigGet(ctx, "dir").Result()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir["dir"], "dump.rdb", "in the way"), 0o700); err != nil {
		return err
	}
	if err := admin.ConfigSet(ctx, "save", "86400 1000000").Err(); err != nil {
		return err
	}
	if err := admin.BgSave(ctx).Err(); err != nil {
		return err
	}
	for {
		info, err := admin.Info(ctx, "persistence").Result()
		if err != nil || strings.Contains(info, "rdb_last_bgsave_status:err") {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

var refuseCases = []faultCase{
	{"no replicas for a moment", shortRefusal(noReplicas, 1800*time.Millisecond, 2*time.Second, 2200*time.Millisecond)},
	{"no replicas for a moment, longer", shortRefusal(noReplicas, 500*time.Millisecond, 1600*time.Millisecond, 2400*time.Millisecond, 3*time.Second)},
	{"read only for a moment", shortRefusal(readOnly, 1500*time.Millisecond, 2500*time.Millisecond)},
	{"memory full", takesNoWrites(memoryFull, 2*time.Second)},
	{"no replicas", takesNoWrites(noReplicas, 2*time.Second)},
	{"read only", takesNoWrites(readOnly, 0)},
	{"save failed", takesNoWrites(saveFailed, 0)},
	{"loading", loading},
}

// takesNoWrites: Redis refuses what is written for longer than a lease and than
// the TTL of one room, if that has one. Clients are told in time, sockets stay, nobody is told to have left
// who has not, and afterwards everything is as asked. Where only memory is
// short, who leaves leaves, and the leases go on.
func takesNoWrites(r refusal, ttl time.Duration) func(t *testing.T) {
	const lease = 2 * time.Second
	full := r.text == memoryFull.text
	return func(t *testing.T) {
		w := realWorld(t)
		var log warnings
		d := newDrill(w, 2, []string{"a", roomTimed}, leaseOf(lease), func(o *Options) { o.Logger = slog.New(&log) })
		for _, s := range d.servers {
			require.NoError(t, s.trackTimed(ttl))
		}
		stay, gone := d.members(4), d.members(2)
		late, leaver := d.servers[0].dial(), d.servers[1].dial()
		d.note("a", leaver.id, leaver.in("a"))
		d.settles(time.Now(), 5*time.Second)
		d.patient()
		admin := w.client()
		require.NoError(t, r.begin(t.Context(), admin))
		began := time.Now()

		refused := func(p *peer, command string, payload map[string]any) {
			asked := time.Now()
			payload["roomName"] = "a"
			var answer view
			require.NoError(t, json.Unmarshal(p.call(command, payload), &answer), command)
			require.Equal(t, codeUnavailable, answer.Code, command)
			require.Equal(t, full, strings.Contains(answer.Error, "storage is full"), answer.Error)
			require.LessOrEqual(t, time.Since(asked), 2*time.Second+200*time.Millisecond)
		}
		refused(late, "mesh/join-room", map[string]any{})
		d.note("a", late.id, wish{in: true})
		refused(stay[0], "mesh/publish-presence-state", map[string]any{"state": json.RawMessage(`{"n":-1}`)})
		d.note("a", stay[0].id, wish{in: true, state: `{"n":-1}`})
		if full {
			leaver.leave("a")
			for _, s := range d.streams[:1] {
				s.p.expect(time.Second, "leave", leaver.id)
			}
		} else {
			leaver.out("a")
		}
		d.forget(leaver)
		for _, p := range gone {
			p.close()
			d.forget(p)
		}
		w.sleep(time.Until(began.Add(max(lease, ttl+time.Second) + lease/2)))
		if full {
			for i, s := range d.streams {
				for _, p := range gone {
					s.p.w.eventually(time.Second, func() bool { return s.p.count("leave", p.id) == 1 }, "subscriber %d is told of %s", i, p.id)
				}
			}
			for _, s := range d.servers {
				require.Less(t, s.Stats().LeaseAge, lease)
			}
		}
		require.NoError(t, r.end(t.Context(), admin))
		took := d.settles(time.Now(), lease+2*time.Second)
		t.Logf("as it should be %v after Redis took writes again", took.Round(time.Millisecond))
		d.patient()
		require.Empty(t, d.state())
		d.stayed(stay)
		for i, s := range d.streams {
			for id, times := range s.leaves() {
				require.Len(t, times, 1, "subscriber %d, %s", i, id)
			}
		}
		for _, s := range d.servers {
			require.Zero(t, s.Stats().Reborn)
		}
		for _, p := range append(stay, late, leaver) {
			p.call("mesh/noop", map[string]any{}) // its socket stands
		}
		require.Contains(t, strings.Join(log.texts(), "\n"), r.text)
		d.over()
	}
}

// loading: Redis has been restarted and is still reading what it had saved, for
// longer than a lease.
func loading(t *testing.T) {
	const lease, keys = 2 * time.Second, 2100
	w := realWorld(t, redistest.WithRDB(), redistest.Args("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"))
	require.NoError(t, redistest.Fill(t.Context(), w.client(), keys))
	var log warnings
	d := newDrill(w, 2, []string{"a", "b"}, leaseOf(lease), func(o *Options) { o.Logger = slog.New(&log) })
	stay, gone := d.members(5), d.members(2)
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	require.NoError(t, w.client().Save(t.Context()).Err())
	for _, p := range gone { // Redis goes back to when they were there
		p.close()
		d.forget(p)
	}
	d.settles(time.Now(), 2*time.Second)
	began := time.Now()
	w.real.Restart(false)
	loaded := time.Now()
	require.Greater(t, loaded.Sub(began), lease)
	took := d.settles(loaded, lease+2*time.Second)
	t.Logf("loaded in %v, as it should be %v later", loaded.Sub(began).Round(time.Millisecond), took.Round(time.Millisecond))
	d.patient()
	d.stayed(stay)
	require.Contains(t, strings.Join(log.texts(), "\n"), "LOADING")
	d.over()
}

// shortRefusal: Redis takes no writes several times, each too short for any server
// to lose its patience, and most of them longer than a key lives. No connection that
// shows life is reported as left, and afterwards the bounds hold.
func shortRefusal(r refusal, lengths ...time.Duration) func(t *testing.T) {
	return func(t *testing.T) {
		w := realWorld(t)
		refuseShortly(newMob(w, "mob", 3, 20, 10*time.Second), w.client(), r, lengths...)
	}
}

// refuseShortly has the Redis that admin leads to take no writes, several times.
func refuseShortly(c *mob, admin redis.UniversalClient, r refusal, lengths ...time.Duration) {
	w, ctx := c.w, c.w.t.Context()
	for _, away := range lengths {
		c.patient()
		before := c.leaves()
		c.starved()
		require.NoError(w.t, r.begin(ctx, admin))
		w.sleep(away)
		require.NoError(w.t, r.end(ctx, admin))
		w.sleep(1500 * time.Millisecond)
		if c.starved() {
			w.t.Logf("after %v: the machine has no processor to spare, nothing is checked", away)
			continue
		}
		require.Equal(w.t, before, c.leaves(), "after %v", away)
	}
	c.patient()
	c.bounds(c.servers[0].n.opts.LeaseTTL)
}

// A node of a cluster takes no writes, for longer than a lease too, while the
// leases are kept by another one, so that no server loses its patience.
func TestClusterNodeRefusesWrites(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes real seconds")
	}
	w := ownCluster(t)
	admin := w.client().(*redis.ClusterClient)
	leases, err := admin.MasterForKey(t.Context(), w.keys().Instances())
	require.NoError(t, err)
	for i := 0; ; i++ {
		room := fmt.Sprint("room", i)
		node, err := admin.MasterForKey(t.Context(), w.keys().Members(room))
		require.NoError(t, err)
		if node.Options().Addr == leases.Options().Addr {
			continue
		}
		lacksReplicas := refusal{begin: configured("min-replicas-to-write", "9"), end: configured("min-replicas-to-write", "0")}
		refuseShortly(newMob(w, room, 3, 20, 4*time.Second), node, lacksReplicas, 1800*time.Millisecond, 2*time.Second, 6*time.Second)
		return
	}
}
