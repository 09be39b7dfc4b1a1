package limit

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestBucket(t *testing.T) {
	t.Parallel()
	now := time.Unix(0, 0)
	through := func(b *Bucket, tries int) (n int) {
		for range tries {
			if b.Take(now) {
				n++
			}
		}
		return n
	}
	b := NewBucket(now, 10, 2)
	require.Equal(t, 20, through(&b, 100), "the burst")
	now = now.Add(500 * time.Millisecond)
	require.Equal(t, 5, through(&b, 100), "the rate")
	now = now.Add(-time.Minute)
	require.Zero(t, through(&b, 10), "a clock that goes back gives no tokens")
	now = now.Add(time.Hour)
	require.Equal(t, 20, through(&b, 100), "never more than the burst")

	for range 2 {
		require.False(t, b.Has(now))
		b.Return()
		require.True(t, b.Has(now))
		require.True(t, b.Has(now), "Has takes no token")
		require.Equal(t, 1, through(&b, 100), "the returned token")
	}
	for range 50 {
		b.Return()
	}
	require.Equal(t, 20, through(&b, 100), "never more than the burst")

	free := NewBucket(now, -1, 2)
	require.Equal(t, 1000, through(&free, 1000), "no limit")
}

func TestBucketWait(t *testing.T) {
	t.Parallel()
	now := time.Now()
	b := NewBucket(now, 10, 1)
	for range 10 {
		if b.Wait() != 0 || !b.Take(now) {
			t.Fatal("a full bucket has no token")
		}
	}
	if got := b.Wait(); got != 100*time.Millisecond {
		t.Errorf("wait %v, want 100ms", got)
	}
	now = now.Add(75 * time.Millisecond)
	if b.Take(now) {
		t.Fatal("a token came too early")
	}
	if got := b.Wait().Round(time.Microsecond); got != 25*time.Millisecond {
		t.Errorf("wait %v, want 25ms", got)
	}
	none := NewBucket(now, 0, 1)
	if none.Wait() != 0 {
		t.Error("a bucket without limit has a wait")
	}
}
