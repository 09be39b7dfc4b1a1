package hub

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

func TestEventsWhileTheFirstSnapshotIsRead(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		h.redis.set(func(f *fakeRedis) {
			f.afterRead = func(string) {
				h.send(f.leave(room, "a"), f.join(room, "c"))
			}
		})
		s := h.watch()
		h.redis.set(func(f *fakeRedis) { f.afterRead = nil })
		assert.Equal(t, []string{"b", "c"}, s.ids())
		assert.EqualValues(t, 4, s.view.Seq)
		assert.Empty(t, s.takeLines())
		h.sleep(11 * time.Second)
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
		deliver   func(h *harness, messages []string)
		snapshots int
	}{
		{"events arrive while reading", func(h *harness, m []string) { h.send(m...) }, 1},
		{"events arrive out of order", func(h *harness, m []string) {
			for i := range m {
				h.send(m[len(m)-1-i])
			}
			h.send(m...)
		}, 1},
		{"events arrive a little later", func(h *harness, m []string) {
			time.AfterFunc(200*time.Millisecond, func() { h.send(m...) })
		}, 1},
		{"one event is lost", func(h *harness, m []string) { h.send(m[0]); h.send(m[2:]...) }, 2},
		{"all events are lost", func(h *harness, m []string) {}, 2},
		{"another writer's tag", func(h *harness, m []string) {
			h.send(m[0], strings.Replace(m[1], " t", " x", 2))
			h.send(m[2:]...)
		}, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				base(h.redis)
				once := false
				h.redis.set(func(f *fakeRedis) {
					f.betweenPages = func(string) {
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
				assert.Equal(t, `{"n":"z"}`, string(h.hub.mirror(room).members.get("c3").Meta()))
				assert.Equal(t, tt.snapshots, h.snapshots())
				h.send(h.redis.state(room, "c1", "4", false))
				assert.Equal(t, []string{"state c1 4"}, s.takeLines())
				h.checkSink(s)
				h.sleep(11 * time.Second)
				assert.Equal(t, tt.snapshots, h.snapshots())
			})
		})
	}
}

func TestPageReadAfterLeave(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.set(func(f *fakeRedis) { f.paged = true })
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.redis.join(room, "c") // lost, so that the next event shows a gap
		h.redis.set(func(f *fakeRedis) {
			f.betweenPages = func(string) {
				f.set(func(f *fakeRedis) { f.betweenPages = nil })
				h.send(f.state(room, "b", "1", false), f.leave(room, "b"))
			}
		})
		h.send(h.redis.join(room, "d"))
		h.sleep(150 * time.Millisecond)
		assert.Equal(t, []string{`join c {"n":"c"} repair`, `join d {"n":"d"} repair`, "leave b repair"}, s.takeLines())
		assert.Equal(t, 2, h.snapshots())
		h.checkSink(s)
	})
}

func TestNewEpochWhileReading(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.set(func(f *fakeRedis) { f.paged = true })
		h.redis.join(room, "a")
		h.redis.set(func(f *fakeRedis) {
			f.betweenPages = func(string) {
				f.set(func(f *fakeRedis) { f.betweenPages = nil })
				f.wipe(room, nil)
				h.send(f.join(room, "x"), f.join(room, "y"), f.join(room, "z"))
			}
		})
		s := h.watch()
		h.sleep(15 * time.Second)
		h.checkSink(s)
	})
}

func TestFirstEventsWhileReading(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.set(func(f *fakeRedis) {
			f.paged = true
			f.betweenPages = func(string) { h.send(f.join(room, "x"), f.join(room, "y")) }
		})
		s := h.watch()
		assert.Equal(t, []string{"x", "y"}, s.ids())
		assert.EqualValues(t, 2, s.view.Seq)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestTooManyEventsWhileReading(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		flood := true
		h.redis.set(func(f *fakeRedis) {
			f.afterRead = func(string) {
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

func TestBufferedEventsAreBoundedInBytes(t *testing.T) {
	t.Parallel()
	var b eventBuffer
	assert.True(t, b.add(bufferedEvent{size: maxWaitingBytes - 1}, 10))
	assert.False(t, b.add(bufferedEvent{size: 2}, 10))
	assert.True(t, b.add(bufferedEvent{size: 1}, 10))
	b.drop(1)
	assert.Equal(t, 1, b.bytes)
}

func TestSubscriptionEndsWhileReading(t *testing.T) {
	t.Parallel()
	for _, back := range []bool{true, false} {
		t.Run(fmt.Sprint(back), func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.redis.join(room, "a")
				once := false
				h.redis.set(func(f *fakeRedis) {
					f.afterRead = func(string) {
						if once {
							return
						}
						once = true
						h.redis.join(room, "b") // the event is lost
						if back {
							h.hub.HandleSubscribed(room, true)
							return
						}
						h.hub.HandleDisconnect()
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

func TestSnapshotIsRetried(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.redis.set(func(f *fakeRedis) { f.down = true })
		h.redis.join(room, "b")
		h.send(h.redis.join(room, "c"))
		h.sleep(30 * time.Second)
		assert.Empty(t, s.takeLines())
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
		h.redis.set(func(f *fakeRedis) { f.down = false })
		h.sleep(5 * time.Second)
		assert.Len(t, s.takeLines(), 2)
		assert.Len(t, late.takeLines(), 2)
		assert.Zero(t, h.hub.Stats().Stale)
	})
}

func TestRoomThatChangesWhileReadingIsReadSlowly(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.set(func(f *fakeRedis) { f.paged = true })
		h.redis.join(room, "a")
		h.redis.set(func(f *fakeRedis) {
			f.betweenPages = func(string) { f.state(room, "a", "1", false) } // the event is lost
		})
		s := &fakeSink{t: t}
		ctx := h.t.Context()
		go func() { _ = h.hub.Watch(ctx, room, s, func(View) {}) }()
		h.sleep(time.Minute)
		assert.Less(t, h.snapshots(), 60)
		h.hub.Stop()
	})
}

func TestJitter(t *testing.T) {
	t.Parallel()
	assert.Zero(t, jitter(repeatBackoff.After(0)))
	for n := 1; n < 100; n++ {
		d := jitter(repeatBackoff.After(n))
		assert.GreaterOrEqual(t, d, repeatBackoff.First/2)
		assert.Less(t, d, repeatBackoff.Last*3/2)
	}
}

// A place that was kept while a room was read in pages: the page with the member was read
// before the disconnect, a later page after it.
func TestPageReadBeforeDisconnect(t *testing.T) {
	t.Parallel()
	snap := store.Snapshot{
		Position: store.Position{Epoch: "e", Seq: 1, Tag: "t1"}, Paged: true,
		Records: []store.Record{{Conn: "a", Entry: "e-a", User: "ann", Seq: 1, State: []byte("1")}, {Conn: "b", Seq: 3}},
	}
	var buf eventBuffer
	kept := store.Record{Conn: "a", Entry: "e-a", Incarnation: "~", Seq: 2, KeptUntil: 9, KeptCause: store.CauseLost}
	buf.add(newBufferedEvent(&store.Event{Type: store.Disconnected, Epoch: "e", Tag: "t2", Prev: "t1", Record: kept}, 1, time.Time{}), 9)
	buf.add(newBufferedEvent(&store.Event{Type: store.Joined, Epoch: "e", Tag: "t3", Prev: "t2", Record: store.Record{Conn: "b", Seq: 3}}, 1, time.Time{}), 9)
	p := newPagedMerge(&snap, generation{}, time.Time{}, true)
	assert.Equal(t, complete, p.merge(&buf))
	a := p.members.get("a")
	assert.True(t, a.Disconnected())
	assert.Nil(t, a.State)
	assert.Equal(t, "ann", a.User)
}
