package mesh

import (
	"encoding/json"
	"maps"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestRefusedUpgradesCountEveryStatus checks that every status has a counter, and that
// counts returns a copy.
func TestRefusedUpgradesCountEveryStatus(t *testing.T) {
	t.Parallel()
	var c refusedUpgrades
	for status := 400; status < 600; status++ {
		c.count(status)
	}
	got := c.counts()
	sum := uint64(0)
	for _, n := range got {
		sum += n
	}
	assert.EqualValues(t, 200, sum)
	assert.EqualValues(t, 1, got["404"])
	assert.EqualValues(t, 93, got["4xx"])
	assert.EqualValues(t, 97, got["5xx"])
	before := maps.Clone(got)
	c.count(404)
	assert.Equal(t, before, got)
}

func TestHistogram(t *testing.T) {
	t.Parallel()
	bounds := []time.Duration{time.Millisecond, time.Second}
	raw := []uint64{3, 2, 1}
	h, err := NewHistogram(bounds, raw, 5*time.Second)
	require.NoError(t, err)
	bounds[0], raw[0] = 0, 0 // NewHistogram has copied them
	assert.EqualValues(t, 6, h.Count())
	assert.Equal(t, 5*time.Second, h.Sum())
	got := maps.Collect(h.Buckets())
	assert.Equal(t, map[time.Duration]uint64{time.Millisecond: 3, time.Second: 5}, got)
	for le := range h.Buckets() {
		assert.Equal(t, time.Millisecond, le)
		break
	}
	for q, want := range map[float64]time.Duration{
		-1: time.Millisecond, 0: time.Millisecond, 0.5: time.Millisecond, 0.51: time.Second, 0.83: time.Second, 0.9: time.Second, 1: time.Second, 2: time.Second,
	} {
		assert.Equal(t, want, h.Quantile(q), "%v", q)
	}
	text, err := json.Marshal(h)
	require.NoError(t, err)
	assert.JSONEq(t, `{"count":6,"sum":5,"buckets":[{"le":0.001,"count":3},{"le":1,"count":5}]}`, string(text))

	var empty Histogram
	assert.Zero(t, empty.Count())
	assert.Zero(t, empty.Quantile(0.5))
	text, err = json.Marshal(empty)
	require.NoError(t, err)
	assert.JSONEq(t, `{"count":0,"sum":0,"buckets":[]}`, string(text))
	for range empty.Buckets() {
		t.Error("an empty histogram has a bucket")
	}
	_, err = NewHistogram(bounds, raw[1:], 0)
	require.ErrorIs(t, err, ErrInvalidOptions)
	_, err = NewHistogram([]time.Duration{2, 2}, raw, 0)
	require.ErrorIs(t, err, ErrInvalidOptions)
}
