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

// restart is a Redis that is killed and started again with what it had saved.
type restart struct {
	rdb bool // some time ago
	aof bool // everything
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
	// What happens now is lost with a roll-back: some leave, some join.
	for _, p := range before {
		p.Close()
		d.forget(p)
	}
	stay = append(stay, d.members(3)...)
	d.Sleep(time.Second)
	d.patient()
	w.Real.Kill()
	for _, p := range during {
		p.Close()
		d.forget(p)
	}
	d.Sleep(lease / 2)
	w.Real.Restart(false)
	back := time.Now()
	d.Sleep(lease / 4)
	d.calm()
	// Members in doubt are told to have left after LeaseTTL + 1 s.
	took := d.settles(back, 2*lease+2*time.Second)
	t.Logf("as it should be %v after Redis was back", took.Round(time.Millisecond))
	d.patient()
	d.Sleep(lease)
	require.Empty(t, d.state())
	d.stayed(stay)
	d.over()
}

// flushAll: everything is deleted under load. The roster is complete within a
// heartbeat, and no leave is told of who stayed.
func flushAll(t *testing.T) {
	const lease = 3 * time.Second
	w := harness.RealWorld(t)
	d := newDrill(w, 2, []string{"a", "b"}, harness.LeaseOf(lease))
	stay := d.members(25)
	d.churn(10)
	d.Sleep(500 * time.Millisecond)
	d.patient()
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
	d.Eventually(lease/3+500*time.Millisecond, complete, "full roster")
	took := time.Since(flushed)
	d.calm()
	settled := d.settles(flushed, lease+2*time.Second)
	t.Logf("LeaseTTL %v: all %d back %v after FLUSHALL, subscribers in order %v after it", lease, len(stay),
		took.Round(time.Millisecond), settled.Round(time.Millisecond))
	d.patient()
	d.Sleep(lease / 3)
	require.Empty(t, d.state())
	d.stayed(stay)
	d.over()
}
