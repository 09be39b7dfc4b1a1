package local

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

// crowd is the number of connections that make a backlog. At crowdCost per op, Redis
// needs 2.6 s for one change of each. That is longer than the life of a key with a TTL of
// a second.
const (
	crowd      = 10_000
	crowdBatch = 16
	crowdCost  = 200 * time.Microsecond
	// extra is the additional time that an operation may take beside a backlog.
	extra = 50 * time.Millisecond
)

// crowdedRig is a registry with an idle crowd and some connections that are in use.
type crowdedRig struct {
	*rig
	crowd []*Conn
	few   []*Conn // in rooms with TTLs of 1, 2 and 4 s, touched ten times a second
	work  sync.WaitGroup
	over  atomic.Bool
}

func newCrowded(r *rig) *crowdedRig {
	r.maxOps, r.maxRoutineOps = crowdBatch, crowdBatch
	w := &crowdedRig{rig: r}
	for _, seconds := range []int{1, 2, 4} {
		room := fmt.Sprint("ttl", seconds)
		r.rule(room, time.Duration(seconds)*time.Second)
		for i := range 10 {
			c := r.connect(fmt.Sprint(room, "-", i))
			r.join(c, room)
			w.few = append(w.few, c)
		}
	}
	for i := range crowd {
		w.crowd = append(w.crowd, r.connect(fmt.Sprint("crowd", i)))
	}
	w.all(func(c *Conn) { _, _ = c.Join(r.Context(), "hall") })
	w.work.Wait()
	r.forgetTold()
	r.plan(func(_ int, ops []store.Op) fault {
		return fault{before: time.Millisecond + time.Duration(len(ops))*crowdCost}
	})
	return w
}

// all calls do for each of the crowd at once.
func (w *crowdedRig) all(do func(c *Conn)) {
	for _, c := range w.crowd {
		w.work.Go(func() { do(c) })
	}
}

// use touches the few ten times a second until the test ends. Expired keys end their
// entries, as other servers would do it.
func (w *crowdedRig) use() {
	w.work.Go(func() {
		for range time.Tick(100 * time.Millisecond) {
			if w.over.Load() {
				return
			}
			for _, c := range w.few {
				c.Touched()
			}
			w.redis.do(w.redis.cleanUpExpired)
		}
	})
}

// watch lets time pass, and returns the longest time that a join and a leave of an
// unrelated connection took.
func (w *crowdedRig) watch(name string, d time.Duration) (longest time.Duration) {
	for step := range int(d / (50 * time.Millisecond)) {
		began := time.Now()
		room := fmt.Sprint("room", step)
		c := w.connect(fmt.Sprint(name, step))
		_, err := c.Join(w.Context(), room)
		assert.NoError(w, err)
		longest = max(longest, time.Since(began))
		began = time.Now()
		_, err = c.Leave(w.Context(), room, store.CauseLeft)
		assert.NoError(w, err)
		longest = max(longest, time.Since(began))
		c.Close(store.CauseClosed, false)
		time.Sleep(max(0, 50*time.Millisecond-time.Since(began)))
	}
	return longest
}

// backlogs are the ways to write everything at once.
var backlogs = []struct {
	name string
	make func(w *crowdedRig)
}{
	{"comparison", func(w *crowdedRig) { w.Heartbeat(-1, true) }},
	{"reregistration", func(w *crowdedRig) {
		w.reregister("I2", false)
		w.work.Go(func() { // other servers clean up after the old incarnation, later
			time.Sleep(5 * time.Second)
			w.redis.do(func() { w.redis.cleanUpDead("I1") })
		})
	}},
	{"mass disconnect", func(w *crowdedRig) {
		for _, c := range w.crowd {
			c.Close(store.CauseClosed, false)
		}
	}},
	{"mass join", func(w *crowdedRig) { w.all(func(c *Conn) { _, _ = c.Join(w.Context(), "yard") }) }},
	{"mass join of one room each", func(w *crowdedRig) { w.all(func(c *Conn) { _, _ = c.Join(w.Context(), "of "+c.ID()) }) }},
	{"mass connect", func(w *crowdedRig) {
		for i := range crowd {
			w.connect(fmt.Sprint("more", i))
		}
	}},
	{"mass leave", func(w *crowdedRig) { w.all(func(c *Conn) { _, _ = c.Leave(w.Context(), "hall", store.CauseLeft) }) }},
	{"states of all", func(w *crowdedRig) {
		w.all(func(c *Conn) { _ = c.PublishState(w.Context(), "hall", []byte("s"), 0, false) })
	}},
	{"metadata of all", func(w *crowdedRig) {
		for _, c := range w.crowd {
			c.SetMeta(7, []byte("m"))
		}
	}},
	{"other rules", func(w *crowdedRig) {
		w.rule("hall", 30*time.Second)
		w.ApplyRules(w.Rooms())
	}},
	{"redis emptied", func(w *crowdedRig) {
		w.redis.do(func() {
			w.redis.flush()
			w.redis.number[ownerKey{0, "I1"}] = 1 << 40 // it has no number to miss
		})
		w.reregister("I2", false)
	}},
}

// A backlog of work that can wait delays nothing else. Keys with a short TTL are
// refreshed in time, and joins and leaves of others take at most 50 ms more.
func TestNoBacklogDelaysOthers(t *testing.T) {
	if testing.Short() {
		t.Skip("left out by -short: backlogs of ten thousand connections")
	}
	for _, b := range backlogs {
		t.Run(b.name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				w := newCrowded(r)
				defer w.over.Store(true)
				w.use()
				alone := w.watch("alone", 3*time.Second)
				calls := r.calls()
				b.make(w)
				synctest.Wait()
				beside := w.watch("beside", 4*time.Second)
				assert.Greater(r, r.calls()-calls, crowd/crowdBatch, "there was a backlog")
				assert.LessOrEqual(r, beside, alone+extra)
				for _, e := range w.told() {
					assert.NotRegexp(r, "^L ttl", e, "a member that was alive")
				}
				r.sleep(10 * time.Second)
				r.heal()
				w.over.Store(true)
				w.work.Wait()
				r.atRest()
			})
		})
	}
}

// After a reregistration other servers soon end the entries of the old incarnation. While
// others set more states than Redis can take, entries still get their share, and
// registrations, whose end is not visible, do not take it from them.
func TestReregisterUnderLoad(t *testing.T) {
	virtual(t, func(r *rig) {
		w := newCrowded(r)
		for i := range 100 {
			c, room := w.connect(fmt.Sprint("busy", i)), fmt.Sprint("busy", i)
			r.join(c, room)
			w.work.Go(func() {
				for !w.over.Load() {
					_ = c.PublishState(r.Context(), room, []byte("s"), 0, false)
					time.Sleep(time.Millisecond)
				}
			})
		}
		r.sleep(time.Second)
		w.reregister("I2", false)
		r.sleep(11 * time.Second)
		old := 0
		r.redis.do(func() {
			for _, h := range r.redis.rooms["hall"] {
				if h.inc == "I1" {
					old++
				}
			}
		})
		assert.Zero(r, old)
		w.over.Store(true)
		r.heal()
		w.work.Wait()
		r.sleep(time.Second)
		r.atRest()
	})
}
