package attack

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// target is a server process under attack, with two other clients, the neighbours.
type target struct {
	*harness.Child
	t     testing.TB
	redis *redis.Client
	real  *redistest.Server // nil if Redis is embedded
	web   *http.Client
	pair  *neighbours
	base  harness.Gauged
	keys  []string  // keys in Redis before the attack
	alone latencies // of the neighbours before the attack
}

// newTarget starts a server with its own Redis, and connects two neighbours.
func newTarget(t testing.TB, conf harness.ChildConfig) *target {
	t.Helper()
	f := &target{t: t, web: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}}
	if redistest.Available() {
		f.real = redistest.Start(t)
		conf.Redis, f.redis = f.real.Addr(), f.real.Client(t)
	} else {
		r := meshtest.StartRedis(t, meshtest.WithAddr("127.0.0.1:0"))
		conf.Redis, f.redis = r.Addr(), r.Client()
	}
	conf.Gauged, conf.Lease = true, 10*time.Second
	f.Child = harness.StartChild(t, conf)
	f.pair = newNeighbours(t, f.Addr)
	return f
}

// gauge returns the resource usage of the server. The peak is the one since the last
// reset.
func (f *target) gauge() harness.Gauged { return f.getGauge("/gauge") }

func (f *target) getGauge(path string) harness.Gauged {
	f.t.Helper()
	resp, err := f.web.Get("http://" + f.Addr + path)
	require.NoError(f.t, err)
	defer func() { _ = resp.Body.Close() }()
	var g harness.Gauged
	require.NoError(f.t, json.NewDecoder(resp.Body).Decode(&g))
	return g
}

// permanentKeys returns the keys in Redis that have no TTL.
func (f *target) permanentKeys() []string {
	f.t.Helper()
	all, err := f.redis.Keys(f.t.Context(), "*").Result()
	require.NoError(f.t, err)
	var keys []string
	for _, key := range all {
		left, err := f.redis.TTL(f.t.Context(), key).Result()
		require.NoError(f.t, err)
		if left == -1 { // -2 if the key is gone
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// within waits until ok returns true, and fails if that takes too long.
func (f *target) within(d time.Duration, ok func() bool, format string, args ...any) {
	f.t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			require.FailNow(f.t, "timeout after "+d.String(), fmt.Sprintf(format, args...))
		}
	}
}

// rounds is the number of states with which the latency of the neighbours is measured
// before an attack.
const rounds = 200

// run runs an attack while the neighbours use the server. Then it checks the memory:
// bound is the number of bytes that the server may hold in addition. The attack has to
// end its connections.
func (f *target) run(bound int64, attack func()) {
	f.t.Helper()
	f.alone = f.pair.publish(rounds, nil)
	f.keys = f.permanentKeys()
	f.base = f.getGauge("/gauge?reset")
	stop, measured := make(chan struct{}), make(chan latencies)
	go func() { measured <- f.pair.publish(0, stop) }()
	var busy latencies
	func() {
		defer func() { // also if the attack fails the test
			close(stop)
			busy = <-measured
		}()
		attack()
	}()
	g := f.gauge()
	f.report(g, bound, busy)
	f.aftermath(bound)
}

func (f *target) report(g harness.Gauged, bound int64, busy latencies) {
	f.t.Helper()
	f.t.Logf("heap: %s before, grew by %s at most (bound %s), %s now", kib(f.base.Bytes), kib(g.Peak-f.base.Bytes), kib(bound), kib(g.Bytes))
	f.t.Logf("neighbour: %v alone, %v under attack: %.1f and %.1f times as long", f.alone, busy,
		ratio(busy.at(50), f.alone.at(50)), ratio(busy.at(99), f.alone.at(99)))
	f.t.Logf("closed %v, limited %d, delayed %d, paused %d, coalesced %d", g.Stats.Closed, g.Stats.Limited, g.Stats.Delayed,
		g.Stats.ReadsPaused, g.Stats.Coalesced)
	require.NoError(f.t, f.pair.err, "the neighbours are only slower")
	assert.NotEmpty(f.t, busy, "the neighbours were served")
	assert.LessOrEqual(f.t, g.Peak-f.base.Bytes, bound, "memory exceeds the bound")
}

// leftover is the memory that an attack may leave on the heap: pools and maps that have
// grown, and buffers for reuse.
const leftover = 3 << 20

// aftermath waits until nothing of the attack is left.
func (f *target) aftermath(bound int64) {
	f.t.Helper()
	var g harness.Gauged
	f.within(timeLimit, func() bool {
		g = f.gauge()
		return g.Stats.Connections == 2 && g.Stats.Watched <= f.base.Stats.Watched && g.Goroutines <= f.base.Goroutines+2
	}, "the attackers' connections are gone: %d goroutines (before: %d), %+v", &g.Goroutines, f.base.Goroutines, &g.Stats)
	f.within(timeLimit, func() bool { return f.gauge().Bytes <= f.base.Bytes+leftover }, "memory is released: %s before", kib(f.base.Bytes))
	f.within(timeLimit, func() bool { return slices.Equal(f.keys, f.permanentKeys()) }, "nothing is left in Redis: before %q", f.keys)
	assert.Zero(f.t, g.Stats.CallbackPanics)
	after := f.pair.publish(20, nil)
	require.NoError(f.t, f.pair.err)
	f.t.Logf("afterwards: %s, %d goroutines (before: %d), neighbour %v", kib(f.gauge().Bytes), g.Goroutines, f.base.Goroutines, after)
}

func kib(n int64) string { return fmt.Sprintf("%d KiB", n>>10) }

// latencies are the times from the publishing of a state to its arrival at the other
// neighbour.
type latencies []time.Duration

// at returns a percentile.
func (l latencies) at(percent int) time.Duration {
	if len(l) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(l))
	return s[(len(s)-1)*percent/100]
}

func (l latencies) String() string {
	return fmt.Sprintf("p50 %.2f ms p99 %.2f ms (%d)", millis(l.at(50)), millis(l.at(99)), len(l))
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func ratio(a, b time.Duration) float64 { return float64(a) / float64(max(b, time.Microsecond)) }

// neighbours are two well-behaved clients: one publishes states, the other subscribes
// to them.
type neighbours struct {
	publisher, subscriber *attacker
	n                     int
	err                   error // the first error
}

const home = "home"

func newNeighbours(t testing.TB, addr string) *neighbours {
	t.Helper()
	n := &neighbours{publisher: dialAttacker(t, addr), subscriber: dialAttacker(t, addr)}
	require.Contains(t, n.subscriber.call("mesh/subscribe-presence", `{"roomName":"home"}`), `"success":true`)
	require.Contains(t, n.publisher.call("mesh/join-room", `{"roomName":"home"}`), `"success":true`)
	return n
}

// publish publishes the given number of states (0: until stop is closed) and returns
// the latency of each.
func (n *neighbours) publish(times int, stop <-chan struct{}) (took latencies) {
	for i := 0; (times == 0 || i < times) && n.err == nil; i++ {
		select {
		case <-stop:
			return took
		default:
		}
		n.n++
		begun := time.Now()
		n.err = n.round()
		took = append(took, time.Since(begun))
		// Publish at a realistic rate. Without a pause the neighbour would be an
		// attacker, too.
		time.Sleep(10 * time.Millisecond)
	}
	return took
}

// round publishes one state and waits until the other neighbour has read it.
func (n *neighbours) round() error {
	err := n.publisher.text(fmt.Sprintf(`{"id":1,"command":"mesh/publish-presence-state","payload":{"roomName":%q,"state":{"n":%d}}}`, home, n.n))
	if err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	if _, err = n.subscriber.until(fmt.Sprintf(`"state":{"n":%d}`, n.n)); err != nil {
		return fmt.Errorf("read the state: %w", err)
	}
	answer, err := n.publisher.until(`{"id":1,`)
	if err == nil && !strings.HasSuffix(answer, `"payload":true}`) {
		err = fmt.Errorf("answer %s", answer)
	}
	return err
}
