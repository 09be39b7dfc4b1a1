package occupancy

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

var (
	modelSeeds = flag.Uint64("occupancy.seeds", 60, "number of seeds of TestModel")
	modelFrom  = flag.Uint64("occupancy.from", 0, "first seed of TestModel")
)

// modelBuckets is the number of buckets, and modelRooms that of the rooms, of which each
// bucket has as many.
const (
	modelBuckets = 3
	modelRooms   = 9
)

// model is a random history of some rooms, with watchers that come and go, and faults of
// Redis and of the way to it. fakeWatcher and fakeListener check everything that they get.
type model struct {
	*harness
	random   *rand.Rand
	watchers []*fakeWatcher
	copies   map[string]*fakeRoom // of replicas
	work     sync.WaitGroup       // calls of Watch
}

func (m *model) chance(percent int) bool { return m.random.IntN(100) < percent }

func (m *model) room() string { return fmt.Sprint("r", m.random.IntN(modelRooms)) }

// change changes a room. Its event may be lost, late or doubled.
func (m *model) change(room string) {
	conn, user := fmt.Sprint("c", m.random.IntN(6)), ""
	if m.chance(70) {
		user = fmt.Sprint("u", m.random.IntN(3))
	}
	kind := m.random.IntN(10)
	m.redis.change(room, func(r *fakeRoom) {
		switch {
		case kind < 4:
			r.join(conn, user)
		case kind < 8:
			r.leave(conn)
		case kind == 8:
			for conn := range r.conns {
				r.leave(conn)
			}
		}
	})
	switch {
	case m.chance(2): // lost
	case m.chance(30):
		d := time.Duration(m.random.IntN(50)) * time.Millisecond
		m.work.Go(func() { time.Sleep(d); m.listener.send(room) })
	case m.chance(5):
		m.listener.send(room)
		fallthrough
	default:
		m.listener.send(room)
	}
}

// watch lets a watcher watch some rooms, on a goroutine of its own.
func (m *model) watch() {
	w := m.watchers[m.random.IntN(len(m.watchers))]
	if !w.busy.CompareAndSwap(false, true) {
		return // the commands of one connection follow each other
	}
	rooms := make([]string, 1+m.random.IntN(5))
	for i := range rooms {
		rooms[i] = m.room()
	}
	w.asked = rooms
	limit := time.Duration(1+m.random.IntN(3000)) * time.Millisecond
	m.work.Go(func() {
		defer w.busy.Store(false)
		ctx, cancel := context.WithTimeout(m.t.Context(), limit)
		defer cancel()
		w.hold()
		w.start(m.Watch(ctx, w, rooms))
	})
}

// unwatch ends watches, also those that wait.
func (m *model) unwatch() {
	w := m.watchers[m.random.IntN(len(m.watchers))]
	room, busy := m.room(), w.busy.Load()
	switch {
	case m.chance(30) && !busy: // a call of Watch may be about to add rooms
		w.unwatchAll()
	case !busy || !slices.Contains(w.asked, room):
		w.unwatch(room)
	}
}

// fault causes or ends one fault.
func (m *model) fault() {
	bucket, room := m.random.IntN(modelBuckets), m.room()
	if m.lossy && m.chance(60) {
		m.lose(room)
		return
	}
	switch m.random.IntN(9) {
	case 0:
		m.listener.disconnect()
	case 1, 2:
		m.listener.reconnect()
	case 3:
		m.redis.set(func(f *fakeRedis) { f.away[bucket] = !f.away[bucket] })
	case 4:
		m.redis.set(func(f *fakeRedis) { f.hangs[bucket] = !f.hangs[bucket] })
	case 5:
		m.redis.set(func(f *fakeRedis) { f.latency = time.Duration(m.random.IntN(400)) * time.Millisecond })
	case 6:
		m.redis.set(func(f *fakeRedis) { clear(f.away); clear(f.hangs); f.latency = time.Millisecond })
	case 7:
		m.Resync()
	case 8:
		m.pass(time.Duration(m.random.IntN(12000)) * time.Millisecond)
	}
}

// lose lets Redis lose a room, or writes of it.
func (m *model) lose(room string) {
	switch m.random.IntN(5) {
	case 0:
		m.copies[room] = m.redis.copyOf(room)
	case 1, 2:
		if c := m.copies[room]; c != nil {
			m.redis.replace(room, c)
		}
	case 3:
		m.redis.replace(room, nil)
	case 4:
		m.redis.set(func(f *fakeRedis) {
			if r := f.rooms[room]; r != nil {
				r.rebuilding = !r.rebuilding
			}
		})
	}
}

// pass lets time pass.
func (m *model) pass(d time.Duration) { time.Sleep(d) }

// calm ends all faults and waits until everything must be right.
func (m *model) calm() {
	m.redis.set(func(f *fakeRedis) {
		clear(f.away)
		clear(f.hangs)
		f.latency = time.Millisecond
		for _, r := range f.rooms {
			r.rebuilding = false
		}
	})
	if m.listener.isDown() { // otherwise only comparisons find events that were lost
		m.listener.reconnect()
	}
	m.work.Wait()
	// Two comparisons find what was lost, and lost data count after UncertainFor.
	m.sleep(2*10*time.Second + 11*time.Second + 2*m.slowest() + 5*time.Second)
	for _, w := range m.watchers {
		for room := range w.all() {
			m.requireTruth(w, room)
		}
		require.Equal(m.t, len(w.all()), m.RoomsOf(w))
	}
	require.Zero(m.t, m.Stats().Stale)
}

func (m *model) slowest() (most time.Duration) {
	for _, d := range m.every {
		most = max(most, d)
	}
	return most
}

func TestModel(t *testing.T) {
	t.Parallel()
	seeds := *modelSeeds
	if testing.Short() {
		seeds /= 4
	}
	for seed := *modelFrom; seed < *modelFrom+seeds; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { runModel(t, seed) })
		})
	}
}

func runModel(t *testing.T, seed uint64) {
	bucket := func(room string) int { return int(room[1]-'0') % modelBuckets }
	h := newHarness(t, func(c *Config) { c.Bucket = bucket })
	m := &model{harness: h, random: rand.New(rand.NewPCG(seed, 14)), copies: map[string]*fakeRoom{}}
	h.lossy = seed%3 == 0
	for i := range modelRooms {
		m.every[fmt.Sprint("r", i)] = []time.Duration{100 * time.Millisecond, time.Second, 3 * time.Second}[m.random.IntN(3)]
	}
	for range 2 + m.random.IntN(4) {
		m.watchers = append(m.watchers, h.newWatcher())
	}
	for range 3 {
		for range 400 {
			m.change(m.room())
			switch {
			case m.chance(10):
				m.watch()
			case m.chance(8):
				m.unwatch()
			case m.chance(3):
				m.fault()
			}
			if m.chance(40) {
				m.pass(time.Duration(m.random.IntN(200)) * time.Millisecond)
			}
		}
		m.calm()
	}
	for _, w := range m.watchers {
		m.UnwatchAll(w)
	}
	m.sleep(6 * time.Second)
	require.False(t, m.Watching())
	require.Empty(t, m.watched)
	require.Empty(t, m.listener.confirmed)
}
