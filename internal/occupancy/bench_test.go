package occupancy

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// instantStore answers at once, with the same numbers for every room.
type instantStore struct {
	connections int
	seq         uint64
}

func (s *instantStore) Occupancy(_ context.Context, rooms ...string) ([]store.Occupancy, error) {
	s.seq++
	list := make([]Reading, len(rooms))
	for i := range list {
		list[i] = Reading{Position: store.Position{Epoch: "epoch", Seq: s.seq}, Connections: s.connections, Users: s.connections}
	}
	return stored(list), nil
}

// instantListener subscribes to nothing. The benchmark confirms.
type instantListener struct{}

func (instantListener) Add(string)    {}
func (instantListener) Remove(string) {}

// countingWatcher counts the updates that it gets.
type countingWatcher struct{ updates int }

func (w *countingWatcher) Deliver(*Update) { w.updates++ }

// benchRooms returns Rooms and their store.
func benchRooms(b *testing.B) (*Rooms, *instantStore) {
	b.Helper()
	s := &instantStore{connections: 1}
	wheel := clock.NewWheel(step)
	rs := New(Config{Store: s, Listener: instantListener{}, Wheel: wheel})
	wheel.Start()
	b.Cleanup(func() { rs.Stop(); wheel.Stop() })
	return rs, s
}

// benchWatch lets a watcher watch new rooms.
func benchWatch(b *testing.B, rs *Rooms, w Watcher, rooms []string) {
	b.Helper()
	done := make(chan []Result)
	go func() { done <- rs.Watch(b.Context(), w, rooms) }()
	for rs.RoomsOf(w) < len(rooms) {
		runtime.Gosched()
	}
	for _, room := range rooms {
		rs.HandleSubscribed(room, false)
	}
	for _, result := range <-done {
		if result.Err != nil {
			b.Fatal(result.Err)
		}
	}
}

// heap returns the bytes in use.
func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func names(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprint("room:", i)
	}
	return list
}

// BenchmarkMemory reports the bytes of a room with one watcher, of a further watcher of a
// room, and of a further room of a watcher.
func BenchmarkMemory(b *testing.B) {
	b.Run("room", func(b *testing.B) {
		const rooms = 20_000
		for b.Loop() {
			rs, _ := benchRooms(b)
			list := names(rooms)
			before := heap()
			benchWatch(b, rs, &countingWatcher{}, list)
			b.ReportMetric(float64(heap()-before)/rooms, "B/room")
			runtime.KeepAlive(rs)
		}
	})
	for _, bb := range []struct{ watchers, rooms int }{{10_000, 1}, {1000, 100}} {
		b.Run(fmt.Sprintf("watchers=%d/rooms=%d", bb.watchers, bb.rooms), func(b *testing.B) {
			for b.Loop() {
				rs, _ := benchRooms(b)
				list, watchers := names(bb.rooms), make([]countingWatcher, bb.watchers)
				benchWatch(b, rs, &watchers[0], list)
				before := heap()
				for i := range watchers {
					rs.Watch(b.Context(), &watchers[i], list)
				}
				b.ReportMetric(float64(heap()-before)/float64(bb.watchers*bb.rooms), "B/watch")
				runtime.KeepAlive(rs)
			}
		})
	}
}

// BenchmarkEvent handles one event of a room that other events have made dirty, as nearly
// all events of a storm.
func BenchmarkEvent(b *testing.B) {
	rs, _ := benchRooms(b)
	list := names(1000)
	benchWatch(b, rs, &countingWatcher{}, list)
	r := rs.room(list[0])
	r.mu.Lock()
	r.retryAt = rs.now() + time.Hour // it stays dirty
	r.mu.Unlock()
	b.ReportAllocs()
	for b.Loop() {
		rs.HandleEvent(list[0], "an event")
	}
}

// BenchmarkPush takes in a reading and pushes it to many watchers.
func BenchmarkPush(b *testing.B) {
	for _, watchers := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint(watchers), func(b *testing.B) {
			rs, s := benchRooms(b)
			rs.cfg.Interval = func(string) time.Duration { return time.Nanosecond }
			list, all := names(1), make([]countingWatcher, watchers)
			benchWatch(b, rs, &all[0], list)
			for i := range all {
				rs.Watch(b.Context(), &all[i], list)
			}
			r := rs.room(list[0])
			b.ReportAllocs()
			for b.Loop() {
				s.connections++
				got, _ := s.Occupancy(b.Context(), list...)
				if !r.beginReading() {
					b.Fatal("not watched")
				}
				reading := ReadingOf(&got[0])
				r.finishReading(&reading)
			}
			if all[watchers-1].updates < b.N {
				b.Fatal("not pushed")
			}
		})
	}
}
