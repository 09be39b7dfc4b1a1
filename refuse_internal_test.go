package mesh

import (
	"maps"
	"testing"

	"github.com/stretchr/testify/assert"
)

// Every status has a counter, and the maps are the caller's.
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
	was := maps.Clone(got)
	c.count(404)
	assert.Equal(t, was, got)
}
