package occupancy

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/internal/clock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const lobby = "lobby"

// soon is longer than a reading that begins at once takes with everything around it, and
// step is the step of the wheel, by which timers may be late.
const (
	soon = 20 * time.Millisecond
	step = 50 * time.Millisecond
)

// newHarness returns Rooms. It must be called in a synctest bubble.
func newHarness(t *testing.T, setup ...func(*Config)) *harness {
	t.Helper()
	h := &harness{
		t: t, redis: newFakeRedis(), listener: &fakeListener{confirmed: map[string]bool{}},
		pushes: map[string][]time.Time{}, every: map[string]time.Duration{}, interval: time.Second,
	}
	cfg := Config{Store: h.redis, Listener: h.listener, Wheel: clock.NewWheel(step), Interval: h.intervalOf}
	for _, set := range setup {
		set(&cfg)
	}
	if cfg.Bucket != nil {
		h.redis.bucket = cfg.Bucket
	}
	h.Rooms = New(cfg)
	h.listener.to = h.Rooms
	cfg.Wheel.Start()
	t.Cleanup(func() {
		h.Stop()
		assert.Zero(t, cfg.Wheel.Armed(), "timers are left")
		cfg.Wheel.Stop()
	})
	return h
}

// inBubble runs a test in a synctest bubble.
func inBubble(t *testing.T, test func(*testing.T, *harness), setup ...func(*Config)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { test(t, newHarness(t, setup...)) })
}

// sleep lets time pass, and then waits until all goroutines block.
func (h *harness) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// newWatcher returns a watcher that watches nothing.
func (h *harness) newWatcher() *fakeWatcher {
	return &fakeWatcher{h: h, has: map[string]*Update{}, seqs: map[string]map[string]uint64{}}
}

// watch lets a new watcher watch rooms, and checks that it gets numbers.
func (h *harness) watch(rooms ...string) *fakeWatcher {
	h.t.Helper()
	w := h.newWatcher()
	h.watchBy(w, rooms...)
	return w
}

// watchBy is watch for a watcher that exists. It returns the numbers.
func (h *harness) watchBy(w *fakeWatcher, rooms ...string) (lines []string) {
	h.t.Helper()
	for i, result := range h.watchAs(w, rooms...) {
		require.NoError(h.t, result.Err)
		require.Equal(h.t, rooms[i], result.Update.Room)
		lines = append(lines, text(result.Update))
	}
	return lines
}

// watchAs lets a watcher watch rooms.
func (h *harness) watchAs(w *fakeWatcher, rooms ...string) []Result {
	w.hold()
	results := h.Watch(h.t.Context(), w, rooms)
	w.start(results)
	return results
}

// join, leave and touch change a room and send the event.
func (h *harness) join(room, conn string, user ...string) {
	h.redis.change(room, func(r *fakeRoom) { r.join(conn, strings.Join(user, "")) })
	h.listener.send(room)
}

func (h *harness) leave(room, conn string) {
	h.redis.change(room, func(r *fakeRoom) { r.leave(conn) })
	h.listener.send(room)
}

func (h *harness) touch(room string) {
	h.redis.change(room, func(*fakeRoom) {})
	h.listener.send(room)
}

// requireTruth checks that a watcher has the true numbers of a room.
func (h *harness) requireTruth(w *fakeWatcher, room string) {
	h.t.Helper()
	truth := h.redis.truth(room)
	w.mu.Lock()
	defer w.mu.Unlock()
	require.NotNil(h.t, w.has[room])
	require.Equal(h.t, fmt.Sprintf("%s %d/%d", room, truth.Connections, truth.Users), text(w.has[room]))
}
