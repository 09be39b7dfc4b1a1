package hub

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

func TestUnconfirmedMemberThatLeaves(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s := h.watchLossOfB()
		// b may have been written to Redis and its event lost.
		r, prev := h.redis.advance(room)
		h.send(encodeEvent(store.Left, r.pos, prev, time.Now().UnixMilli(), store.Record{Conn: "b", Entry: "e-b"}))
		assert.Equal(t, []string{"leave b"}, s.takeLines())
		h.sleep(time.Minute)
		assert.Empty(t, s.takeLines())
		assert.Equal(t, 1, h.snapshots(), "no member is unconfirmed")
	})
}

func TestGenerationDecidesAboutMissingMembers(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name          string
		before, after string // empty: unknown
		atOnce        bool
	}{
		{"the same", "G1", "G1", true},
		{"another", "G1", "G2", false},
		{"never known", "", "", true},
		{"no longer known", "G1", "", false},
		{"known only now", "", "G2", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.redis.set(func(f *fakeRedis) { f.generation = tt.before })
				h.redis.join(room, "a")
				h.redis.join(room, "b")
				s := h.watch()
				h.redis.set(func(f *fakeRedis) { f.generation = tt.after })
				h.redis.leave(room, "a")
				h.send(h.redis.join(room, "c"))
				h.sleep(150 * time.Millisecond)
				join := `join c {"n":"c"} repair`
				if tt.atOnce {
					assert.Equal(t, []string{join, "leave a repair"}, s.takeLines())
					assert.Zero(t, h.hub.Stats().Unconfirmed)
					return
				}
				assert.Equal(t, []string{join}, s.takeLines())
				h.sleep(10800 * time.Millisecond)
				assert.Empty(t, s.takeLines())
				h.sleep(200 * time.Millisecond)
				assert.Equal(t, []string{"leave a repair"}, s.takeLines())
			})
		})
	}
}

func TestNoLeaveWhileRedisIsDown(t *testing.T) {
	t.Parallel()
	for _, noticed := range []bool{true, false} { // by the listener
		t.Run(fmt.Sprint(noticed), func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.redis.join(room, "a")
				h.redis.join(room, "b")
				s := h.watch()
				h.redis.wipe(room, nil)
				h.send(h.redis.join(room, "x"))
				s.takeLines()
				h.sleep(8 * time.Second)
				h.redis.set(func(f *fakeRedis) { f.down = true })
				if noticed {
					h.hub.HandleDisconnect()
				}
				h.sleep(time.Minute)
				assert.Empty(t, s.takeLines())
				h.redis.set(func(f *fakeRedis) { f.down = false })
				if noticed {
					h.hub.HandleSubscribed(room, true)
				}
				h.sleep(5 * time.Second)
				assert.Empty(t, s.takeLines(), "owners get the full time again")
				h.send(h.redis.join(room, "a"))
				h.sleep(12 * time.Second)
				assert.Equal(t, []string{"leave b repair"}, s.takeLines())
				h.checkSink(s)
			})
		})
	}
}

// After an outage that the heartbeats and the listener have noticed, unconfirmed members
// get the full time once.
func TestUnconfirmedAreExtendedOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s := h.watchLossOfB()
		h.redis.set(func(f *fakeRedis) { f.down = true })
		h.hub.HandleDisconnect()
		h.hub.HandleRedisAway()
		h.sleep(5 * time.Second)
		h.redis.set(func(f *fakeRedis) { f.down = false })
		h.hub.HandleSubscribed(room, true)
		h.sleep(10900 * time.Millisecond)
		assert.Empty(t, s.takeLines())
		h.sleep(200 * time.Millisecond)
		assert.Equal(t, []string{"leave b repair"}, s.takeLines())
		h.checkSink(s)
	})
}

// Redis is down while no room is read, so that only heartbeats notice.
func TestUnconfirmedAreExtendedAfterRedisWasDown(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s := h.watchLossOfB()
		h.sleep(8 * time.Second)
		h.hub.HandleRedisAway()
		h.sleep(4 * time.Second)
		assert.Empty(t, s.takeLines(), "owners get the full time again")
		h.sleep(12 * time.Second)
		assert.Equal(t, []string{"leave b repair"}, s.takeLines())
	})
}

func TestVerifyingFindsTheMember(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s := h.watchLossOfB()
		h.sleep(10990 * time.Millisecond)
		lost := h.redis.join(room, "b", withState("7", false)) // the event is late
		h.sleep(50 * time.Millisecond)
		assert.Equal(t, []string{"state b 7 repair"}, s.takeLines())
		h.send(lost)
		h.sleep(time.Minute)
		assert.Empty(t, s.takeLines())
		h.checkSink(s)
	})
}

func TestEventsAreAppliedIfVerifyingFails(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s := h.watchLossOfB()
		h.redis.set(func(f *fakeRedis) { f.delay = time.Second })
		h.sleep(11*time.Second + 500*time.Millisecond) // in the middle of reading
		h.redis.set(func(f *fakeRedis) { f.down = true })
		h.send(h.redis.join(room, "c"))
		assert.Empty(t, s.takeLines())
		h.sleep(600 * time.Millisecond)
		assert.Equal(t, []string{`join c {"n":"c"}`}, s.takeLines())
		assert.EqualValues(t, 1, h.hub.Stats().Failures)
	})
}
