package hub

import (
	"fmt"
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// deafSink takes what it is told and forgets it.
type deafSink struct{ told int }

func (s *deafSink) Deliver(*wire.Update) { s.told++ }

// BenchmarkEvent is one event to many sinks of a room with many members.
func BenchmarkEvent(b *testing.B) {
	for _, sinks := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint(sinks), func(b *testing.B) {
			redis := newFakeRedis()
			for i := range 10_000 {
				redis.join(room, fmt.Sprint("c", i))
			}
			l := &fakeListener{rooms: map[string]bool{}}
			h := New(Config{Store: redis, Listener: l})
			l.hub = h
			h.Start()
			defer h.Stop()
			for range sinks {
				if err := h.Watch(b.Context(), room, &deafSink{}, func(View) {}); err != nil {
					b.Fatal(err)
				}
			}
			p := redis.copy(room).pos
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

// BenchmarkFurtherWatcher is one more watcher of a room with many members.
func BenchmarkFurtherWatcher(b *testing.B) {
	redis := newFakeRedis()
	for i := range 10_000 {
		redis.join(room, fmt.Sprint("c", i))
	}
	l := &fakeListener{rooms: map[string]bool{}}
	h := New(Config{Store: redis, Listener: l})
	l.hub = h
	h.Start()
	defer h.Stop()
	first := &deafSink{}
	if err := h.Watch(b.Context(), room, first, func(View) {}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s := &deafSink{}
		_ = h.Watch(b.Context(), room, s, func(v View) { _, _ = v.Present.Size(), v.States() })
		h.Unwatch(room, s)
	}
}
