package owner

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// Each key that is missing is written again at the next heartbeat, and without
// an event.
func TestCheckRestores(t *testing.T) {
	for _, lost := range []struct {
		name string
		lose func(f *fakeStore)
		back func(f *fakeStore) bool
	}{
		{"per-connection key", func(f *fakeStore) {
			h := f.rooms["long"]["c1"]
			h.until = time.Time{}
			f.rooms["long"]["c1"] = h
		}, func(f *fakeStore) bool { return f.rooms["long"]["c1"].until.After(time.Now()) }},
		{"metadata", func(f *fakeStore) { delete(f.conns, "c1") }, func(f *fakeStore) bool { return string(f.conns["c1"].Data) == "m1" }},
		{"index of entries", func(f *fakeStore) { clear(f.owned) }, func(f *fakeStore) bool { return len(f.owned[where{0, "I1"}]) == 9 }},
		{"fence", func(f *fakeStore) { clear(f.number) }, func(f *fakeStore) bool { return f.number[where{0, "I1"}] > 0 }},
		{"index of rooms", func(f *fakeStore) { f.unlisted["x"] = true }, func(f *fakeStore) bool { return !f.unlisted["x"] }},
		{"count", func(f *fakeStore) { f.miscounted["x"] = 1 }, func(f *fakeStore) bool { return len(f.miscounted) == 0 }},
	} {
		t.Run(lost.name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.rule("long", time.Minute)
				for i := range 3 {
					c := r.connect(fmt.Sprint("c", i))
					c.SetMeta(7, []byte(fmt.Sprint("m", i)))
					r.join(c, "x")
					r.join(c, "long")
				}
				r.beat(2)
				r.forgetSaid()
				r.redis.do(func() { lost.lose(r.redis) })
				r.beat(1)
				r.redis.do(func() { assert.True(r, lost.back(r.redis)) })
				r.redis.do(func() { assert.Zero(r, r.redis.wrong, "counts are those of what is there") })
				for _, line := range r.said() {
					assert.Equal(r, "R", line[:1], "subscribers get no event of it: %s", line)
				}
				r.beat(3)
				r.atRest()
			}, func(c *Config) { c.Heartbeat = time.Second })
		})
	}
}

// A connection that closes after its record was lost, and before or while the
// owner finds that out, says so to Redis: its leave carries that it was there.
func TestLeaveOfALostRecordIsKnown(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.fill(2)
		r.redis.do(func() { delete(r.redis.rooms, "x") })
		c[0].Close(store.CauseClosed)
		synctest.Wait()
		known := func() (n int) {
			for _, b := range r.redis.batches {
				for _, op := range b {
					if op.Kind == store.OpLeave && op.Room == "x" && op.Known {
						n++
					}
				}
			}
			return n
		}
		r.redis.do(func() { require.Equal(r, 1, known()) })
		// The other is found missing while joins are refused: its new entry is not
		// written when it closes.
		r.redis.do(func() { r.redis.refuse = func(op store.Op) bool { return op.Kind == store.OpJoin } })
		r.beat(1)
		c[1].Close(store.CauseClosed)
		r.redis.do(func() { r.redis.refuse = nil })
		time.Sleep(3 * time.Second)
		synctest.Wait()
		r.redis.do(func() { require.Equal(r, 2, known()) })
	})
}

// Rooms that change all the time are not taken for lost, and lost ones are found
// among them.
func TestTally(t *testing.T) {
	t.Parallel()
	found := func(n int) store.RoomCheck { return store.RoomCheck{Members: true, Listed: true, Entries: n} }
	calm, busy := tally{written: 5}, tally{written: 5, open: 1}
	later := tally{written: 6, open: 1, changes: 2}
	assert.False(t, calm.contradicts(calm, found(5)))
	assert.True(t, calm.contradicts(calm, found(4)))
	assert.True(t, calm.contradicts(calm, found(6)))
	assert.True(t, calm.contradicts(calm, store.RoomCheck{Entries: 5}), "no members")
	assert.False(t, calm.contradicts(calm, found(-1)), "another program's")
	assert.False(t, busy.contradicts(busy, found(6)))
	assert.False(t, busy.contradicts(later, found(2)))
	assert.True(t, busy.contradicts(later, found(1)))
	assert.False(t, tally{open: 1}.contradicts(tally{open: 1}, store.RoomCheck{}), "nothing is known to be there")
}

// A room whose count stays wrong, whatever is written, is written less and less
// often. What is lost later is found at the next heartbeat again.
func TestCheckGivesUpSlowly(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(20)
		r.beat(2)
		updates := func(beats int) (n int) {
			from := r.calls()
			r.beat(beats)
			r.redis.do(func() {
				for _, b := range r.redis.batches[from:] {
					for _, op := range b {
						if op.Kind == store.OpUpdate {
							n++
						}
					}
				}
			})
			return n
		}
		r.refuse(func(op store.Op) bool { return op.Kind == store.OpRecount })
		r.redis.do(func() { r.redis.miscounted["x"] = 1 })
		assert.Equal(r, 20, updates(1))
		assert.LessOrEqual(r, updates(100), 10*20)
		r.heal()
		r.beat(restoreRarely)
		r.redis.do(func() { assert.Empty(r, r.redis.miscounted) })
		r.beat(2)
		r.redis.do(func() { r.redis.miscounted["x"] = 1 })
		r.beat(1)
		r.redis.do(func() { assert.Empty(r, r.redis.miscounted) })
		r.atRest()
	}, func(c *Config) { c.Heartbeat = time.Second })
}

// Entries that have lapsed are cleaned up by other servers. They are looked for
// first, and no other entry is written again unless that explains nothing.
func TestCheckLooksForLapsedEntriesFirst(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", time.Minute)
		conns := r.fill(20)
		lapse := func(silent int) {
			for range 70 {
				r.sleep(time.Second)
				for _, c := range conns[silent:] {
					c.Seen()
				}
			}
			r.sleep(100 * time.Millisecond)
		}
		updates := func() (n int) {
			from := r.calls()
			r.heartbeat(false)
			r.redis.do(func() {
				for _, b := range r.redis.batches[from:] {
					for _, op := range b {
						if op.Kind == store.OpUpdate && op.Room == "x" {
							n++
						}
					}
				}
			})
			return n
		}
		lapse(3)
		assert.Zero(r, updates())
		r.redis.do(r.redis.reap)
		assert.Equal(r, 3, updates())
		assert.Zero(r, updates())

		lapse(5)
		r.redis.do(func() { r.redis.miscounted["x"] = 1 })
		assert.Equal(r, 2, updates(), "the next two may have been cleaned up")
		assert.Equal(r, 17, updates(), "they have not")
		r.redis.do(func() { assert.Empty(r, r.redis.miscounted) })
		assert.Zero(r, updates())
		for _, c := range conns {
			c.Seen()
		}
		r.sleep(time.Second)
		r.atRest()
	}, func(c *Config) { c.Heartbeat, c.EndSilent = 30*time.Second, false })
}
