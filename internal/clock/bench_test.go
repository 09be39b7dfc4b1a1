package clock

import (
	"runtime"
	"testing"
	"time"
)

const many = 100_000

// BenchmarkSchedule puts off one of 100,000 armed timers.
func BenchmarkSchedule(b *testing.B) {
	fire := func() {}
	b.Run("wheel", func(b *testing.B) {
		before := heap()
		w := NewWheel(DefaultStep)
		w.Start()
		defer w.Stop()
		timers := make([]Timer, many)
		for i := range timers {
			w.Schedule(&timers[i], time.Hour+time.Duration(i)*time.Millisecond, fire)
		}
		size := heap() - before
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			w.Schedule(&timers[i%many], time.Hour+time.Duration(i)*time.Millisecond, fire)
			i++
		}
		b.ReportMetric(float64(size)/many, "heap-B/timer")
	})
	b.Run("time.AfterFunc", func(b *testing.B) {
		before := heap()
		timers := make([]*time.Timer, many)
		for i := range timers {
			timers[i] = time.AfterFunc(time.Hour+time.Duration(i)*time.Millisecond, fire)
		}
		size := heap() - before
		b.ReportAllocs()
		i := 0
		for b.Loop() {
			timers[i%many].Reset(time.Hour + time.Duration(i)*time.Millisecond)
			i++
		}
		b.ReportMetric(float64(size)/many, "heap-B/timer")
		for _, timer := range timers {
			timer.Stop()
		}
	})
}

// BenchmarkTick handles one tick with 100,000 armed timers in all slots, none of which
// is due.
func BenchmarkTick(b *testing.B) {
	w := NewWheel(DefaultStep)
	timers := make([]Timer, many)
	for i := range timers {
		w.Schedule(&timers[i], 100*365*24*time.Hour+time.Duration(i)*DefaultStep, func() {})
	}
	for b.Loop() {
		w.collect(w.handled + 1)
	}
	if w.expired.head != nil {
		b.Fatal("a timer was due")
	}
}

// heap returns the bytes of the heap in use after a garbage collection.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
