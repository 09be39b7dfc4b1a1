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
	require.Zero(t, through(&b, 10), "a clock that goes back gives nothing")
	now = now.Add(time.Hour)
	require.Equal(t, 20, through(&b, 100), "never more than the burst")

	for range 2 {
		require.False(t, b.Has(now))
		b.Return()
		require.True(t, b.Has(now))
		require.True(t, b.Has(now), "looking takes nothing")
		require.Equal(t, 1, through(&b, 100), "what was put back")
	}
	for range 50 {
		b.Return()
	}
	require.Equal(t, 20, through(&b, 100), "never more than the burst")

	free := NewBucket(now, -1, 2)
	require.Equal(t, 1000, through(&free, 1000), "no limit")
}
