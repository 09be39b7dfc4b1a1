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
	// Each case begins as in TestWhatEventsTell; what is done is not heard.
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
		{"came and left", func(r *fakeRedis) { r.join(room, "d"); r.leave(room, "d") }, nil},
		{"state", func(r *fakeRedis) { r.state(room, "a", "9", false) }, []string{"state a 9 repair"}},
		{"silent state", func(r *fakeRedis) { r.state(room, "a", "9", true) }, nil},
		{"silent state, then the old one", func(r *fakeRedis) {
			r.state(room, "a", "9", true)
			r.state(room, "a", "1", false)
		}, nil},
		{"silent state cleared", func(r *fakeRedis) { r.state(room, "b", "", false) }, []string{"state b repair"}},
		{"silent state now told", func(r *fakeRedis) { r.state(room, "b", "2", false) }, []string{"state b 2 repair"}},
		{"metadata", func(r *fakeRedis) { r.meta(room, "a", `{"n":"z"}`) }, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			live(t, func(t *testing.T, h *house) {
				h.redis.join(room, "a", withState("1", false))
				h.redis.join(room, "b", withState("2", true))
				h.redis.join(room, "c")
				s := h.watch()
				tt.do(h.redis)
				h.hub.Resync()
				h.pass(time.Second)
				assert.Equal(t, tt.want, s.heard())
				h.agree(s)
				assert.Equal(t, 2, h.snapshots())
				assert.EqualValues(t, len(tt.want), h.hub.Stats().Repairs)
				v, ok := h.hub.View(room)
				assert.True(t, ok)
				assert.EqualValues(t, h.redis.copy(room).pos.Seq, v.Seq)
				h.send(h.redis.join(room, "next"))
				assert.Equal(t, []string{`join next {"n":"next"}`}, s.heard())
			})
		})
	}
}

func TestNewEpoch(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		for _, c := range []string{"a", "b", "c", "d"} {
			h.redis.join(room, c, withState("1", false))
		}
		s := h.watch()
		h.redis.wipe(room, nil)
		// Owners write anew: a as it was, b with another state, and somebody
		// new comes.
		h.send(h.redis.join(room, "a", withState("1", false)))
		assert.Empty(t, s.heard())
		v, ok := h.hub.View(room)
		assert.True(t, ok)
		assert.Equal(t, 4, v.Total)
		assert.EqualValues(t, 1, v.Seq)
		h.send(h.redis.join(room, "b", withState("2", false)), h.redis.join(room, "x"))
		assert.Equal(t, []string{"state b 2", `join x {"n":"x"}`}, s.heard())
		// c is confirmed later, d never.
		h.pass(9 * time.Second)
		h.send(h.redis.join(room, "c", withState("1", false)))
		h.pass(1900 * time.Millisecond)
		assert.Empty(t, s.heard())
		h.pass(200 * time.Millisecond)
		assert.Equal(t, []string{"leave d repair"}, s.heard())
		assert.Equal(t, 2, h.snapshots())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseVerify])
		h.agree(s)
		h.pass(time.Minute)
		assert.Empty(t, s.heard())
		assert.Equal(t, 2, h.snapshots())
	})
}

func TestUnconfirmedMemberThatLeaves(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "a"))
		// Redis may hold of it what we have not heard of.
		r, prev := h.redis.advance(room)
		h.send(encodeEvent(store.Left, r.pos, prev, time.Now().UnixMilli(), store.Record{Conn: "b", Entry: "e-b"}))
		assert.Equal(t, []string{"leave b"}, s.heard())
		h.pass(time.Minute)
		assert.Empty(t, s.heard())
		assert.Equal(t, 1, h.snapshots(), "nobody is in doubt any more")
	})
}

func TestRedisForgotTheRoom(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.pass(10500 * time.Millisecond) // the comparison has seen it
		assert.Empty(t, s.heard())
		assert.Equal(t, 2, h.snapshots())
		v, ok := h.hub.View(room)
		assert.True(t, ok)
		assert.Equal(t, 2, v.Total)
		assert.Equal(t, s.view.Epoch, v.Epoch, "updates still belong to the epoch that was")
		h.send(h.redis.join(room, "a"))
		h.pass(12 * time.Second)
		assert.Equal(t, []string{"leave b repair"}, s.heard())
		h.agree(s)
	})
}

func TestRedisForgotAndNobodyCameBack(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.hub.Resync()
		h.pass(10900 * time.Millisecond)
		assert.Empty(t, s.heard())
		h.pass(500 * time.Millisecond)
		assert.Equal(t, []string{"leave a repair"}, s.heard())
		assert.Equal(t, s.view.Epoch, s.updates[0].Epoch)
		h.pass(time.Minute)
		assert.Equal(t, 3, h.snapshots(), "an empty room that Redis does not know is in order")
	})
}

// A snapshot of a room that lost records, in the epoch that it was in, does not
// tell which members have left.
func TestRecordsLost(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.set(func(f *fakeRedis) { f.bereft = true; clear(f.rooms[room].members) })
		h.redis.join(room, "c") // not heard
		h.hub.Resync()
		h.pass(5 * time.Second)
		assert.Equal(t, []string{`join c {"n":"c"} repair`}, s.heard())
		h.redis.set(func(f *fakeRedis) { f.bereft = false })
		h.send(h.redis.join(room, "a"))
		h.pass(12 * time.Second)
		assert.Equal(t, []string{"leave b repair"}, s.heard())
		h.agree(s)
	})
}

// A dead server's entry, whose record was lost, ends after its connection has
// joined under another incarnation.
func TestMemberOutlivesItsDeadOwner(t *testing.T) {
	t.Parallel()
	var r roster
	r.put(newMember(&store.Record{Conn: "a", Incarnation: "new"}))
	left := func(cause store.Cause, inc string) *store.Event {
		return &store.Event{Type: store.Left, Cause: cause, Record: store.Record{Conn: "a", Incarnation: inc}}
	}
	assert.True(t, r.outlives(left(store.CauseLost, "old")))
	assert.False(t, r.outlives(left(store.CauseLost, "new")))
	assert.False(t, r.outlives(left(store.CauseClosed, "old")))
}

func TestEmptyRoomBeginsAnew(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		s := h.watch()
		h.send(h.redis.leave(room, "a"))
		h.redis.wipe(room, nil) // an empty room's position runs out
		h.pass(time.Minute)
		h.send(h.redis.join(room, "b"))
		assert.Equal(t, []string{"leave a", `join b {"n":"b"}`}, s.heard())
		assert.EqualValues(t, 1, s.updates[1].Seq)
		h.pass(time.Minute)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestMiddleOfAnotherEpoch(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.redis.join(room, "x")
		h.send(h.redis.join(room, "a"))
		h.pass(5 * time.Millisecond)
		assert.Equal(t, []string{`join x {"n":"x"} repair`}, s.heard())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseEpoch])
		h.pass(12 * time.Second)
		assert.Equal(t, []string{"leave b repair"}, s.heard())
	})
}

func TestBackToAnEarlierEpoch(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		for i := range 9 {
			h.redis.join(room, fmt.Sprintf("c%d", i))
		}
		back := h.redis.copy(room)
		h.redis.join(room, "last")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "c0"))
		h.redis.wipe(room, back) // the old master is back, a little behind
		h.send(h.redis.leave(room, "c1"))
		h.pass(5 * time.Millisecond)
		assert.Equal(t, []string{"leave c1 repair"}, unlisted(s.heard(), h, t, "c1"))
		h.send(h.redis.leave(room, "c2"))
		h.pass(30 * time.Second)
		h.agree(s) // the sink has checked that seq did not fall
	})
}

// unlisted lets an unconfirmed member's leave come in its own time.
func unlisted(told []string, h *house, t *testing.T, conn string) []string {
	t.Helper()
	if len(told) > 0 {
		return told
	}
	v, _ := h.hub.View(room)
	for _, m := range v.Members() {
		if m.Conn == conn {
			return []string{"leave " + conn + " repair"}
		}
	}
	return nil
}

func TestGenerationDecidesWhatMissingMeans(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name          string
		before, after string // empty: cannot be learned
		atOnce        bool
	}{
		{"the same", "G1", "G1", true},
		{"another", "G1", "G2", false},
		{"never to be learned", "", "", true},
		{"not to be learned any more", "G1", "", false},
		{"to be learned only now", "", "G2", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			live(t, func(t *testing.T, h *house) {
				h.redis.set(func(f *fakeRedis) { f.generation = tt.before })
				h.redis.join(room, "a")
				h.redis.join(room, "b")
				s := h.watch()
				h.redis.set(func(f *fakeRedis) { f.generation = tt.after })
				h.redis.leave(room, "a")
				h.send(h.redis.join(room, "c"))
				h.pass(150 * time.Millisecond)
				join := `join c {"n":"c"} repair`
				if tt.atOnce {
					assert.Equal(t, []string{"leave a repair", join}, s.heard())
					assert.Zero(t, h.hub.Stats().Unconfirmed)
					return
				}
				assert.Equal(t, []string{join}, s.heard())
				h.pass(10800 * time.Millisecond)
				assert.Empty(t, s.heard())
				h.pass(200 * time.Millisecond)
				assert.Equal(t, []string{"leave a repair"}, s.heard())
			})
		})
	}
}

func TestNobodyIsToldToHaveLeftWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	for _, heard := range []bool{true, false} { // whether the listener noticed, too
		t.Run(fmt.Sprint(heard), func(t *testing.T) {
			live(t, func(t *testing.T, h *house) {
				h.redis.join(room, "a")
				h.redis.join(room, "b")
				s := h.watch()
				h.redis.wipe(room, nil)
				h.send(h.redis.join(room, "x"))
				s.heard()
				h.pass(8 * time.Second)
				h.redis.set(func(f *fakeRedis) { f.away = true })
				if heard {
					h.hub.HandleLost()
				}
				h.pass(time.Minute)
				assert.Empty(t, s.heard())
				h.redis.set(func(f *fakeRedis) { f.away = false })
				if heard {
					h.hub.HandleSubscribed(room, true)
				}
				h.pass(5 * time.Second)
				assert.Empty(t, s.heard(), "owners get the time that they would have had")
				h.send(h.redis.join(room, "a"))
				h.pass(12 * time.Second)
				assert.Equal(t, []string{"leave b repair"}, s.heard())
				h.agree(s)
			})
		})
	}
}

// Redis is away while nobody reads the room: only heartbeats notice.
func TestDoubtsAreLongerByWhatRedisWasAway(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "a"))
		h.pass(8 * time.Second)
		h.hub.HandleAway()
		h.pass(4 * time.Second)
		assert.Empty(t, s.heard(), "owners get the time that they would have had")
		h.pass(12 * time.Second)
		assert.Equal(t, []string{"leave b repair"}, s.heard())
	})
}

func TestVerifyingFindsTheMemberAfterAll(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "a"))
		h.pass(10990 * time.Millisecond)
		lost := h.redis.join(room, "b", withState("7", false)) // the event is not heard in time
		h.pass(50 * time.Millisecond)
		assert.Equal(t, []string{"state b 7 repair"}, s.heard())
		h.send(lost)
		h.pass(time.Minute)
		assert.Empty(t, s.heard())
		h.agree(s)
	})
}

func TestEventsGoOnWhereVerifyingFails(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.join(room, "a"))
		h.redis.set(func(f *fakeRedis) { f.delay = time.Second })
		h.pass(11*time.Second + 500*time.Millisecond) // in the middle of reading
		h.redis.set(func(f *fakeRedis) { f.away = true })
		h.send(h.redis.join(room, "c"))
		assert.Empty(t, s.heard())
		h.pass(600 * time.Millisecond)
		assert.Equal(t, []string{`join c {"n":"c"}`}, s.heard())
		assert.EqualValues(t, 1, h.hub.Stats().Failures)
	})
}
