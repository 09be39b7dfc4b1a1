package attack

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
)

// TestReconnectsWhileRedisIsAway checks that a server does not keep clients that
// connect and leave while Redis answers nothing, except for those in a batch that was
// sent. When Redis is back, it must have no keys of any of them.
func TestReconnectsWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Long(t, "an outage in real time")
	f := newTarget(t, harness.ChildConfig{})
	if f.real == nil {
		t.Skip("needs a redis-server to stop")
	}
	keys := f.permanentKeys()
	before := f.getGauge("/gauge?reset")
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
			e, _, err := tryDial(f.t, f.Addr)
			if err != nil {
				return err
			}
			if err := e.text(`{"id":1,` + body("join-room", "away", "") + `}`); err != nil {
				return err
			}
			e.drop()
		}
		return nil
	})
	// The first batch was sent, so its connections have to be ended in Redis. A second
	// batch may have been sent, too. The other connections are removed when the next
	// attempt has failed.
	var g harness.Gauged
	f.within(timeLimit, func() bool { g = f.gauge(); return g.Stats.Connections <= 2+2*store.MaxOps }, "the connections are removed: %+v", &g.Stats)
	t.Logf("%d of %d connections kept, heap grew by %s at most", g.Stats.Connections-2, attempts, kib(g.Peak-before.Bytes))
	assert.LessOrEqual(t, g.Peak-before.Bytes, int64(attempts*16<<10+spare))
	f.real.Resume()
	paused = false
	f.within(30*time.Second, func() bool {
		g = f.gauge()
		return g.Stats.Connections == 2 && g.Stats.Entries == 1 && g.Goroutines <= before.Goroutines+2
	}, "all connections are gone")
	f.within(30*time.Second, func() bool {
		now := f.permanentKeys()
		return len(now) == len(keys)
	}, "nothing is left in Redis: before %q", keys)
	f.pair.publish(20, nil)
	require.NoError(t, f.pair.err, "the neighbours are served")
}
