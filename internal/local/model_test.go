package local

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// model makes random requests while Redis misbehaves at random, and knows where each
// connection has to be in the end.
type model struct {
	*rig
	rng   *rand.Rand
	conns map[string]*Conn
	rooms map[string]map[string]bool // requested, by connection
	users bool
	count int
	lives int

	mu   sync.Mutex
	lost map[entryName]bool // entries that the registry gave up: the room was full, or another connection took the place
	work sync.WaitGroup
}

type entryName struct{ conn, room string }

var modelRooms = []string{"a", "b", "short", "long"}

// Whatever was requested and whatever went wrong, Redis holds exactly the requested
// entries in the end, and the history of events is legal.
func TestModel(t *testing.T) {
	t.Parallel()
	runModel(t, false)
}

// With users, an entry that was requested may be missing if its room was full or another
// connection of its user took its place. A user has connections or one kept place.
func TestModelOfUsers(t *testing.T) {
	t.Parallel()
	runModel(t, true)
}

func runModel(t *testing.T, users bool) {
	seeds := 150
	if testing.Short() {
		seeds = 20
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			virtual(t, func(r *rig) {
				m := &model{
					rig: r, rng: rand.New(rand.NewPCG(uint64(seed), 7)), lives: 1,
					conns: make(map[string]*Conn), rooms: make(map[string]map[string]bool),
					users: users, lost: make(map[entryName]bool),
				}
				r.lose = m.lose
				if seed%2 == 1 {
					r.maxOps, r.maxRoutineOps = 3, 2 // so that batches are often taken ahead
				}
				r.rule("short", 2*time.Second)
				r.rule("long", 6*time.Second)
				r.pace("b", 200*time.Millisecond)
				r.pace("short", time.Second)
				r.keep("a", 3*time.Second)
				r.keep("short", time.Second)
				r.cap("b", 5, 0)
				r.cap("short", 0, 2)
				for range 120 {
					m.step()
					r.redis.do(func() { require.Empty(t, r.redis.unfair()) })
				}
				m.settle()
				m.compare()
				r.drain()
				r.sleep(5 * time.Second) // until the places of the last hand-overs are forgotten
				r.nothingLeft()
				requireLegal(r, r.redis.events)
			}, func(cfg *Config) {
				cfg.EndSilent = seed%4 > 0
				if users {
					withUsers(cfg)
				} else {
					cfg.Caps = nil
				}
				if seed%3 == 0 {
					cfg.Buckets = 2
					cfg.RoomBucket = func(room string) int { return len(room) % 2 }
				}
			})
		})
	}
}

// later runs a request in the background. The registry has noted the request when later
// returns.
func (m *model) later(f func() error) {
	m.work.Go(func() { _ = f() })
	synctest.Wait()
}

func (m *model) pick() (string, *Conn, bool) {
	ids := make([]string, 0, len(m.conns))
	for id := range m.conns {
		ids = append(ids, id)
	}
	if len(ids) == 0 {
		return "", nil, false
	}
	slices.Sort(ids)
	id := ids[m.rng.IntN(len(ids))]
	return id, m.conns[id], true
}

func (m *model) step() {
	id, c, ok := m.pick()
	room := modelRooms[m.rng.IntN(len(modelRooms))]
	n := m.rng.IntN(100)
	switch {
	case n < 8 || !ok:
		m.connect()
	case n < 30:
		m.join(id, c, room)
	case n < 42:
		m.later(func() error { _, err := c.Leave(m.Context(), room, store.CauseLeft); return err })
		delete(m.rooms[id], room)
	case n < 54:
		m.count++
		data, after := []byte(fmt.Sprint("s", m.count)), time.Duration(m.rng.IntN(3))*time.Second
		m.later(func() error { return c.PublishState(m.Context(), room, data, after, m.rng.IntN(2) > 0) })
	case n < 56:
		m.burst(c, room)
	case n < 58:
		m.later(func() error { return c.ClearState(m.Context(), room) })
	case n < 62:
		m.count++
		c.SetMeta(uint64(m.count), m.meta())
	case n < 66:
		c.Close(store.CauseClosed, m.rng.IntN(2) > 0)
		delete(m.conns, id)
		delete(m.rooms, id)
	case n < 74:
		for _, c := range m.conns {
			c.Touched()
		}
	case n < 80:
		m.fault()
	case n < 83:
		m.heal()
	case n < 85:
		m.heartbeat(m.rng.IntN(2) > 0)
	default:
		m.disturb(n)
	}
}

// join requests a join, with users sometimes on special terms.
func (m *model) join(id string, c *Conn, room string) {
	var opts JoinOptions
	if m.users && m.rng.IntN(3) == 0 {
		opts.Replaces, _, _ = m.pick()
		opts.OverCap = m.rng.IntN(4) == 0
	}
	m.mu.Lock()
	delete(m.lost, entryName{id, room})
	m.mu.Unlock()
	m.later(func() error {
		_, err := c.JoinIf(m.Context(), room, opts)
		if _, full := errors.AsType[*FullError](err); full {
			m.lose(id, room)
		}
		return err
	})
	m.rooms[id][room] = true
}

// lose notes that the registry gave up an entry.
func (m *model) lose(conn, room string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lost[entryName{conn, room}] = true
}

// gaveUp reports whether the registry rightly gave up a requested entry.
func (m *model) gaveUp(conn, room string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.conns[conn].In(room) && m.lost[entryName{conn, room}]
}

// meta returns new metadata, with users mostly that of one of three.
func (m *model) meta() []byte {
	if !m.users {
		return []byte(fmt.Sprint("m", m.count))
	}
	if user := m.rng.IntN(4); user > 0 {
		return []byte(fmt.Sprintf("@u%d m%d", user, m.count))
	}
	return []byte(fmt.Sprint("m", m.count))
}

// burst sets several states without waiting.
func (m *model) burst(c *Conn, room string) {
	for range 1 + m.rng.IntN(2*maxOpsPerItem) {
		m.count++
		w, err := c.SetState(room, []byte(fmt.Sprint("s", m.count)), 0, false)
		if err == nil {
			m.later(func() error { return w.Await(m.Context()) })
		}
	}
}

func (m *model) connect() {
	id := fmt.Sprint("c", m.rng.IntN(12))
	if _, taken := m.conns[id]; taken {
		return
	}
	var meta []byte
	if m.users {
		meta = m.meta()
	}
	c, err := m.Connect(id, meta, nil, func() {})
	if err != nil { // it is still closing
		require.ErrorIs(m, err, ErrExists)
		return
	}
	m.conns[id], m.rooms[id] = c, make(map[string]bool)
}

// disturb does what rarely happens to a server.
func (m *model) disturb(n int) {
	switch n {
	case 85:
		old := m.incarnation()
		m.lives++
		m.redis.do(func() { m.redis.dead[old] = true }) // cleaned up later
		m.reregister(fmt.Sprint("I", m.lives), m.rng.IntN(3) == 0)
	case 86:
		old := m.incarnation()
		m.lives++
		m.setIncarnation(fmt.Sprint("I", m.lives)) // reported only after a while
		m.redis.do(func() { m.redis.cleanUpDead(old) })
		m.sleep(time.Duration(m.rng.IntN(500)) * time.Millisecond)
		m.Reregistered(m.rng.IntN(3) == 0)
	case 87:
		m.redis.do(func() {
			dead := maps.Clone(m.redis.dead) // their batches are long gone by then
			m.redis.flush()
			m.redis.dead = dead
			m.redis.events = append(m.redis.events, event{kind: dataLost})
		})
		m.Heartbeat(-1, true)
	case 88:
		m.redis.do(m.redis.cleanUpExpired)
		m.redis.do(m.redis.endKept)
	case 89:
		room := modelRooms[m.rng.IntN(len(modelRooms))]
		m.rule(room, time.Duration(m.rng.IntN(4))*time.Second)
		m.pace(room, time.Duration(m.rng.IntN(3))*500*time.Millisecond)
		m.keep(room, time.Duration(m.rng.IntN(4))*time.Second)
		m.ApplyRules(m.Rooms())
	default:
		m.sleep(time.Duration(m.rng.IntN(1200)) * time.Millisecond)
	}
}

// fault makes some of the calls fail from now on.
func (m *model) fault() {
	share := m.rng.IntN(100)
	rng := rand.New(rand.NewPCG(m.rng.Uint64(), 1)) // its own, because it is used under the lock of the fake
	upTo := func(d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }
	m.plan(func(int, []store.Op) fault {
		x := fault{before: upTo(50 * time.Millisecond), after: upTo(50 * time.Millisecond)}
		if rng.IntN(100) >= share {
			return x
		}
		switch rng.IntN(5) {
		case 0:
			x.never = true
		case 1:
			x.lost = true
		case 2:
			x.late = time.Millisecond + upTo(3*time.Second)
		case 3:
			x.before, x.lost = upTo(1800*time.Millisecond), rng.IntN(2) > 0
		case 4:
			x.half = true
		}
		return x
	})
	refused := rng.IntN(100)
	m.refuse(func(store.Op) bool { return rng.IntN(300) < refused })
}

// settle lets all requests finish: Redis is well, dead incarnations are cleaned up, and
// every connection gives a sign of life.
func (m *model) settle() {
	m.heal()
	m.redis.do(func() {
		for n := 1; n < m.lives; n++ {
			m.redis.cleanUpDead(fmt.Sprint("I", n))
		}
	})
	for range 20 {
		for _, c := range m.conns {
			c.Touched()
		}
		m.sleep(400 * time.Millisecond)
		m.heartbeat(false)
		m.redis.do(m.redis.endKept)
	}
	m.heartbeat(true)
	m.sleep(100 * time.Millisecond)
	m.work.Wait()
	m.atRest()
}

// compare asserts that Redis holds the requested entries and nothing else.
func (m *model) compare() {
	m.Helper()
	there := 0
	m.redis.do(func() {
		for _, members := range m.redis.rooms {
			there += len(members)
		}
	})
	for id, rooms := range m.rooms {
		c := m.conns[id]
		for room := range rooms {
			if m.gaveUp(id, room) {
				continue
			}
			there--
			h, ok := m.storedEntry(room, id)
			require.True(m, ok, "%s is not in %s", id, room)
			c.mu.Lock()
			e := c.entries[room]
			want := storedEntry{
				entry: e.id, inc: m.incarnation(), ttl: m.ttl(room), until: h.until, metaVersion: h.metaVersion, meta: string(c.meta),
				stateVersion: h.stateVersion, state: string(e.state.data), silent: h.silent, user: c.userID(), took: h.took,
			}
			if want.user != "" {
				want.grace = m.grace(room)
			}
			c.mu.Unlock()
			require.Equal(m, want, h, "%s in %s", id, room)
			require.Equal(m, h.ttl > 0, h.until.After(time.Now()))
			require.Equal(m, h.ttl == 0, h.until.IsZero())
		}
		meta, _ := c.Metadata()
		var stored store.MetaValue
		m.redis.do(func() { stored = m.redis.conns[id] })
		require.Equal(m, string(meta), string(stored.Data), "metadata of %s", id)
		require.Equal(m, m.incarnation(), stored.Owner)
	}
	require.Zero(m, there, "entries that were not requested")
	connections := 0
	m.redis.do(func() { connections = len(m.redis.conns) })
	require.Equal(m, len(m.conns), connections)
}
