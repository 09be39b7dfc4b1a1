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

// heartbeats makes n pairs of heartbeats, far enough apart for a comparison.
func (r *rig) heartbeats(n int) {
	r.Helper()
	for range n {
		r.sleep(3 * time.Second)
		r.heartbeat(false)
	}
}

func (r *rig) reconciles() uint64 { return r.Stats().Reconciles }

// fill makes n connections that are in x and in y.
func (r *rig) fill(n int) []*Conn {
	var conns []*Conn
	for i := range n {
		c := r.connect(fmt.Sprint("c", i))
		r.join(c, "x")
		r.join(c, "y")
		conns = append(conns, c)
	}
	r.atRest()
	return conns
}

func TestReconcileAfterTwoDifferences(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(5)
		r.heartbeats(10)
		assert.Zero(r, r.reconciles(), "nothing is wrong")
		calls := r.calls()

		orphan := store.EntryRef{Conn: "ghost", Entry: "g1", Room: "x"}
		r.redis.do(func() { r.redis.owned[ownerKey{0, "I1"}][orphan] = true })
		r.heartbeats(1)
		assert.Zero(r, r.reconciles())
		r.redis.do(func() { delete(r.redis.owned[ownerKey{0, "I1"}], orphan) })
		r.heartbeats(1)
		r.redis.do(func() { r.redis.owned[ownerKey{0, "I1"}][orphan] = true })
		r.heartbeats(1)
		assert.Zero(r, r.reconciles(), "not twice in a row")
		assert.Equal(r, calls, r.calls())
		r.heartbeats(1)
		assert.EqualValues(r, 1, r.reconciles())
		r.heartbeats(5)
		assert.EqualValues(r, 1, r.reconciles())
		assert.EqualValues(r, 1, r.Stats().Orphans)
		r.atRest()

		// No comparison while the writer is busy.
		r.redis.do(func() { r.redis.owned[ownerKey{0, "I1"}][orphan] = true })
		for i := range 5 {
			r.publish(conns[0], "x", fmt.Sprint(i), 0)
			r.sleep(time.Second)
			r.heartbeat(false)
		}
		assert.EqualValues(r, 1, r.reconciles())
		r.heartbeats(2)
		assert.EqualValues(r, 2, r.reconciles())
		r.drain()
		r.nothingLeft()
	})
}

// Orphans are ended, with an event if Redis shows them as members. Missing entries are
// written.
func TestReconcileRepairs(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(5)
		r.forgetTold()
		w := ownerKey{0, "I1"}
		r.redis.do(func() {
			r.redis.execute(w, store.Op{Kind: store.OpJoin, Room: "x", Conn: "ghost", Entry: "g1"})
			r.redis.execute(w, store.Op{Kind: store.OpConnect, Conn: "ghost"})
			r.redis.execute(w, store.Op{Kind: store.OpDisconnect, Conn: "c1"})
			r.redis.remove("y", "c2", store.CauseLeft) // the app has cleared a room
		})
		r.forgetTold()
		r.Heartbeat(-1, true)
		synctest.Wait()
		assert.ElementsMatch(r, []string{"L ghost/x c", "J c2/y"}, r.told())
		r.redis.do(func() {
			assert.Contains(r, r.redis.conns, "c1")
			assert.NotContains(r, r.redis.conns, "ghost")
		})
		r.atRest()
		assert.EqualValues(r, 2, r.Stats().Orphans)
		assert.EqualValues(r, 1, r.Stats().LeftClosed, "the leave of an orphan is counted like any other")
		r.heartbeats(3)
		assert.EqualValues(r, 1, r.reconciles())
		r.drain()
		r.nothingLeft()
	})
}

// The hash of a room was deleted or evicted, but not the index.
func TestCheckFindsLostRecords(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(3)
		r.heartbeats(1)
		r.forgetTold()
		r.redis.do(func() { delete(r.redis.rooms, "x") })
		r.heartbeats(1)
		assert.ElementsMatch(r, []string{"J c0/x", "J c1/x", "J c2/x"}, r.told())
		r.heartbeats(5)
		r.atRest()
		assert.Len(r, r.told(), 3)
		r.drain()
		r.nothingLeft()
	})
}

// One record of many is missing. The sizes do not show that, but reconciling after
// trouble does, and so does the one every ten minutes.
func TestReconcileFindsALostRecord(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(3)
		lose := func() {
			r.redis.do(func() {
				delete(r.redis.rooms["x"], "c1")
				r.redis.miscounted["x"] = 3
			})
		}
		r.forgetTold()
		lose()
		r.heartbeats(5)
		assert.Empty(r, r.told(), "sizes do not tell")
		r.heartbeat(true)
		assert.Equal(r, []string{"J c1/x"}, r.told())
		r.heartbeats(5)
		r.atRest()

		r.forgetTold()
		lose()
		for range 210 { // ten minutes
			r.heartbeats(1)
		}
		assert.Len(r, r.told(), 1, "without a reason, too")
		r.redis.do(func() { clear(r.redis.miscounted) })
		r.drain()
		r.nothingLeft()
	})
}

// Redis lost everything, and the incarnation goes on.
func TestEverythingLost(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(10)
		r.publish(conns[3], "x", "s", 0)
		conns[4].SetMeta(7, []byte("m"))
		synctest.Wait()
		r.redis.do(r.redis.flush)
		r.forgetTold()
		r.heartbeat(true)
		r.sleep(3 * time.Second)
		assert.Len(r, r.told(), 20)
		h, _ := r.storedEntry("x", "c3")
		assert.Equal(r, "s", h.state)
		h, _ = r.storedEntry("y", "c4")
		assert.Equal(r, "m", h.meta)
		r.redis.do(func() {
			assert.Len(r, r.redis.conns, 10)
			assert.EqualValues(r, 7, r.redis.conns["c4"].Version)
		})
		r.heartbeats(4)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// A demoted master took a batch over a connection that did not know of the change, so the
// new master lacks it. The next batch shows that, although the sizes agree and no call
// has failed.
func TestAcknowledgedBatchLost(t *testing.T) {
	doubts := 0
	virtual(t, func(r *rig) {
		conns := r.fill(2)
		r.publish(conns[0], "x", "before", 0)
		key := ownerKey{0, "I1"}
		var was storedEntry
		var number uint64
		r.redis.do(func() { was, number = r.redis.rooms["x"]["c0"], r.redis.number[key] })
		r.publish(conns[0], "x", "after", 0)
		r.redis.do(func() { r.redis.rooms["x"]["c0"], r.redis.number[key] = was, number })
		r.heartbeats(5)
		assert.Zero(r, r.reconciles(), "nothing tells")

		r.publish(conns[1], "x", "s", 0)
		assert.Equal(r, 1, doubts)
		r.heartbeat(false) // requested by RenewLease
		h, _ := r.storedEntry("x", "c0")
		assert.Equal(r, "after", h.state)
		assert.EqualValues(r, 1, r.reconciles())
		r.atRest()
		r.drain()
		r.nothingLeft()
	}, func(c *Config) { c.RenewLease = func() { doubts++ } })
}

// Another server has set metadata while this one did not receive its messages.
func TestReconcileReadsMetadata(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(300)
		r.redis.do(func() { r.redis.conns["c299"] = store.MetaValue{Version: 4, Data: []byte("new"), Owner: "I1"} })
		r.heartbeat(true)
		meta, version := conns[299].Metadata()
		assert.Equal(r, "new", string(meta))
		assert.EqualValues(r, 4, version)
		h, _ := r.storedEntry("y", "c299")
		assert.Equal(r, "new", h.meta)
		r.atRest()
	})
}

// One node of a cluster is out of reach for a long time. Its bucket is tried at every
// heartbeat, and the others are compared once.
func TestOneBucketOutOfReach(t *testing.T) {
	bucket := func(name string) int { return map[string]int{"y": 1, "c1": 1}[name] }
	virtual(t, func(r *rig) {
		conns := r.fill(2)
		r.redis.do(func() {
			r.redis.bucket, r.redis.unreadable = bucket, func(b int) bool { return b == 1 }
			for _, id := range []string{"c0", "c1"} {
				r.redis.conns[id] = store.MetaValue{Version: 4, Data: []byte("new"), Owner: "I1"}
			}
		})
		versions := func() []uint64 {
			_, first := conns[0].Metadata()
			_, second := conns[1].Metadata()
			return []uint64{first, second}
		}
		r.heartbeat(true)
		assert.Equal(r, []uint64{4, 0}, versions(), "what can be reached is read")
		audits, ops := r.reconciles(), r.Stats().Ops
		r.heartbeats(50)
		assert.Equal(r, audits+50, r.reconciles(), "of the lost one alone")
		assert.Equal(r, ops, r.Stats().Ops, "nothing is written again")
		r.redis.do(func() {
			assert.Equal(r, 1, r.redis.metaReads["c0"])
			assert.Equal(r, 51, r.redis.metaReads["c1"])
			r.redis.unreadable = nil
			delete(r.redis.rooms, "y") // the index does not show that
		})

		r.forgetTold()
		r.heartbeats(1)
		assert.ElementsMatch(r, []string{"J c0/y", "J c1/y", "M c1/x"}, r.told(), "the other one is not compared again")
		assert.Equal(r, []uint64{4, 4}, versions())
		r.heartbeats(5) // orphans of the deleted room
		audits, ops = r.reconciles(), r.Stats().Ops
		r.heartbeats(20)
		assert.Equal(r, audits, r.reconciles())
		assert.Equal(r, ops, r.Stats().Ops)
		r.atRest()
	}, func(c *Config) { c.Buckets, c.RoomBucket, c.ConnBucket = 2, bucket, bucket })
}

// A connection with the id of an orphan comes back before the orphan is ended.
func TestOrphanComesBack(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(1)
		r.redis.do(func() {
			r.redis.execute(ownerKey{0, "I1"}, store.Op{Kind: store.OpConnect, Conn: "ghost"})
		})
		// The writer is busy while the orphan is found and the connection is made.
		r.plan(func(call int, _ []store.Op) fault {
			if call == 0 {
				return fault{before: time.Second}
			}
			return fault{}
		})
		busy := r.connect("busy")
		r.sleep(100 * time.Millisecond)
		r.heartbeat(true)
		assert.EqualValues(r, 1, r.Stats().Orphans)
		c := r.connect("ghost")
		require.NoError(r, c.Registered(r.Context()))
		require.NoError(r, busy.Registered(r.Context()))
		r.endOrphan(r.writers[0], store.EntryRef{Conn: "ghost"}) // found before, queued after
		synctest.Wait()
		r.redis.do(func() { assert.Equal(r, "I1", r.redis.conns["ghost"].Owner) })
		r.atRest()
	})
}
