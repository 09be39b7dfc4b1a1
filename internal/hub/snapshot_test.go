package hub

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestEventsWhileTheFirstSnapshotIsRead(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		h.redis.set(func(f *fakeRedis) {
			f.snapped = func(string) {
				h.send(f.leave(room, "a"), f.join(room, "c"))
			}
		})
		s := h.watch()
		h.redis.set(func(f *fakeRedis) { f.snapped = nil })
		assert.Equal(t, []string{"b", "c"}, s.ids())
		assert.EqualValues(t, 4, s.view.Seq)
		assert.Empty(t, s.heard())
		h.pass(11 * time.Second)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestPagedSnapshot(t *testing.T) {
	t.Parallel()
	base := func(r *fakeRedis) {
		r.set(func(r *fakeRedis) { r.paged = true })
		for i := range 4 {
			r.join(room, fmt.Sprintf("c%d", i))
		}
	}
	changes := func(r *fakeRedis) []string {
		return []string{
			r.leave(room, "c0"), r.join(room, "c4"), r.state(room, "c1", "1", false), r.state(room, "c4", "2", false),
			r.leave(room, "c2"), r.join(room, "c2", withEntry("e2")), r.meta(room, "c3", `{"n":"z"}`),
			r.leave(room, "c4"), r.state(room, "c3", "3", false),
		}
	}
	tests := []struct {
		name      string
		deliver   func(h *house, messages []string)
		snapshots int
	}{
		{"events come while reading", func(h *house, m []string) { h.send(m...) }, 1},
		{"events come in disorder", func(h *house, m []string) {
			for i := range m {
				h.send(m[len(m)-1-i])
			}
			h.send(m...)
		}, 1},
		{"events come a little later", func(h *house, m []string) {
			time.AfterFunc(200*time.Millisecond, func() { h.send(m...) })
		}, 1},
		{"one event is lost", func(h *house, m []string) { h.send(m[0]); h.send(m[2:]...) }, 2},
		{"all are lost", func(h *house, m []string) {}, 2},
		{"another writer's tag", func(h *house, m []string) {
			h.send(m[0], strings.Replace(m[1], " t", " x", 2))
			h.send(m[2:]...)
		}, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			live(t, func(t *testing.T, h *house) {
				base(h.redis)
				once := false
				h.redis.set(func(f *fakeRedis) {
					f.between = func(string) {
						if !once {
							once = true
							tt.deliver(h, changes(f))
						}
					}
				})
				s := h.watch()
				assert.Equal(t, []string{"c1", "c2", "c3"}, s.ids())
				assert.False(t, s.view.Stale)
				assert.EqualValues(t, 13, s.view.Seq)
				assert.Equal(t, `{"n":"z"}`, string(h.hub.mirror(room).roster.get("c3").Meta()))
				assert.Equal(t, tt.snapshots, h.snapshots())
				h.send(h.redis.state(room, "c1", "4", false))
				assert.Equal(t, []string{"state c1 4"}, s.heard())
				h.agree(s)
				h.pass(11 * time.Second)
				assert.Equal(t, tt.snapshots, h.snapshots())
			})
		})
	}
}

func TestPageReadAfterAMemberHasLeft(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.set(func(f *fakeRedis) { f.paged = true })
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.join(room, "c") // lost: the next one shows a gap
		h.redis.set(func(f *fakeRedis) {
			f.between = func(string) {
				f.set(func(f *fakeRedis) { f.between = nil })
				h.send(f.state(room, "b", "1", false), f.leave(room, "b"))
			}
		})
		h.send(h.redis.join(room, "d"))
		h.pass(150 * time.Millisecond)
		assert.Equal(t, []string{"leave b repair", `join c {"n":"c"} repair`, `join d {"n":"d"} repair`}, s.heard())
		assert.Equal(t, 2, h.snapshots())
		h.agree(s)
	})
}

func TestRoomBeginsAnewWhileItIsRead(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.set(func(f *fakeRedis) { f.paged = true })
		h.redis.join(room, "a")
		h.redis.set(func(f *fakeRedis) {
			f.between = func(string) {
				f.set(func(f *fakeRedis) { f.between = nil })
				f.wipe(room, nil)
				h.send(f.join(room, "x"), f.join(room, "y"), f.join(room, "z"))
			}
		})
		s := h.watch()
		h.pass(15 * time.Second)
		h.agree(s)
	})
}

func TestFirstEventsOfARoomWhileItIsRead(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.set(func(f *fakeRedis) {
			f.paged = true
			f.between = func(string) { h.send(f.join(room, "x"), f.join(room, "y")) }
		})
		s := h.watch()
		assert.Equal(t, []string{"x", "y"}, s.ids())
		assert.EqualValues(t, 2, s.view.Seq)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestTooManyEventsWhileReading(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		flood := true
		h.redis.set(func(f *fakeRedis) {
			f.snapped = func(string) {
				if !flood {
					return
				}
				flood = false
				for range maxPending + 1 {
					h.send(f.state(room, "a", "1", false))
				}
			}
		})
		s := h.watch()
		assert.False(t, s.view.Stale)
		assert.EqualValues(t, maxPending+2, s.view.Seq)
		assert.Equal(t, 2, h.snapshots())
		assert.EqualValues(t, 1, h.hub.Stats().Overflows)
		assert.EqualValues(t, 1, h.hub.Stats().Discarded)
	})
}

func TestWaitingEventsAreBoundedInBytes(t *testing.T) {
	t.Parallel()
	var p parcels
	assert.True(t, p.add(parcel{size: maxWaitingBytes - 1}, 10))
	assert.False(t, p.add(parcel{size: 2}, 10))
	assert.True(t, p.add(parcel{size: 1}, 10))
	p.drop(1)
	assert.Equal(t, 1, p.bytes)
}

func TestSubscriptionIsLostWhileReading(t *testing.T) {
	t.Parallel()
	for _, back := range []bool{true, false} {
		t.Run(fmt.Sprint(back), func(t *testing.T) {
			live(t, func(t *testing.T, h *house) {
				h.redis.join(room, "a")
				once := false
				h.redis.set(func(f *fakeRedis) {
					f.snapped = func(string) {
						if once {
							return
						}
						once = true
						h.redis.join(room, "b") // nobody hears of it
						if back {
							h.hub.HandleSubscribed(room, true)
							return
						}
						h.hub.HandleLost()
						time.AfterFunc(50*time.Millisecond, func() { h.hub.HandleSubscribed(room, true) })
					}
				})
				s := h.watch()
				assert.Equal(t, []string{"a", "b"}, s.ids())
				assert.Equal(t, 2, h.snapshots())
			})
		})
	}
}

func TestSnapshotIsTriedAgain(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		s := h.watch()
		h.redis.set(func(f *fakeRedis) { f.away = true })
		h.redis.join(room, "b")
		h.send(h.redis.join(room, "c"))
		h.pass(30 * time.Second)
		assert.Empty(t, s.heard())
		tries := h.snapshots() - 1
		assert.Greater(t, tries, 5)
		assert.Less(t, tries, 30)
		late := h.watch()
		assert.True(t, late.view.Stale)
		assert.Equal(t, []string{"a"}, late.ids())
		_, ok := h.hub.View(room)
		assert.False(t, ok)
		v, ok := h.hub.StaleView(room)
		assert.True(t, ok)
		assert.True(t, v.Stale)
		h.redis.set(func(f *fakeRedis) { f.away = false })
		h.pass(5 * time.Second)
		assert.Len(t, s.heard(), 2)
		assert.Len(t, late.heard(), 2)
		assert.Zero(t, h.hub.Stats().Stale)
	})
}

func TestRoomThatCannotBeReadInOnePieceIsReadSlowly(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.set(func(f *fakeRedis) { f.paged = true })
		h.redis.join(room, "a")
		h.redis.set(func(f *fakeRedis) {
			f.between = func(string) { f.state(room, "a", "1", false) } // its event never comes
		})
		s := &fakeSink{t: t}
		ctx := h.t.Context()
		go func() { _ = h.hub.Watch(ctx, room, s, func(View) {}) }()
		h.pass(time.Minute)
		assert.Less(t, h.snapshots(), 60)
		h.hub.Stop()
	})
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	assert.Zero(t, backoff(0, firstPause, lastPause))
	for n := 1; n < 100; n++ {
		d := backoff(n, firstPause, lastPause)
		assert.GreaterOrEqual(t, d, firstPause/2)
		assert.Less(t, d, lastPause*3/2)
	}
}
