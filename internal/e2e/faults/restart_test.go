package faults

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

var restartCases = []faultCase{
	{"redis restarted empty", restart{}.run},
	{"redis restarted, rolled back", restart{rdb: true}.run},
	{"redis restarted, nothing lost", restart{aof: true}.run},
	{"flushall", flushAll},
}

// restart kills Redis and starts it again with its saved data.
type restart struct {
	rdb bool // from a dump that is some time old
	aof bool // from the append-only file, which has every write
}

func (r restart) run(t *testing.T) {
	const lease = 2 * time.Second
	var opts []redistest.Option
	if r.rdb {
		opts = append(opts, redistest.WithRDB())
	}
	if r.aof {
		opts = append(opts, redistest.WithAOF())
	}
	w := harness.RealWorld(t, opts...)
	d := newDrill(w, 2, []string{"a", "b"}, harness.LeaseOf(lease))
	stay, before, during := d.members(5), d.members(2), d.members(2)
	d.churn(3)
	d.Sleep(300 * time.Millisecond)
	if r.rdb {
		require.NoError(t, w.Client().Save(t.Context()).Err())
	}
	// A rollback loses the following leaves and joins.
	for _, p := range before {
		p.Close()
		d.forget(p)
	}
	stay = append(stay, d.members(3)...)
	d.Sleep(time.Second)
	d.awaitContact()
	w.Real.Kill()
	for _, p := range during {
		p.Close()
		d.forget(p)
	}
	d.Sleep(lease / 2)
	w.Real.Restart(false)
	back := time.Now()
	d.Sleep(lease / 4)
	d.stopChurn()
	// Unconfirmed members are reported as left after LeaseTTL + 1 s.
	took := d.settles(back, 2*lease+2*time.Second)
	t.Logf("recovered %v after Redis was back", took.Round(time.Millisecond))
	d.awaitContact()
	d.Sleep(lease)
	require.Empty(t, d.diff())
	d.stayed(stay)
	d.finish()
}

// flushAll deletes all keys under load. All members must be in Redis again within a
// heartbeat, and no connection that stays is reported as left.
func flushAll(t *testing.T) {
	const lease = 3 * time.Second
	w := harness.RealWorld(t)
	d := newDrill(w, 2, []string{"a", "b"}, harness.LeaseOf(lease))
	stay := d.members(25)
	d.churn(10)
	d.Sleep(500 * time.Millisecond)
	d.awaitContact()
	require.NoError(t, w.Client().FlushAll(t.Context()).Err())
	flushed := time.Now()
	complete := func() bool {
		n := 0
		for _, room := range d.rooms {
			now, err := d.servers[0].InRedis(room)
			require.NoError(t, err)
			for _, p := range stay {
				if _, ok := now[p.ID]; ok {
					n++
				}
			}
		}
		return n == len(stay)
	}
	d.Eventually(lease/3+500*time.Millisecond, complete, "all members are in Redis")
	took := time.Since(flushed)
	d.stopChurn()
	settled := d.settles(flushed, lease+2*time.Second)
	t.Logf("LeaseTTL %v: all %d members back %v after FLUSHALL, subscribers recovered %v after it", lease, len(stay),
		took.Round(time.Millisecond), settled.Round(time.Millisecond))
	d.awaitContact()
	d.Sleep(lease / 3)
	require.Empty(t, d.diff())
	d.stayed(stay)
	d.finish()
}
