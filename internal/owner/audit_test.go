package owner

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// beat does as many heartbeats as it takes for two in a row to be comparable.
func (r *rig) beat(n int) {
	r.Helper()
	for range n {
		r.sleep(3 * time.Second)
		r.heartbeat(false)
	}
}

func (r *rig) audits() uint64 { return r.Stats().Audits }

// fill makes n connections that are in x, and in y.
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

func TestAuditOnlyWhereSizesDifferTwice(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(5)
		r.beat(10)
		assert.Zero(r, r.audits(), "nothing is wrong")
		calls := r.calls()

		stray := store.OwnedRef{Conn: "ghost", Entry: "g1", Room: "x"}
		r.redis.do(func() { r.redis.owned[where{0, "I1"}][stray] = true })
		r.beat(1)
		assert.Zero(r, r.audits())
		r.redis.do(func() { delete(r.redis.owned[where{0, "I1"}], stray) })
		r.beat(1)
		r.redis.do(func() { r.redis.owned[where{0, "I1"}][stray] = true })
		r.beat(1)
		assert.Zero(r, r.audits(), "not twice in a row")
		assert.Equal(r, calls, r.calls())
		r.beat(1)
		assert.EqualValues(r, 1, r.audits())
		r.beat(5)
		assert.EqualValues(r, 1, r.audits())
		assert.EqualValues(r, 1, r.Stats().Strays)
		r.atRest()

		// Never while it is moving.
		r.redis.do(func() { r.redis.owned[where{0, "I1"}][stray] = true })
		for i := range 5 {
			r.publish(conns[0], "x", fmt.Sprint(i), 0)
			r.sleep(time.Second)
			r.heartbeat(false)
		}
		assert.EqualValues(r, 1, r.audits())
		r.beat(2)
		assert.EqualValues(r, 2, r.audits())
		r.drain()
		r.nothingLeft()
	})
}

// Strays are ended, and tell so where they were somebody; what is missing is
// written.
func TestAuditRepairs(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(5)
		r.forgetSaid()
		w := where{0, "I1"}
		r.redis.do(func() {
			r.redis.execute(w, store.Op{Kind: store.OpJoin, Room: "x", Conn: "ghost", Entry: "g1"})
			r.redis.execute(w, store.Op{Kind: store.OpConnect, Conn: "ghost"})
			r.redis.execute(w, store.Op{Kind: store.OpDisconnect, Conn: "c1"})
			r.redis.remove("y", "c2", store.CauseLeft) // the app has cleared a room
		})
		r.forgetSaid()
		r.Heartbeat(-1, true)
		synctest.Wait()
		assert.ElementsMatch(r, []string{"L ghost/x c", "J c2/y"}, r.said())
		r.redis.do(func() {
			assert.Contains(r, r.redis.conns, "c1")
			assert.NotContains(r, r.redis.conns, "ghost")
		})
		r.atRest()
		assert.EqualValues(r, 2, r.Stats().Strays)
		assert.EqualValues(r, 1, r.Stats().LeftClosed, "a stray's leave is counted as any other")
		r.beat(3)
		assert.EqualValues(r, 1, r.audits())
		r.drain()
		r.nothingLeft()
	})
}

// A room's hash was deleted or evicted, the index was not.
func TestCheckFindsLostRecords(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(3)
		r.beat(1)
		r.forgetSaid()
		r.redis.do(func() { delete(r.redis.rooms, "x") })
		r.beat(1)
		assert.ElementsMatch(r, []string{"J c0/x", "J c1/x", "J c2/x"}, r.said())
		r.beat(5)
		r.atRest()
		assert.Len(r, r.said(), 3)
		r.drain()
		r.nothingLeft()
	})
}

// One record of many is missing: sizes do not tell, an audit that has a reason
// does, and so does the one that comes every ten minutes.
func TestAuditAsksForRecords(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(3)
		lose := func() {
			r.redis.do(func() {
				delete(r.redis.rooms["x"], "c1")
				r.redis.miscounted["x"] = 3
			})
		}
		r.forgetSaid()
		lose()
		r.beat(5)
		assert.Empty(r, r.said(), "sizes do not tell")
		r.heartbeat(true)
		assert.Equal(r, []string{"J c1/x"}, r.said())
		r.beat(5)
		r.atRest()

		r.forgetSaid()
		lose()
		for range 210 { // ten minutes
			r.beat(1)
		}
		assert.Len(r, r.said(), 1, "without a reason, too")
		r.redis.do(func() { clear(r.redis.miscounted) })
		r.drain()
		r.nothingLeft()
	})
}

// Redis lost everything; the incarnation goes on.
func TestEverythingLost(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(10)
		r.publish(conns[3], "x", "s", 0)
		conns[4].SetMeta(7, []byte("m"))
		synctest.Wait()
		r.redis.do(r.redis.flush)
		r.forgetSaid()
		r.heartbeat(true)
		r.sleep(3 * time.Second)
		assert.Len(r, r.said(), 20)
		h, _ := r.held("x", "c3")
		assert.Equal(r, "s", h.state)
		h, _ = r.held("y", "c4")
		assert.Equal(r, "m", h.meta)
		r.redis.do(func() {
			assert.Len(r, r.redis.conns, 10)
			assert.EqualValues(r, 7, r.redis.conns["c4"].Version)
		})
		r.beat(4)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// A master that was demoted took a batch over a connection that had not heard
// of it; the new one lacks it. The next batch tells, though as much is held as
// should be and no call has failed.
func TestAcknowledgedBatchLost(t *testing.T) {
	doubts := 0
	virtual(t, func(r *rig) {
		conns := r.fill(2)
		r.publish(conns[0], "x", "before", 0)
		lane := where{0, "I1"}
		var was held
		var number uint64
		r.redis.do(func() { was, number = r.redis.rooms["x"]["c0"], r.redis.number[lane] })
		r.publish(conns[0], "x", "after", 0)
		r.redis.do(func() { r.redis.rooms["x"]["c0"], r.redis.number[lane] = was, number })
		r.beat(5)
		assert.Zero(r, r.audits(), "nothing tells")

		r.publish(conns[1], "x", "s", 0)
		assert.Equal(r, 1, doubts)
		r.heartbeat(false) // for which doubt has asked
		h, _ := r.held("x", "c0")
		assert.Equal(r, "after", h.state)
		assert.EqualValues(r, 1, r.audits())
		r.atRest()
		r.drain()
		r.nothingLeft()
	}, func(c *Config) { c.Doubt = func() { doubts++ } })
}

// The metadata that another server has set while this one was deaf.
func TestAuditReadsMetadata(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(300)
		r.redis.do(func() { r.redis.conns["c299"] = store.MetaValue{Version: 4, Data: []byte("new"), Owner: "I1"} })
		r.heartbeat(true)
		meta, version := conns[299].Metadata()
		assert.Equal(r, "new", string(meta))
		assert.EqualValues(r, 4, version)
		h, _ := r.held("y", "c299")
		assert.Equal(r, "new", h.meta)
		r.atRest()
	})
}

// One node of a cluster is out of reach for a long time: its bucket is tried at
// every heartbeat, the others are compared once.
func TestTroubleIsOfEachLane(t *testing.T) {
	bucket := func(name string) int { return map[string]int{"y": 1, "c1": 1}[name] }
	virtual(t, func(r *rig) {
		conns := r.fill(2)
		r.redis.do(func() {
			r.redis.bucket, r.redis.mute = bucket, func(b int) bool { return b == 1 }
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
		audits, ops := r.audits(), r.Stats().Ops
		r.beat(50)
		assert.Equal(r, audits+50, r.audits(), "of the lost one alone")
		assert.Equal(r, ops, r.Stats().Ops, "nothing is written anew")
		r.redis.do(func() {
			assert.Equal(r, 1, r.redis.asked["c0"])
			assert.Equal(r, 51, r.redis.asked["c1"])
			r.redis.mute = nil
			delete(r.redis.rooms, "y") // which its index does not tell
		})

		r.forgetSaid()
		r.beat(1)
		assert.ElementsMatch(r, []string{"J c0/y", "J c1/y", "M c1/x"}, r.said(), "the other one is not compared again")
		assert.Equal(r, []uint64{4, 4}, versions())
		r.beat(5) // strays of the deleted room
		audits, ops = r.audits(), r.Stats().Ops
		r.beat(20)
		assert.Equal(r, audits, r.audits())
		assert.Equal(r, ops, r.Stats().Ops)
		r.atRest()
	}, func(c *Config) { c.Buckets, c.RoomBucket, c.ConnBucket = 2, bucket, bucket })
}

// A connection whose id was a stray's comes back before the stray is ended.
func TestStrayComesBack(t *testing.T) {
	virtual(t, func(r *rig) {
		r.fill(1)
		r.redis.do(func() {
			r.redis.execute(where{0, "I1"}, store.Op{Kind: store.OpConnect, Conn: "ghost"})
		})
		// The lane is busy while the stray is found, and the connection made.
		r.plan(func(call int, _ []store.Op) fault {
			if call == 0 {
				return fault{before: time.Second}
			}
			return fault{}
		})
		busy := r.connect("busy")
		r.sleep(100 * time.Millisecond)
		r.heartbeat(true)
		assert.EqualValues(r, 1, r.Stats().Strays)
		c := r.connect("ghost")
		require.NoError(r, c.Registered(r.Context()))
		require.NoError(r, busy.Registered(r.Context()))
		r.endStray(r.lanes[0], store.OwnedRef{Conn: "ghost"}) // found before, said after
		synctest.Wait()
		r.redis.do(func() { assert.Equal(r, "I1", r.redis.conns["ghost"].Owner) })
		r.atRest()
	})
}

func TestReborn(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(20)
		r.publish(conns[0], "x", "s", time.Hour)
		r.forgetSaid()
		r.reborn("I2", false)
		r.sleep(time.Second)
		said := r.said()
		require.Len(r, said, 40)
		for _, s := range said {
			assert.Equal(r, "R", s[:1], "nobody has left")
		}
		h, _ := r.held("x", "c0")
		assert.Equal(r, "s", h.state)
		assert.Equal(r, "I2", h.inc)
		r.redis.do(func() {
			assert.Len(r, r.redis.owned[where{0, "I2"}], 60)
			for _, m := range r.redis.conns {
				assert.Equal(r, "I2", m.Owner)
			}
			r.redis.bury("I1")
		})
		assert.Len(r, r.said(), 40, "the dead one had nothing any more")
		r.beat(5)
		assert.Zero(r, r.audits())
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// The lane may find the new incarnation before the owner is told of it.
func TestRebornWhileWriting(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(20)
		r.redis.do(func() { r.redis.dead["I1"] = true })
		r.become("I2")
		for i, c := range conns {
			if i%2 == 0 {
				r.publish(c, "x", "s", 0)
			}
		}
		late := r.connect("late")
		r.join(late, "x")
		r.forgetSaid()
		r.Reborn(false)
		r.sleep(time.Second)
		for _, s := range r.said() {
			assert.Equal(r, "R", s[:1])
		}
		assert.Len(r, r.said(), 30, "ten were written anew before")
		r.redis.do(func() { assert.Len(r, r.redis.owned[where{0, "I2"}], 62) })
		r.beat(6)
		assert.Zero(r, r.audits(), "what it counts is what Redis holds")
		r.atRest()
		r.redis.do(func() { r.redis.bury("I1") })
		r.drain()
		r.nothingLeft()
	})
}

func TestFencedIncarnation(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(3)
		r.redis.do(func() { r.redis.bury("I1") })
		r.forgetSaid()
		var wg sync.WaitGroup
		wg.Go(func() { r.publish(conns[0], "x", "s", 0) })
		r.sleep(100 * time.Millisecond)
		r.mu.Lock()
		assert.NotEmpty(r, r.fenced)
		assert.Equal(r, "I1", r.fenced[0])
		r.mu.Unlock()
		assert.Empty(r, r.said())
		r.reborn("I2", false)
		wg.Wait()
		r.sleep(time.Second)
		assert.Len(r, r.said(), 6)
		h, _ := r.held("x", "c0")
		assert.Equal(r, "s", h.state)
		r.atRest()
	})
}

// After a stall of its own a server does not know who is still there: each
// comes back at its next frame.
func TestRebornAfterAStall(t *testing.T) {
	virtual(t, func(r *rig) {
		l := &link{}
		c, err := r.Connect("a", nil, l, func() {})
		require.NoError(r, err)
		d := r.connect("b")
		r.join(c, "x")
		r.join(d, "x")
		r.publish(c, "x", "s", 0)
		r.redis.do(func() { r.redis.bury("I1") })
		r.forgetSaid()
		r.reborn("I2", true)
		r.sleep(time.Second)
		assert.Empty(r, r.said())
		assert.Equal(r, 1, l.pings)
		assert.True(r, c.In("x"))
		r.redis.do(func() { assert.Len(r, r.redis.conns, 2) })
		c.Seen()
		r.sleep(time.Millisecond)
		assert.Equal(r, []string{"J a/x"}, r.said())
		r.atRest()
		r.sleep(time.Hour)
		assert.Len(r, r.said(), 1)
		r.drain()
		r.nothingLeft()
	})
}

// What the lane wrote already under the new incarnation before the owner is
// told of the stall is in nobody's way.
func TestRebornAfterAStallWhileWriting(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(4)
		r.redis.do(func() { r.redis.bury("I1") })
		r.become("I2")
		r.publish(conns[0], "x", "s", 0)
		r.Reborn(true)
		r.sleep(time.Second)
		_, ok := r.held("x", "c0")
		assert.False(r, ok, "it has to show a sign of life as well")
		r.atRest()
		for _, c := range conns {
			c.Seen()
		}
		r.sleep(time.Second)
		r.redis.do(func() { assert.Len(r, r.redis.owned[where{0, "I2"}], 12) })
		r.beat(4)
		assert.Zero(r, r.audits())
		legal(r, r.redis.events)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// Whoever waits for a state that ends with its entry is not told that it has
// been set.
func TestPublishWhileReborn(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(1)
		r.away()
		done := make(chan error, 1)
		go func() { done <- conns[0].PublishState(r.Context(), "x", []byte("s"), 0, false) }()
		r.sleep(100 * time.Millisecond)
		r.redis.do(func() { r.redis.bury("I1") })
		r.reborn("I2", true)
		r.heal()
		conns[0].Seen()
		r.sleep(500 * time.Millisecond)
		h, ok := r.held("x", "c0")
		assert.True(r, ok)
		assert.Empty(r, h.state)
		require.Error(r, <-done)
		r.atRest()
	})
}
