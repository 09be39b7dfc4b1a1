package hub

import (
	"fmt"
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// countingSink counts the updates that it gets.
type countingSink struct{ updates int }

func (s *countingSink) Deliver(*wire.Update) { s.updates++ }

// watched returns a hub that watches the room with the given numbers of members and
// sinks, and the room's position.
func watched(b testing.TB, members, sinks int) (*Hub, store.Position) {
	b.Helper()
	redis := newFakeRedis()
	for i := range members {
		redis.join(room, fmt.Sprint("c", i))
	}
	l := &fakeListener{rooms: map[string]bool{}}
	h := New(Config{Store: redis, Listener: l, Listed: 100})
	l.hub = h
	h.Start()
	b.Cleanup(h.Stop)
	for range sinks {
		if err := h.Watch(b.Context(), room, &countingSink{}, func(View) {}); err != nil {
			b.Fatal(err)
		}
	}
	return h, redis.copy(room).pos
}

// BenchmarkEvent delivers one event to many sinks of a room with few or many members.
func BenchmarkEvent(b *testing.B) {
	for _, bb := range []struct{ members, sinks int }{{10_000, 1}, {10_000, 100}, {10_000, 10_000}, {100, 1}, {100_000, 1}} {
		b.Run(fmt.Sprintf("members=%d/sinks=%d", bb.members, bb.sinks), func(b *testing.B) {
			h, p := watched(b, bb.members, bb.sinks)
			b.ReportAllocs()
			for b.Loop() {
				prev := p.Tag
				p.Seq++
				p.Tag = fmt.Sprint("b", p.Seq)
				h.HandleEvent(room, encodeEvent(store.State, p, prev, time.Now().UnixMilli(),
					store.Record{Conn: "c1", Entry: "e", State: []byte(`{"typing":true}`)}))
			}
		})
	}
}

// BenchmarkJoinAnswer joins a room with few or many members, makes the answer, which
// lists at most 100 of them, and leaves.
func BenchmarkJoinAnswer(b *testing.B) {
	for _, members := range []int{10, 49, 1000, 100_000} {
		b.Run(fmt.Sprint(members), func(b *testing.B) {
			h, p := watched(b, members, 1)
			b.ReportAllocs()
			for b.Loop() {
				for _, kind := range []store.EventType{store.Joined, store.Left} {
					prev := p.Tag
					p.Seq++
					p.Tag = fmt.Sprint("b", p.Seq)
					h.HandleEvent(room, encodeEvent(kind, p, prev, 1, store.Record{Conn: "new", Entry: "e", Meta: []byte(`{"name":"Ada"}`)}))
					if kind == store.Joined {
						if _, ok := h.Joined(room, "new", p, members+1); !ok {
							b.Fatal("not answered")
						}
					}
				}
			}
		})
	}
}

// BenchmarkFurtherWatcher adds one watcher to a watched room with many members.
func BenchmarkFurtherWatcher(b *testing.B) {
	h, _ := watched(b, 10_000, 1)
	h.cfg.Listed = 0
	for b.Loop() {
		s := &countingSink{}
		_ = h.Watch(b.Context(), room, s, func(v View) { _, _ = v.Present.Size(), v.States() })
		h.Unwatch(room, s)
	}
}
