package attack

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
)

// TestReconnectsWhileRedisIsAway: clients that come and go while nothing can
// be written are let go, but for those whose writing has begun: a batch at a
// time. When Redis is back it holds nothing of any.
func TestReconnectsWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Long(t, "an outage in real time")
	f := newFort(t, harness.ChildConfig{})
	if f.real == nil {
		t.Skip("needs a redis-server to stop")
	}
	keys := f.lasting()
	before := f.ask("/gauge?reset")
	f.real.Pause()
	paused := true
	defer func() {
		if paused {
			f.real.Resume()
		}
	}()
	const attempts, workers = 1000, 50
	f.each(workers, func(int) error {
		for range attempts / workers {
			e, _, err := tryEnemy(f.t, f.Addr)
			if err != nil {
				return err
			}
			if err := e.text(`{"id":1,` + body("join-room", "away", "") + `}`); err != nil {
				return err
			}
			e.gone()
		}
		return nil
	})
	// What a batch has been tried with has to be ended, and a second one may
	// have been begun; the rest goes when the next attempt has failed.
	var g harness.Gauged
	f.within(patience, func() bool { g = f.gauge(); return g.Stats.Connections <= 2+2*store.MaxOps }, "they are let go: %+v", &g.Stats)
	t.Logf("%d connections kept of %d that came, heap grew by %s at most", g.Stats.Connections-2, attempts, kib(g.Peak-before.Bytes))
	assert.LessOrEqual(t, g.Peak-before.Bytes, int64(attempts*16<<10+spare))
	f.real.Resume()
	paused = false
	f.within(30*time.Second, func() bool {
		g = f.gauge()
		return g.Stats.Connections == 2 && g.Stats.Entries == 1 && g.Goroutines <= before.Goroutines+2
	}, "all are gone")
	f.within(30*time.Second, func() bool {
		now := f.lasting()
		return len(now) == len(keys)
	}, "nothing is left in Redis: before %q", keys)
	f.pair.speak(20, nil)
	require.NoError(t, f.pair.err, "and the neighbours go on")
}
