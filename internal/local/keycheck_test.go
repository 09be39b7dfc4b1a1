package local

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// Each missing key is written again at the next heartbeat, without an event.
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
		{"index of entries", func(f *fakeStore) { clear(f.owned) }, func(f *fakeStore) bool { return len(f.owned[ownerKey{0, "I1"}]) == 9 }},
		{"fence", func(f *fakeStore) { clear(f.number) }, func(f *fakeStore) bool { return f.number[ownerKey{0, "I1"}] > 0 }},
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
				r.heartbeats(2)
				r.forgetTold()
				r.redis.do(func() { lost.lose(r.redis) })
				r.heartbeats(1)
				r.redis.do(func() { assert.True(r, lost.back(r.redis)) })
				r.redis.do(func() { assert.Zero(r, r.redis.wrongRecounts, "counts are those of what is there") })
				for _, line := range r.told() {
					assert.Equal(r, "R", line[:1], "subscribers get no event of it: %s", line)
				}
				r.heartbeats(3)
				r.atRest()
			}, func(c *Config) { c.Heartbeat = time.Second })
		})
	}
}

// A connection closes after its record was lost, before or while the registry finds that
// out. Its leave tells Redis that the connection was there.
func TestLeaveOfALostRecordIsKnown(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.fill(2)
		r.redis.do(func() { delete(r.redis.rooms, "x") })
		c[0].Close(store.CauseClosed, false)
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
		// The other connection is found missing while joins are refused, so its new entry
		// is not written when it closes.
		r.redis.do(func() { r.redis.refuse = func(op store.Op) bool { return op.Kind == store.OpJoin } })
		r.heartbeats(1)
		c[1].Close(store.CauseClosed, false)
		r.redis.do(func() { r.redis.refuse = nil })
		time.Sleep(3 * time.Second)
		synctest.Wait()
		r.redis.do(func() { require.Equal(r, 2, known()) })
	})
}

// Rooms that change all the time do not count as lost, and lost rooms are found among
// them.
func TestRoomCounts(t *testing.T) {
	t.Parallel()
	found := func(n int) store.RoomCheck { return store.RoomCheck{Members: true, Listed: true, Entries: n} }
	calm, busy := roomCount{written: 5}, roomCount{written: 5, uncertain: 1}
	later := roomCount{written: 6, uncertain: 1, changes: 2}
	assert.False(t, calm.contradicts(calm, found(5)))
	assert.True(t, calm.contradicts(calm, found(4)))
	assert.True(t, calm.contradicts(calm, found(6)))
	assert.True(t, calm.contradicts(calm, store.RoomCheck{Entries: 5}), "no members")
	assert.False(t, calm.contradicts(calm, found(-1)), "another program's")
	assert.False(t, busy.contradicts(busy, found(6)))
	assert.False(t, busy.contradicts(later, found(2)))
	assert.True(t, busy.contradicts(later, found(1)))
	assert.False(t, roomCount{uncertain: 1}.contradicts(roomCount{uncertain: 1}, store.RoomCheck{}), "nothing is known to be there")
}

// A room whose count stays wrong after each write is written less and less often. A later
// loss is found at the next heartbeat again.
func TestRestoringGetsRarer(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(20)
		r.heartbeats(2)
		updates := func(heartbeats int) (n int) {
			from := r.calls()
			r.heartbeats(heartbeats)
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
		r.heartbeats(maxRestorePause)
		r.redis.do(func() { assert.Empty(r, r.redis.miscounted) })
		r.heartbeats(2)
		r.redis.do(func() { r.redis.miscounted["x"] = 1 })
		r.heartbeats(1)
		r.redis.do(func() { assert.Empty(r, r.redis.miscounted) })
		r.atRest()
	}, func(c *Config) { c.Heartbeat = time.Second })
}

// Other servers clean up lapsed entries. Those are verified first, and other entries are
// written again only if that explains nothing.
func TestKeyCheckVerifiesLapsedEntriesFirst(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", time.Minute)
		conns := r.fill(20)
		lapse := func(silent int) {
			for range 70 {
				r.sleep(time.Second)
				for _, c := range conns[silent:] {
					c.Touched()
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
		r.redis.do(r.redis.cleanUpExpired)
		assert.Equal(r, 3, updates())
		assert.Zero(r, updates())

		lapse(5)
		r.redis.do(func() { r.redis.miscounted["x"] = 1 })
		assert.Equal(r, 2, updates(), "the next two may have been cleaned up")
		assert.Equal(r, 17, updates(), "they have not")
		r.redis.do(func() { assert.Empty(r, r.redis.miscounted) })
		assert.Zero(r, updates())
		for _, c := range conns {
			c.Touched()
		}
		r.sleep(time.Second)
		r.atRest()
	}, func(c *Config) { c.Heartbeat, c.EndSilent = 30*time.Second, false })
}
