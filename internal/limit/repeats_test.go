package limit

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRepeats(t *testing.T) {
	t.Parallel()
	var r Repeats
	now := time.Unix(1, 0)
	count, ok := r.Allow(now)
	require.True(t, ok)
	require.Equal(t, 1, count)
	for range 3 {
		now = now.Add(3 * time.Second)
		_, ok = r.Allow(now)
		require.False(t, ok)
	}
	count, ok = r.Allow(now.Add(time.Second))
	require.True(t, ok)
	require.Equal(t, 4, count, "those that were held back, and this one")
}
