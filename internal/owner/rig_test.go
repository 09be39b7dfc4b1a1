package owner

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// rig is an owner on a fake Redis, in virtual time.
type rig struct {
	*testing.T
	*Owner
	redis *fakeStore
	wheel *clock.Wheel
	began time.Time

	mu     sync.Mutex // guards the fields below
	inc    string
	ttls   map[string]time.Duration
	paces  map[string]time.Duration
	fenced []string
	wrote  map[string]uint64
	metas  int
}

// virtual runs a test in a bubble with a rig.
func virtual(t *testing.T, f func(r *rig), setup ...func(*Config)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { f(newRig(t, setup...)) })
}

func newRig(t *testing.T, setup ...func(*Config)) *rig {
	t.Helper()
	r := &rig{
		T: t, redis: newFakeStore(), wheel: clock.NewWheel(50 * time.Millisecond), began: time.Now(),
		inc: "I1", ttls: make(map[string]time.Duration), paces: make(map[string]time.Duration), wrote: make(map[string]uint64),
	}
	cfg := Config{
		Store: r.redis, Wheel: r.wheel, Buckets: 1, EndSilent: true, MaxRooms: -1,
		RoomBucket: func(room string) int { return 0 }, ConnBucket: func(string) int { return 0 },
		Incarnation: r.incarnation, TTL: r.ttl, StateInterval: r.interval,
		Fenced: func(inc string) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.fenced = append(r.fenced, inc)
		},
		Wrote: func(room string, p store.Position) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.wrote[room] = max(r.wrote[room], p.Seq)
		},
		MetaChanged: func(*Conn) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.metas++
		},
	}
	for _, f := range setup {
		f(&cfg)
	}
	r.Owner = New(cfg)
	r.wheel.Start()
	t.Cleanup(func() {
		r.Stop()
		r.wheel.Stop()
		r.redis.work.Wait()
		require.False(t, r.redis.together && cfg.Buckets == 1, "one batch at a time")
		for i, b := range r.redis.batches {
			require.LessOrEqual(t, len(b), store.MaxOps, "batch %d", i)
		}
	})
	return r
}

func (r *rig) incarnation() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.inc
}

// reborn makes the server another incarnation.
func (r *rig) reborn(inc string, stalled bool) {
	r.become(inc)
	r.Reborn(stalled)
}

func (r *rig) become(inc string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inc = inc
}

func (r *rig) ttl(room string) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ttls[room]
}

func (r *rig) interval(room string) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.paces[room]
}

// pace sets the interval between states of a room.
func (r *rig) pace(room string, interval time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.paces[room] = interval
}

// rule sets the TTL of a room.
func (r *rig) rule(room string, ttl time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ttls[room] = ttl
}

func (r *rig) connect(id string) *Conn {
	r.Helper()
	c, err := r.Connect(id, nil, nil, func() {})
	require.NoError(r, err)
	return c
}

func (r *rig) join(c *Conn, room string) Joined {
	r.Helper()
	j, err := c.Join(r.Context(), room)
	require.NoError(r, err)
	return j
}

func (r *rig) leave(c *Conn, room string) {
	r.Helper()
	was, err := c.Leave(r.Context(), room, store.CauseLeft)
	require.NoError(r, err)
	require.True(r, was)
}

func (r *rig) publish(c *Conn, room, state string, expireAfter time.Duration) {
	r.Helper()
	require.NoError(r, c.PublishState(r.Context(), room, []byte(state), expireAfter, false))
}

// sleep lets time pass; everything that is due has happened then.
func (r *rig) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// plan sets what befalls the calls from now on; the first has number 0.
func (r *rig) plan(f func(call int, ops []store.Op) fault) {
	r.redis.do(func() {
		base := len(r.redis.batches)
		r.redis.plan = func(call int, ops []store.Op) fault { return f(call-base, ops) }
	})
}

func (r *rig) heal() { r.redis.do(func() { r.redis.plan, r.redis.refuse = nil, nil }) }

func (r *rig) refuse(f func(op store.Op) bool) { r.redis.do(func() { r.redis.refuse = f }) }

// away makes every call fail without running.
func (r *rig) away() { r.plan(func(int, []store.Op) fault { return fault{never: true} }) }

// said is what has been told: "J c/r", and the state or cause.
func (r *rig) said() []string {
	r.redis.mu.Lock()
	defer r.redis.mu.Unlock()
	var list []string
	for _, e := range r.redis.events {
		s := fmt.Sprintf("%c %s/%s", e.kind, e.conn, e.room)
		switch e.kind {
		case store.Left:
			s += " " + string(e.cause)
		case store.State:
			s += " " + e.state
		}
		list = append(list, strings.TrimSpace(s))
	}
	return list
}

func (r *rig) forgetSaid() { r.redis.do(func() { r.redis.events = nil }) }

// held returns the entry that Redis holds.
func (r *rig) held(room, conn string) (held, bool) {
	r.redis.mu.Lock()
	defer r.redis.mu.Unlock()
	h, ok := r.redis.rooms[room][conn]
	return h, ok
}

func (r *rig) owned() int {
	n := 0
	r.redis.do(func() {
		for _, set := range r.redis.owned {
			n += len(set)
		}
	})
	return n
}

func (r *rig) calls() int {
	n := 0
	r.redis.do(func() { n = len(r.redis.batches) })
	return n
}

// heartbeat does what a renewal does, and waits for what comes of it.
func (r *rig) heartbeat(trouble bool) {
	r.Helper()
	n := int64(0)
	r.redis.do(func() { n = int64(len(r.redis.owned[where{0, r.inc}])) })
	r.Heartbeat(n, trouble)
	synctest.Wait()
}

// atRest asserts that everything has been written, that nothing waits for
// anything, and that what the owner counts is what Redis holds.
func (r *rig) atRest() {
	r.Helper()
	synctest.Wait()
	for _, l := range r.lanes {
		inc, size := r.incarnation(), 0
		r.redis.do(func() { size = len(r.redis.owned[where{l.bucket, inc}]) })
		l.mu.Lock()
		running, queued, flying, held := l.running, l.queue.n, l.taken, l.held
		if l.heldOf != inc {
			held = 0
		}
		l.mu.Unlock() // a test that ends with the lock would hang
		require.False(r, running, "a lane runs")
		require.Zero(r, queued)
		require.Zero(r, flying)
		require.EqualValues(r, size, held, "what the lane believes Redis to hold")
	}
	entries := 0
	for _, c := range r.Conns() {
		wanted, sleepers, wrong := c.standing()
		require.Empty(r, wrong, "entries of %s", c.id)
		require.Equal(r, sleepers, c.sleepers.Load(), "sleepers of %s", c.id)
		entries += wanted
	}
	s := r.Stats()
	require.Equal(r, entries, s.Entries)
	require.Zero(r, s.Unwritten)
}

// standing counts the connection's entries, and says what is wrong with those
// that are not at rest.
func (c *Conn) standing() (wanted int, sleepers int64, wrong []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if e.state.held || e.flow != nil && len(e.flow.older) > 0 {
			wrong = append(wrong, e.room+": states are to be told")
		}
		if len(e.waiters) > 0 || e.ending != "" || e.want != e.written || e.refresh || !e.want && !e.asleep {
			wrong = append(wrong, fmt.Sprintf("%s: %d waiters, ending %q, want %t, written %t, refresh %t, asleep %t",
				e.room, len(e.waiters), e.ending, e.want, e.written, e.refresh, e.asleep))
		}
		if e.want {
			wanted++
		}
		if e.asleep {
			sleepers++
		}
		if e.lapsed {
			sleepers++
		}
	}
	return wanted, sleepers, wrong
}

// nothingLeft asserts that nothing is held, here or in Redis, and that no
// timer is armed.
func (r *rig) nothingLeft() {
	r.Helper()
	r.atRest()
	s := r.Stats()
	require.Zero(r, s.Connections)
	require.Zero(r, s.Entries)
	require.Zero(r, s.Rooms)
	require.Zero(r, r.wheel.Armed(), "timers")
	if r.Owner.pace != nil {
		require.Zero(r, r.Owner.pace.Armed(), "timers of states")
	}
	require.Zero(r, r.owned())
	r.redis.do(func() {
		require.Empty(r, r.redis.rooms)
		require.Empty(r, r.redis.conns)
	})
}

func (r *rig) drain() {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), time.Minute)
	defer cancel()
	require.NoError(r, r.Drain(ctx, store.CauseClosed))
}

// link is a transport that notes what it is told.
type link struct {
	mu    sync.Mutex // guards the fields below
	ttls  []time.Duration
	pings int
}

func (l *link) MinTTL(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ttls = append(l.ttls, d)
}

func (l *link) told() []time.Duration {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.ttls)
}

func (l *link) PingNow() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pings++
}
