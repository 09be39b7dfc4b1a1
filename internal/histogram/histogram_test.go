package histogram

import (
	"slices"
	"sync"
	"testing"
	"time"
)

func TestObserve(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		d      time.Duration
		bucket int
		sum    time.Duration
	}{
		{"nothing", 0, 0, 0},
		{"negative", -time.Second, 0, 0},
		{"on a bound", time.Millisecond, 0, time.Millisecond},
		{"just above", time.Millisecond + 1, 1, time.Millisecond + 1},
		{"last bound", time.Second, 1, time.Second},
		{"above all", time.Hour, 2, time.Hour},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := New(time.Millisecond, time.Second)
			h.Observe(tt.d)
			want := make([]uint64, 3)
			want[tt.bucket] = 1
			if c := h.Counts(); !slices.Equal(c.Buckets, want) || c.Sum != tt.sum {
				t.Errorf("%v, sum %v; want %v, sum %v", c.Buckets, c.Sum, want, tt.sum)
			}
		})
	}
}

func TestObserveManyAtOnce(t *testing.T) {
	t.Parallel()
	h := New(time.Millisecond)
	h.ObserveN(time.Second, 0)
	h.ObserveN(time.Second, -1)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				h.ObserveN(2*time.Millisecond, 3)
			}
		})
	}
	wg.Wait()
	if c := h.Counts(); !slices.Equal(c.Buckets, []uint64{0, 24000}) || c.Sum != 48*time.Second {
		t.Errorf("%v, sum %v", c.Buckets, c.Sum)
	}
}

func TestBoundsAscend(t *testing.T) {
	t.Parallel()
	for _, bounds := range [][]time.Duration{Calls(), Lags()} {
		if !slices.IsSorted(bounds) || len(slices.Compact(slices.Clone(bounds))) != len(bounds) {
			t.Errorf("%v", bounds)
		}
	}
}

func BenchmarkObserve(b *testing.B) {
	h := New(Calls()...)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			h.Observe(3 * time.Millisecond)
		}
	})
}
