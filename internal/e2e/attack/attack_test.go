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

// fort is a server process under attack, with the neighbours who live on it.
type fort struct {
	*harness.Child
	t     testing.TB
	redis *redis.Client
	real  *redistest.Server // nil: the Redis is an embedded one
	web   *http.Client
	pair  *neighbours
	base  harness.Gauged
	keys  []string // in Redis, before the attack
	quiet latencies
}

// newFort starts a server on a Redis of its own, with two neighbours at home.
func newFort(t testing.TB, conf harness.ChildConfig) *fort {
	t.Helper()
	f := &fort{t: t, web: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}}
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

// gauge asks the server what it uses up; the peak is since the last reset.
func (f *fort) gauge() harness.Gauged { return f.ask("/gauge") }

func (f *fort) ask(path string) harness.Gauged {
	f.t.Helper()
	resp, err := f.web.Get("http://" + f.Addr + path)
	require.NoError(f.t, err)
	defer func() { _ = resp.Body.Close() }()
	var g harness.Gauged
	require.NoError(f.t, json.NewDecoder(resp.Body).Decode(&g))
	return g
}

// lasting returns the keys in Redis that no TTL will take away.
func (f *fort) lasting() []string {
	f.t.Helper()
	all, err := f.redis.Keys(f.t.Context(), "*").Result()
	require.NoError(f.t, err)
	var keys []string
	for _, key := range all {
		left, err := f.redis.TTL(f.t.Context(), key).Result()
		require.NoError(f.t, err)
		if left == -1 { // -2: gone meanwhile
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// within waits until ok, and fails if that takes too long.
func (f *fort) within(d time.Duration, ok func() bool, format string, args ...any) {
	f.t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			require.FailNow(f.t, "not within "+d.String(), fmt.Sprintf(format, args...))
		}
	}
}

// rounds is how often the neighbours speak to know how long it takes when
// nobody attacks.
const rounds = 200

// under runs an attack while the neighbours go on, and then looks at what it
// has left behind: bound is how many bytes the server may have held at once on
// account of it. The attack has to end its connections.
func (f *fort) under(bound int64, attack func()) {
	f.t.Helper()
	f.quiet = f.pair.speak(rounds, nil)
	f.keys = f.lasting()
	f.base = f.ask("/gauge?reset")
	stop, spoken := make(chan struct{}), make(chan latencies)
	go func() { spoken <- f.pair.speak(0, stop) }()
	var busy latencies
	func() {
		defer func() { // also where the attack fails
			close(stop)
			busy = <-spoken
		}()
		attack()
	}()
	g := f.gauge()
	f.report(g, bound, busy)
	f.aftermath(bound)
}

func (f *fort) report(g harness.Gauged, bound int64, busy latencies) {
	f.t.Helper()
	f.t.Logf("heap: %s before, grew by %s at most (bound %s), %s now", kib(f.base.Bytes), kib(g.Peak-f.base.Bytes), kib(bound), kib(g.Bytes))
	f.t.Logf("neighbour: %v alone, %v under attack: %.1f and %.1f times as long", f.quiet, busy,
		ratio(busy.at(50), f.quiet.at(50)), ratio(busy.at(99), f.quiet.at(99)))
	f.t.Logf("closed %v, limited %d, delayed %d, paused %d, coalesced %d", g.Stats.Closed, g.Stats.Limited, g.Stats.Delayed,
		g.Stats.ReadsPaused, g.Stats.Coalesced)
	require.NoError(f.t, f.pair.err, "the neighbours notice nothing but the time it takes")
	assert.NotEmpty(f.t, busy, "the neighbours got on")
	assert.LessOrEqual(f.t, g.Peak-f.base.Bytes, bound, "memory is bounded")
}

// left is what an attack may leave behind on the heap: pools and maps that
// have grown, buffers that are kept for the next.
const left = 3 << 20

// aftermath waits until all of the attack is gone.
func (f *fort) aftermath(bound int64) {
	f.t.Helper()
	var g harness.Gauged
	f.within(patience, func() bool {
		g = f.gauge()
		return g.Stats.Connections == 2 && g.Stats.Watched <= f.base.Stats.Watched && g.Goroutines <= f.base.Goroutines+2
	}, "the attackers are gone: %d goroutines (before: %d), %+v", &g.Goroutines, f.base.Goroutines, &g.Stats)
	f.within(patience, func() bool { return f.gauge().Bytes <= f.base.Bytes+left }, "memory is given back: %s before", kib(f.base.Bytes))
	f.within(patience, func() bool { return slices.Equal(f.keys, f.lasting()) }, "nothing is left in Redis: before %q", f.keys)
	assert.Zero(f.t, g.Stats.CallbackPanics)
	after := f.pair.speak(20, nil)
	require.NoError(f.t, f.pair.err)
	f.t.Logf("afterwards: %s, %d goroutines (before: %d), neighbour %v", kib(f.gauge().Bytes), g.Goroutines, f.base.Goroutines, after)
}

func kib(n int64) string { return fmt.Sprintf("%d KiB", n>>10) }

// latencies are how long what one neighbour said took to reach the other.
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

// neighbours are two honest clients: one publishes states, the other watches.
type neighbours struct {
	speaker, listener *enemy // who behave
	n                 int
	err               error // the first thing that went wrong
}

const home = "home"

func newNeighbours(t testing.TB, addr string) *neighbours {
	t.Helper()
	n := &neighbours{speaker: dialEnemy(t, addr), listener: dialEnemy(t, addr)}
	require.Contains(t, n.listener.call("mesh/subscribe-presence", `{"roomName":"home"}`), `"success":true`)
	require.Contains(t, n.speaker.call("mesh/join-room", `{"roomName":"home"}`), `"success":true`)
	return n
}

// speak has a state published again and again, so many times or until stop is
// closed, and returns how long each took to arrive.
func (n *neighbours) speak(times int, stop <-chan struct{}) (took latencies) {
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
		// Nobody types faster than this, and a client that always speaks
		// would be the attacker.
		time.Sleep(10 * time.Millisecond)
	}
	return took
}

// round publishes one state and waits until the other has read it.
func (n *neighbours) round() error {
	err := n.speaker.text(fmt.Sprintf(`{"id":1,"command":"mesh/publish-presence-state","payload":{"roomName":%q,"state":{"n":%d}}}`, home, n.n))
	if err != nil {
		return fmt.Errorf("speaking: %w", err)
	}
	if _, err = n.listener.until(fmt.Sprintf(`"state":{"n":%d}`, n.n)); err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	answer, err := n.speaker.until(`{"id":1,`)
	if err == nil && !strings.HasSuffix(answer, `"payload":true}`) {
		err = fmt.Errorf("answered with %s", answer)
	}
	return err
}
