package hub

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

func TestRepairIsExactlyTheDifference(t *testing.T) {
	t.Parallel()
	// Each case begins as in TestUpdatesOfEvents. The events of the changes are lost.
	tests := []struct {
		name string
		do   func(r *fakeRedis)
		want []string
	}{
		{"join", func(r *fakeRedis) { r.join(room, "d") }, []string{`join d {"n":"d"} repair`}},
		{"join with state", func(r *fakeRedis) { r.join(room, "d", withState("9", false)) },
			[]string{`join d {"n":"d"} repair`, "state d 9 repair"}},
		{"join with silent state", func(r *fakeRedis) { r.join(room, "d", withState("9", true)) },
			[]string{`join d {"n":"d"} repair`}},
		{"leave", func(r *fakeRedis) { r.leave(room, "a") }, []string{"leave a repair"}},
		{"leave of all", func(r *fakeRedis) { r.leave(room, "a"); r.leave(room, "b"); r.leave(room, "c") },
			[]string{"leave a repair", "leave b repair", "leave c repair"}},
		{"left and came back", func(r *fakeRedis) {
			r.leave(room, "a")
			r.join(room, "a", withEntry("e2"), withState("1", false))
		}, nil},
		{"left and came back without its state", func(r *fakeRedis) { r.leave(room, "a"); r.join(room, "a", withEntry("e2")) },
			[]string{"state a repair"}},
		{"joined and left", func(r *fakeRedis) { r.join(room, "d"); r.leave(room, "d") }, nil},
		{"state", func(r *fakeRedis) { r.state(room, "a", "9", false) }, []string{"state a 9 repair"}},
		{"silent state", func(r *fakeRedis) { r.state(room, "a", "9", true) }, nil},
		{"silent state, then the old one", func(r *fakeRedis) {
			r.state(room, "a", "9", true)
			r.state(room, "a", "1", false)
		}, nil},
		{"silent state cleared", func(r *fakeRedis) { r.state(room, "b", "", false) }, []string{"state b repair"}},
		{"silent state no longer silent", func(r *fakeRedis) { r.state(room, "b", "2", false) }, []string{"state b 2 repair"}},
		{"metadata", func(r *fakeRedis) { r.meta(room, "a", `{"n":"z"}`) }, []string{`metadata a {"n":"z"} repair`}},
		{"metadata and state", func(r *fakeRedis) { r.meta(room, "a", "1"); r.state(room, "a", "9", false) },
			[]string{"metadata a 1 repair", "state a 9 repair"}},
		{"joins and leaves", func(r *fakeRedis) { r.leave(room, "a"); r.join(room, "d"); r.leave(room, "c"); r.join(room, "e") },
			[]string{`join d {"n":"d"} repair`, `join e {"n":"e"} repair`, "leave a repair", "leave c repair"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.redis.join(room, "a", withState("1", false))
				h.redis.join(room, "b", withState("2", true))
				h.redis.join(room, "c")
				s := h.watch()
				tt.do(h.redis)
				h.hub.Resync()
				h.sleep(time.Second)
				assert.Equal(t, tt.want, s.takeLines())
				h.checkSink(s)
				assert.Equal(t, 2, h.snapshots())
				assert.EqualValues(t, len(tt.want), h.hub.Stats().Repairs)
				v, ok := h.hub.View(room)
				assert.True(t, ok)
				assert.EqualValues(t, h.redis.copy(room).pos.Seq, v.Seq)
				h.send(h.redis.join(room, "next"))
				assert.Equal(t, []string{`join next {"n":"next"}`}, s.takeLines())
			})
		})
	}
}

func TestNewEpoch(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		for _, c := range []string{"a", "b", "c", "d"} {
			h.redis.join(room, c, withState("1", false))
		}
		s := h.watch()
		h.redis.wipe(room, nil)
		// Owners write their members again: a as before, b with another state. x is new.
		h.send(h.redis.join(room, "a", withState("1", false)))
		assert.Empty(t, s.takeLines())
		v, ok := h.hub.View(room)
		assert.True(t, ok)
		assert.Equal(t, 4, v.Total)
		assert.EqualValues(t, 1, v.Seq)
		h.send(h.redis.join(room, "b", withState("2", false)), h.redis.join(room, "x"))
		assert.Equal(t, []string{"state b 2", `join x {"n":"x"}`}, s.takeLines())
		// c is confirmed later, and d never is.
		h.sleep(9 * time.Second)
		h.send(h.redis.join(room, "c", withState("1", false)))
		h.sleep(1900 * time.Millisecond)
		assert.Empty(t, s.takeLines())
		h.sleep(200 * time.Millisecond)
		assert.Equal(t, []string{"leave d repair"}, s.takeLines())
		assert.Equal(t, 2, h.snapshots())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseVerify])
		h.checkSink(s)
		h.sleep(time.Minute)
		assert.Empty(t, s.takeLines())
		assert.Equal(t, 2, h.snapshots())
	})
}

func TestRedisLostTheRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.sleep(10500 * time.Millisecond) // a comparison has found the loss
		assert.Empty(t, s.takeLines())
		assert.Equal(t, 2, h.snapshots())
		v, ok := h.hub.View(room)
		assert.True(t, ok)
		assert.Equal(t, 2, v.Total)
		assert.Equal(t, s.view.Epoch, v.Epoch, "updates still belong to the old epoch")
		h.send(h.redis.join(room, "a"))
		h.sleep(12 * time.Second)
		assert.Equal(t, []string{"leave b repair"}, s.takeLines())
		h.checkSink(s)
	})
}

func TestRedisLostTheRoomAndNoMemberIsWrittenAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.hub.Resync()
		h.sleep(10900 * time.Millisecond)
		assert.Empty(t, s.takeLines())
		h.sleep(500 * time.Millisecond)
		assert.Equal(t, []string{"leave a repair"}, s.takeLines())
		assert.Equal(t, s.view.Epoch, s.updates[0].Epoch)
		h.sleep(time.Minute)
		assert.Equal(t, 3, h.snapshots(), "an empty room that Redis does not know needs no snapshot")
	})
}

// If a room lost records within its epoch, a snapshot does not show which members have
// left.
func TestLostRecords(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.set(func(f *fakeRedis) { f.incomplete = true; clear(f.rooms[room].members) })
		h.redis.join(room, "c") // the event is lost
		h.hub.Resync()
		h.sleep(5 * time.Second)
		assert.Equal(t, []string{`join c {"n":"c"} repair`}, s.takeLines())
		h.redis.set(func(f *fakeRedis) { f.incomplete = false })
		h.send(h.redis.join(room, "a"))
		h.sleep(12 * time.Second)
		assert.Equal(t, []string{"leave b repair"}, s.takeLines())
		h.checkSink(s)
	})
}

// The entry of a dead server may end after its record was lost and the connection has
// joined under another incarnation. The new member stays.
func TestMemberStaysAfterLeaveOfOldIncarnation(t *testing.T) {
	t.Parallel()
	var r members
	r.put(newMember(&store.Record{Conn: "a", Entry: "e2", Incarnation: "new"}), 0)
	left := func(cause store.Cause, inc, entry string) *store.Event {
		return &store.Event{Type: store.Left, Cause: cause, Record: store.Record{Conn: "a", Entry: entry, Incarnation: inc}}
	}
	assert.True(t, r.newerThan(left(store.CauseServerLost, "old", "e1")))
	assert.False(t, r.newerThan(left(store.CauseServerLost, "new", "e2")))
	assert.False(t, r.newerThan(left(store.CauseClosed, "old", "e1")))
	// No server owns a kept place.
	r.put(newMember(&store.Record{Conn: "a", Entry: "e2", Incarnation: "~", KeptUntil: 1, KeptCause: store.CauseServerLost}), 0)
	assert.True(t, r.newerThan(left(store.CauseServerLost, "old", "e1")))
	assert.False(t, r.newerThan(left(store.CauseServerLost, "~", "e2")))
	assert.False(t, r.newerThan(left(store.CauseServerLost, "new", "e2")), "the record of the kept place is lost")
}

func TestEmptyRoomBeginsNewEpoch(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.send(h.redis.leave(room, "a"))
		h.redis.wipe(room, nil) // the position of an empty room expires
		h.sleep(time.Minute)
		h.send(h.redis.join(room, "b"))
		assert.Equal(t, []string{"leave a", `join b {"n":"b"}`}, s.takeLines())
		assert.EqualValues(t, 1, s.updates[1].Seq)
		h.sleep(time.Minute)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestEventInTheMiddleOfAnotherEpoch(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.redis.join(room, "x")
		h.send(h.redis.join(room, "a"))
		h.sleep(5 * time.Millisecond)
		assert.Equal(t, []string{`join x {"n":"x"} repair`}, s.takeLines())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseEpoch])
		h.sleep(12 * time.Second)
		assert.Equal(t, []string{"leave b repair"}, s.takeLines())
	})
}

func TestBackToAnEarlierEpoch(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		for i := range 9 {
			h.redis.join(room, fmt.Sprintf("c%d", i))
		}
		back := h.redis.copy(room)
		h.redis.join(room, "last")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "c0"))
		h.redis.wipe(room, back) // the old master is back with an older copy
		h.send(h.redis.leave(room, "c1"))
		h.sleep(5 * time.Millisecond)
		assert.Equal(t, []string{"leave c1 repair"}, unlisted(s.takeLines(), h, t, "c1"))
		h.send(h.redis.leave(room, "c2"))
		h.sleep(30 * time.Second)
		h.checkSink(s) // the sink has checked that seq did not fall
	})
}

// unlisted returns the leave of conn. While conn is unconfirmed and still listed, the
// leave has not been delivered yet.
func unlisted(lines []string, h *harness, t *testing.T, conn string) []string {
	t.Helper()
	if len(lines) > 0 {
		return lines
	}
	v, _ := h.hub.View(room)
	for _, m := range v.Members() {
		if m.Conn == conn {
			return []string{"leave " + conn + " repair"}
		}
	}
	return nil
}
