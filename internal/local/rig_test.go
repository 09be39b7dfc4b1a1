package local

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

// rig is a Registry on a fake Redis, in virtual time.
type rig struct {
	*testing.T
	*Registry
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
	graces map[string]time.Duration
	caps   map[string][2]int
	lose   func(conn, room string) // an entry was given up; nil: none
	heard  []string                // calls of Kept, Full and Replaced
}

// virtual runs a test with a rig in a synctest bubble.
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
		graces: make(map[string]time.Duration), caps: make(map[string][2]int),
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
		OnPosition: func(room string, p store.Position) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.wrote[room] = max(r.wrote[room], p.Seq)
		},
		MetaChanged: func(*Conn) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.metas++
		},
		Grace: r.grace, Caps: r.capsOf, RebuildFor: time.Second,
		Kept: func(room, conn, _, _ string, _ int64) { r.hear("kept %s/%s", conn, room) },
		Full: func(c *Conn, room string, of store.Bound) {
			r.hear("full %s/%s %s", c.id, room, of)
			r.noteLost(c.id, room)
		},
		Replaced: func(room, conn, owner string, by *Conn, _ store.Position) {
			r.hear("replaced %s/%s of %s by %s", conn, room, owner, by.id)
			r.noteLost(conn, room)
		},
	}
	for _, f := range setup {
		f(&cfg)
	}
	r.Registry = New(cfg)
	r.illegal = func(transition string) { t.Errorf("illegal transition of an entry: %s", transition) }
	r.wheel.Start()
	t.Cleanup(func() {
		r.Stop()
		r.wheel.Stop()
		r.redis.work.Wait()
		require.False(t, r.redis.overlapped && cfg.Buckets == 1, "one batch at a time")
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

// reregister gives the server another incarnation.
func (r *rig) reregister(inc string, stalled bool) {
	r.setIncarnation(inc)
	r.Reregistered(stalled)
}

func (r *rig) setIncarnation(inc string) {
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

// pace sets the state interval of a room.
func (r *rig) pace(room string, interval time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.paces[room] = interval
}

func (r *rig) grace(room string) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.graces[room]
}

func (r *rig) capsOf(room string) (connections, users int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.caps[room][0], r.caps[room][1]
}

// keep sets the grace of a room.
func (r *rig) keep(room string, grace time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.graces[room] = grace
}

// cap sets the caps of a room.
func (r *rig) cap(room string, connections, users int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.caps[room] = [2]int{connections, users}
}

// hear notes a call of Kept, Full or Replaced.
func (r *rig) hear(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heard = append(r.heard, fmt.Sprintf(format, args...))
}

func (r *rig) noteLost(conn, room string) {
	if r.lose != nil {
		r.lose(conn, room)
	}
}

// takeHeard returns the calls of Kept, Full and Replaced since it was last called.
func (r *rig) takeHeard() []string {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	heard := r.heard
	r.heard = nil
	return heard
}

// withUsers gives a rig users: metadata that begins with "@ann" belongs to ann.
func withUsers(cfg *Config) { cfg.UserOf = userOf }

func userOf(_ string, meta []byte) string {
	user, ok := strings.CutPrefix(string(meta), "@")
	if !ok {
		return ""
	}
	user, _, _ = strings.Cut(user, " ")
	return user
}

// connectAs connects a connection of a user.
func (r *rig) connectAs(id, user string) *Conn {
	r.Helper()
	c, err := r.Connect(id, []byte("@"+user), nil, func() {})
	require.NoError(r, err)
	return c
}

// ops returns the ops of a kind that were sent, without registrations.
func (r *rig) ops(kind store.OpKind) (ops []store.Op) {
	r.redis.do(func() {
		for _, b := range r.redis.batches {
			for _, op := range b {
				if op.Kind == kind {
					ops = append(ops, op)
				}
			}
		}
	})
	return ops
}

// lastOp returns the last op of a kind.
func (r *rig) lastOp(kind store.OpKind) store.Op {
	r.Helper()
	ops := r.ops(kind)
	require.NotEmpty(r, ops)
	return ops[len(ops)-1]
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

// sleep lets time pass until everything due has happened.
func (r *rig) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// plan sets the faults of the calls from now on. The first call has number 0.
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

// told returns the events: "J c/r" and the state or cause.
func (r *rig) told() []string {
	r.redis.mu.Lock()
	defer r.redis.mu.Unlock()
	var list []string
	for _, e := range r.redis.events {
		s := fmt.Sprintf("%c %s/%s", e.kind, e.conn, e.room)
		switch e.kind {
		case store.Left, store.Disconnected:
			s += " " + string(e.cause)
		case store.State:
			s += " " + e.state
		}
		list = append(list, strings.TrimSpace(s))
	}
	return list
}

func (r *rig) forgetTold() { r.redis.do(func() { r.redis.events = nil }) }

// storedEntry returns the entry that Redis holds.
func (r *rig) storedEntry(room, conn string) (storedEntry, bool) {
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

// heartbeat does what a renewal does, and waits until the registry is idle.
func (r *rig) heartbeat(trouble bool) {
	r.Helper()
	n := int64(0)
	r.redis.do(func() { n = int64(len(r.redis.owned[ownerKey{0, r.inc}])) })
	r.Heartbeat(n, trouble)
	synctest.Wait()
}

// atRest asserts that everything is written, that nothing waits, and that the counts of
// the registry agree with Redis.
func (r *rig) atRest() {
	r.Helper()
	synctest.Wait()
	for _, w := range r.writers {
		inc, size := r.incarnation(), 0
		r.redis.do(func() { size = len(r.redis.owned[ownerKey{w.bucket, inc}]) })
		w.mu.Lock()
		running, queued, inFlight, stored := w.running, w.queue.n, w.takenOps, w.stored
		if w.storedOf != inc {
			stored = 0
		}
		w.mu.Unlock() // a test that ends with the lock would hang
		require.False(r, running, "a writer runs")
		require.Zero(r, queued)
		require.Zero(r, inFlight)
		require.EqualValues(r, size, stored, "stored count of the writer")
	}
	entries := 0
	for _, c := range r.Conns() {
		wanted, waiting, wrong := c.checkRest()
		require.Empty(r, wrong, "entries of %s", c.id)
		require.Equal(r, waiting, c.frameWaiters.Load(), "frame waiters of %s", c.id)
		entries += wanted
	}
	s := r.Stats()
	require.Equal(r, entries, s.Entries)
	require.Zero(r, s.Unwritten)
}

// checkRest counts the connection's entries, and describes those that are not at rest.
func (c *Conn) checkRest() (wanted int, waiting int64, wrong []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if e.state.paced || e.queue != nil && len(e.queue.older) > 0 {
			wrong = append(wrong, e.room+": unwritten states")
		}
		if len(e.waiters) > 0 || e.leaving.id != "" || e.wanted() && e.phase != held || e.refresh || e.personal || !e.in() {
			wrong = append(wrong, fmt.Sprintf("%s: %v, %d waiters, ending %q, refresh %t", e.room, e.phase, len(e.waiters), e.leaving.id, e.refresh))
		}
		if e.wanted() {
			wanted++
		}
		if e.phase == returning || e.lapsed {
			waiting++
		}
		if e.kept() != "" && e.phase != returning {
			wrong = append(wrong, fmt.Sprintf("%s: %v with a kept place", e.room, e.phase))
		}
		if (e.lapsed || e.overdue || e.refresh) && !e.wanted() || e.replaced.id != "" && e.phase != unsent && e.phase != sent {
			wrong = append(wrong, fmt.Sprintf("%s: %v, lapsed %t, overdue %t, refresh %t, replaced %q", e.room, e.phase, e.lapsed, e.overdue, e.refresh, e.replaced.id))
		}
	}
	return wanted, waiting, wrong
}

// nothingLeft asserts that nothing is left here or in Redis, and that no timer is armed.
func (r *rig) nothingLeft() {
	r.Helper()
	r.atRest()
	s := r.Stats()
	require.Zero(r, s.Connections)
	require.Zero(r, s.Entries)
	require.Zero(r, s.Rooms)
	require.Zero(r, r.wheel.Armed(), "timers")
	if r.Registry.paceWheel != nil {
		require.Zero(r, r.Registry.paceWheel.Armed(), "timers of states")
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
	require.NoError(r, r.Drain(ctx, store.CauseClosed, false))
}

// link is a transport that records its calls.
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
