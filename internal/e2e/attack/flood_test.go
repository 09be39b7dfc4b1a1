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

// attack is one kind of attack. bound is the memory that the server may hold in
// addition. The expression shows its parts.
type attack struct {
	name  string
	conf  harness.ChildConfig
	bound int64
	run   func(t *testing.T, f *target)
}

const (
	// queue is the default of Limits.QueueBytes. It limits the bytes that wait to be
	// written to one socket, and the size of its waiting commands.
	queue = 1 << 20
	// perAttacker is the memory that one connection may use: its waiting answers and
	// commands, each with the overhead of the allocator, and the frame that is being
	// read.
	perAttacker = 2*queue*3/2 + 256<<10
	// spare is for garbage of the runtime and for growing tables.
	spare = 6 << 20
)

// unlimited removes the limit of commands, to test the limits behind it.
var unlimited = mesh.Limits{CommandsPerSecond: -1}

// TestAttacks runs two attacks at a time: each needs a processor for its measurements
// to mean something. The embedded Redis takes most of the time, so only the first
// attack of each kind runs on it.
func TestAttacks(t *testing.T) {
	t.Parallel()
	harness.Long(t, "attacks in real time")
	harness.UnhurriedOnly(t, "writes megabytes per second to Redis")
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
					f := newTarget(t, a.conf)
					f.run(a.bound, func() { a.run(t, f) })
				})
			})
		}
	}
}

var floods = []attack{
	{"ten thousand commands a second", harness.ChildConfig{}, perAttacker + spare, commandFlood},
	{"just below the flood limit", harness.ChildConfig{}, perAttacker + spare, nearFlood},
	{"WebSocket pings", harness.ChildConfig{}, perAttacker + spare, controlFlood},
	{"empty fragments", harness.ChildConfig{}, perAttacker + spare, fragmentFlood},
	{"answers that are read slowly", harness.ChildConfig{Buffer: 32 << 10}, perAttacker + spare, unreadAnswers},
	{"padded commands behind unread answers", harness.ChildConfig{Buffer: 32 << 10, Write: time.Minute}, paddedAttackers*perAttacker + spare, paddedCommands},
	{"five thousand reconnects", harness.ChildConfig{Limits: mesh.Limits{UpgradesPerSecond: 200}}, 4*perAttacker + spare, reconnects},
	{"refused requests", harness.ChildConfig{Limits: mesh.Limits{UpgradesPerSecond: 20}}, 4*perAttacker + spare, refusedStorm},
}

func noop(i int) string { return fmt.Sprintf(`{"id":%d,"command":"mesh/noop"}`, i) }

// commandFlood checks that a connection above ten times the limit is closed with 1008,
// with ELIMIT for the last command, and that the client is served if it reconnects and
// behaves.
func commandFlood(t *testing.T, f *target) {
	for range 3 {
		e, begun := dialAttacker(t, f.Addr), time.Now()
		ended := e.listen()
		e.flood(10_000, 5*time.Second, noop)
		r := <-ended
		require.Equal(t, websocket.ClosePolicyViolation, r.closing, "%v", r.err)
		assert.LessOrEqual(t, r.codes["ELIMIT"], 1, "%v", r.codes)
		assert.LessOrEqual(t, r.codes[""], mostCommands(begun), "more commands than allowed were carried out: %v", r.codes)
		delete(r.codes, "")
		delete(r.codes, "ELIMIT")
		assert.Empty(t, r.codes)
		e = dialAttacker(t, f.Addr)
		require.Contains(t, e.call("mesh/noop", "{}"), "true", "the client may reconnect")
		e.drop()
	}
	stats := f.gauge().Stats
	assert.EqualValues(t, 3, stats.Closed["flood"])
	assert.EqualValues(t, 3, stats.Limited)
}

// mostCommands is the number of commands that a connection is allowed.
func mostCommands(since time.Time) int { return 200 + int(100*time.Since(since).Seconds()) + 1 }

// nearFlood stays below the limit: every command is carried out, at the allowed rate.
// Unread commands wait in the network.
func nearFlood(t *testing.T, f *target) {
	e, begun := dialAttacker(t, f.Addr), time.Now()
	ended := e.listen()
	sent := e.flood(400, 4*time.Second, noop)
	f.within(timeLimit, func() bool {
		assert.LessOrEqual(t, e.answered.Load(), int64(mostCommands(begun)))
		return e.answered.Load() == int64(sent)
	}, "all commands are answered")
	assert.Positive(t, f.gauge().Stats.Delayed)
	e.closeNormally()
	r := <-ended
	require.Equal(t, websocket.CloseNormalClosure, r.closing, "%v", r.err)
	assert.Equal(t, map[string]int{"": sent}, r.codes)
}

// controlFlood checks that control frames count as frames.
func controlFlood(t *testing.T, f *target) {
	for _, op := range []byte{finPing, finPong} {
		e := dialAttacker(t, f.Addr)
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

// fragmentFlood sends a message that never ends, in fragments that are empty or have
// one byte, with a pong now and then. A long message in fragments does not count as a
// flood.
func fragmentFlood(t *testing.T, f *target) {
	pong := wireFrame(finText, `{"id":1,"command":"pong","payload":{}}`)
	for _, content := range []string{"", "x"} {
		e := dialAttacker(t, f.Addr)
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

// unreadAnswers checks that commands wait while their answers are read slowly. The
// connection is not closed for that.
func unreadAnswers(t *testing.T, f *target) {
	e := dialAttacker(t, f.Addr)
	e.pause = 25 * time.Millisecond
	ended := e.listen()
	name := strings.Repeat("x", 10_000) // the answer contains it, with an error
	const n = 300
	for i := range n {
		require.NoError(t, e.text(fmt.Sprintf(`{"id":%d,"command":%q}`, i, name)))
	}
	f.within(2*timeLimit, func() bool { return e.answered.Load() == n }, "all commands are answered")
	e.closeNormally()
	require.NoError(t, wantCode(<-ended, websocket.CloseNormalClosure))
}

const paddedAttackers = 16

// paddedCommands checks that commands which wait behind unread answers are limited by
// their size, including padding. Beyond the limit, the server reads nothing more.
func paddedCommands(t *testing.T, f *target) {
	name, padding := strings.Repeat("x", 30_000), strings.Repeat(" ", 64_000)
	var attackers []*attacker
	var writing sync.WaitGroup
	defer writing.Wait()
	for range paddedAttackers {
		e := dialAttacker(t, f.Addr)
		attackers = append(attackers, e)
		writing.Go(func() { // blocks when the server reads no more, until the connection ends
			for i := range 30 {
				_ = e.text(fmt.Sprintf(`{"id":%d,"command":%q}`, i, name)) // fails if the connection has ended
			}
			for i := range 60 {
				_ = e.text(fmt.Sprintf(`{"id":%d,"command":"mesh/noop","payload":{}%s}`, i, padding))
			}
		})
	}
	f.within(timeLimit, func() bool { return f.gauge().Stats.ReadsPaused >= paddedAttackers }, "reading is paused: %+v", f.gauge().Stats)
	f.gauge() // measures the memory while everything waits
	for _, e := range attackers {
		_, err := e.until("ENOTFOUND")
		require.NoError(t, err)
		e.drop()
	}
}

// reconnects connects, joins and drops the connection thousands of times. The server
// accepts the allowed number per second, and refuses the others with Retry-After.
func reconnects(t *testing.T, f *target) {
	const attempts, workers = 5000, 8
	var refused, accepted atomic.Int64
	var wg sync.WaitGroup
	begun := time.Now()
	for range workers {
		wg.Go(func() {
			for range attempts / workers {
				e, resp, err := tryDial(t, f.Addr)
				switch {
				case err == nil:
					accepted.Add(1)
					_ = e.text(`{"id":1,"command":"mesh/join-room","payload":{"roomName":"home"}}`)
					e.drop()
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

// refusedStorm sends refused requests as fast as possible. Other clients, fewer than
// allowed, are accepted at the same time.
func refusedStorm(t *testing.T, f *target) {
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
		e := dialAttacker(t, f.Addr)
		e.drop()
		time.Sleep(60 * time.Millisecond) // at most 16 per second
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
