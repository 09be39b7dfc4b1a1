package attack

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

// attack is one way to make trouble. Bound is how much more memory than before
// the server may hold meanwhile; where it comes from stands with each.
type attack struct {
	name  string
	conf  harness.ChildConfig
	bound int64
	run   func(t *testing.T, f *fort)
}

const (
	// queue is the default of Limits.QueueBytes, the most that waits to be
	// written to one socket, and the most that its waiting commands weigh.
	queue = 1 << 20
	// perEnemy is what one connection may cost: its answers and its commands
	// that wait, both with what the allocator adds, and the frame being read.
	perEnemy = 2*queue*3/2 + 256<<10
	// spare is for garbage of the moment, and for tables that grow.
	spare = 6 << 20
)

// unlimited takes the commands' limit away, where it is the next bound behind
// it that is tried.
var unlimited = mesh.Limits{CommandsPerSecond: -1}

// TestAttacks makes them two at a time: each needs a processor of its own for
// what it measures to say something. On the in-process Redis, which takes most
// of the time then, it makes the first of each kind.
func TestAttacks(t *testing.T) {
	t.Parallel()
	harness.Long(t, "attacks in real time")
	harness.UnhurriedOnly(t, "megabytes a second, written to Redis within the usual time limits")
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, 2)
	for _, list := range [][]attack{floods, storms, slowAttacks} {
		for i, a := range list {
			if i > 0 && !redistest.Available() {
				continue
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				t.Run(a.name, func(t *testing.T) {
					f := newFort(t, a.conf)
					f.under(a.bound, func() { a.run(t, f) })
				})
			})
		}
	}
}

var floods = []attack{
	{"ten thousand commands a second", harness.ChildConfig{}, perEnemy + spare, commandFlood},
	{"as many as are tolerated", harness.ChildConfig{}, perEnemy + spare, nearFlood},
	{"pings of WebSocket", harness.ChildConfig{}, perEnemy + spare, controlFlood},
	{"empty fragments", harness.ChildConfig{}, perEnemy + spare, fragmentFlood},
	{"answers that are read slowly", harness.ChildConfig{Buffer: 32 << 10}, perEnemy + spare, unreadAnswers},
	{"padded commands behind them", harness.ChildConfig{Buffer: 32 << 10, Write: time.Minute}, paddedEnemies*perEnemy + spare, paddedCommands},
	{"five thousand reconnects", harness.ChildConfig{Limits: mesh.Limits{UpgradesPerSecond: 200}}, 4*perEnemy + spare, reconnects},
	{"requests that are refused", harness.ChildConfig{Limits: mesh.Limits{UpgradesPerSecond: 20}}, 4*perEnemy + spare, refusedStorm},
}

func noop(i int) string { return fmt.Sprintf(`{"id":%d,"command":"mesh/noop"}`, i) }

// commandFlood: 1008 past ten times the limit, with ELIMIT for the command that was one
// too many, and whoever comes back behaving is served.
func commandFlood(t *testing.T, f *fort) {
	for range 3 {
		e, begun := dialEnemy(t, f.Addr), time.Now()
		ended := e.listen()
		e.flood(10_000, 5*time.Second, noop)
		r := <-ended
		require.Equal(t, websocket.ClosePolicyViolation, r.closing, "%v", r.err)
		assert.LessOrEqual(t, r.codes["ELIMIT"], 1, "%v", r.codes)
		assert.LessOrEqual(t, r.codes[""], mostCommands(begun), "no more than may be are carried out: %v", r.codes)
		delete(r.codes, "")
		delete(r.codes, "ELIMIT")
		assert.Empty(t, r.codes)
		e = dialEnemy(t, f.Addr)
		require.Contains(t, e.call("mesh/noop", "{}"), "true", "and may come back")
		e.gone()
	}
	stats := f.gauge().Stats
	assert.EqualValues(t, 3, stats.Closed["flood"])
	assert.EqualValues(t, 3, stats.Limited)
}

// mostCommands is how many commands a connection may have had carried out.
func mostCommands(since time.Time) int { return 200 + int(100*time.Since(since).Seconds()) + 1 }

// nearFlood stays below: every command is carried out, at the rate that is allowed. What
// has not been read yet waits in the network.
func nearFlood(t *testing.T, f *fort) {
	e, begun := dialEnemy(t, f.Addr), time.Now()
	ended := e.listen()
	sent := e.flood(400, 4*time.Second, noop)
	f.within(patience, func() bool {
		assert.LessOrEqual(t, e.answered.Load(), int64(mostCommands(begun)))
		return e.answered.Load() == int64(sent)
	}, "all are answered")
	assert.Positive(t, f.gauge().Stats.Delayed)
	e.bye()
	r := <-ended
	require.Equal(t, websocket.CloseNormalClosure, r.closing, "%v", r.err)
	assert.Equal(t, map[string]int{"": sent}, r.codes)
}

// controlFlood: they count as frames.
func controlFlood(t *testing.T, f *fort) {
	for _, op := range []byte{finPing, finPong} {
		e := dialEnemy(t, f.Addr)
		ended := e.listen()
		ping := []byte(strings.Repeat(string(wireFrame(op, strings.Repeat("x", 100))), 100))
		for range 1000 {
			if e.raw(ping) != nil {
				break
			}
		}
		r := <-ended
		require.Equal(t, websocket.ClosePolicyViolation, r.closing, "%v", r.err)
	}
}

// fragmentFlood: a message that never ends, of fragments without content or with
// a byte each, and a pong now and then. A message in pieces is none of it.
func fragmentFlood(t *testing.T, f *fort) {
	pong := wireFrame(finText, `{"id":1,"command":"pong","payload":{}}`)
	for _, content := range []string{"", "x"} {
		e := dialEnemy(t, f.Addr)
		for i := range 1000 {
			first := byte(moreText)
			if i > 0 {
				first = moreOf
			}
			require.NoError(t, e.raw(wireFrame(first, " ")))
		}
		require.NoError(t, e.raw(wireFrame(finOf, `{"id":7,"command":"mesh/noop"}`)))
		answer, err := e.until(`{"id":7,`)
		require.NoError(t, err)
		require.Contains(t, answer, "true")

		ended := e.listen()
		require.NoError(t, e.raw(append(pong, wireFrame(moreText, "x")...)))
		many := []byte(strings.Repeat(string(wireFrame(moreOf, content)), 1000) + string(wireFrame(finPong, "")))
		for range 1000 {
			if e.raw(many) != nil {
				break
			}
		}
		r := <-ended
		require.Equal(t, websocket.ClosePolicyViolation, r.closing, "%v", r.err)
	}
	assert.EqualValues(t, 2, f.gauge().Stats.Closed["flood"])
}

// unreadAnswers: commands wait while their answers are not read as fast as they come. The
// client is not closed for what it has asked for.
func unreadAnswers(t *testing.T, f *fort) {
	e := dialEnemy(t, f.Addr)
	e.pause = 25 * time.Millisecond
	ended := e.listen()
	name := strings.Repeat("x", 10_000) // it comes back in the answer, if only to say no
	const n = 300
	for i := range n {
		require.NoError(t, e.text(fmt.Sprintf(`{"id":%d,"command":%q}`, i, name)))
	}
	f.within(2*patience, func() bool { return e.answered.Load() == n }, "all are answered")
	e.bye()
	require.NoError(t, wantCode(<-ended, websocket.CloseNormalClosure))
}

const paddedEnemies = 16

// paddedCommands: while answers are not read commands wait. They are bounded by what they
// weigh, padding included: past it nothing is read.
func paddedCommands(t *testing.T, f *fort) {
	name, padding := strings.Repeat("x", 30_000), strings.Repeat(" ", 64_000)
	var enemies []*enemy
	var writing sync.WaitGroup
	defer writing.Wait()
	for range paddedEnemies {
		e := dialEnemy(t, f.Addr)
		enemies = append(enemies, e)
		writing.Go(func() { // until the server reads no more, and then until the end
			for i := range 30 {
				_ = e.text(fmt.Sprintf(`{"id":%d,"command":%q}`, i, name)) // fails once it is gone
			}
			for i := range 60 {
				_ = e.text(fmt.Sprintf(`{"id":%d,"command":"mesh/noop","payload":{}%s}`, i, padding))
			}
		})
	}
	f.within(patience, func() bool { return f.gauge().Stats.ReadsPaused >= paddedEnemies }, "nothing is read: %+v", f.gauge().Stats)
	f.gauge() // a look at the memory while all of it waits
	for _, e := range enemies {
		_, err := e.until("ENOTFOUND")
		require.NoError(t, err)
		e.gone()
	}
}

// reconnects: they come, join, and drop the connection, thousands of times.
// The server takes as many per second as it may; others are told when to come
// back.
func reconnects(t *testing.T, f *fort) {
	const attempts, workers = 5000, 8
	var refused, accepted atomic.Int64
	var wg sync.WaitGroup
	begun := time.Now()
	for range workers {
		wg.Go(func() {
			for range attempts / workers {
				e, resp, err := tryEnemy(t, f.Addr)
				switch {
				case err == nil:
					accepted.Add(1)
					_ = e.text(`{"id":1,"command":"mesh/join-room","payload":{"roomName":"home"}}`)
					e.gone()
				case resp != nil && resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Retry-After") != "":
					refused.Add(1)
					_, _ = io.Copy(io.Discard, resp.Body)
				default:
					t.Errorf("an upgrade failed: %v", err)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(begun)
	t.Logf("%d accepted, %d refused with 503 in %v", accepted.Load(), refused.Load(), took)
	assert.LessOrEqual(t, accepted.Load(), int64(200*(took.Seconds()+2)))
	assert.Positive(t, refused.Load())
}

// refusedStorm: requests that are refused come as fast as they can. Honest clients,
// fewer than may come, are let in all the while.
func refusedStorm(t *testing.T, f *fort) {
	const workers, honest = 4, 30
	var storm sync.WaitGroup
	stop := make(chan struct{})
	var refused atomic.Int64
	for i := range workers {
		h := []http.Header{{"Origin": {"https://evil.example"}}, {"Sec-WebSocket-Version": {"8"}}}[i%2]
		storm.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if refuse(t, f.Addr, h) {
					refused.Add(1)
				}
			}
		})
	}
	for range honest {
		e := dialEnemy(t, f.Addr)
		e.gone()
		time.Sleep(60 * time.Millisecond) // at most 16 a second
	}
	close(stop)
	storm.Wait()
	t.Logf("%d requests refused", refused.Load())
	assert.Greater(t, refused.Load(), int64(100))
}

// refuse sends one request that is refused with 400 or 403.
func refuse(t *testing.T, addr string, h http.Header) bool {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+"/ws", nil)
	if err != nil {
		return false
	}
	for name, value := range map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
	} {
		r.Header.Set(name, value)
	}
	for name, values := range h {
		r.Header.Set(name, values[0])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return false
	}
	defer func() { _ = resp.Body.Close() }()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode == http.StatusBadRequest || resp.StatusCode == http.StatusForbidden
}
