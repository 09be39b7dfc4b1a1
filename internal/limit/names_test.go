package limit

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The memory of Names is bounded, also without a limit of new names.
func TestNamesAreBounded(t *testing.T) {
	t.Parallel()
	var n Names
	at := time.Unix(1_800_000_000, 0)
	for minute := range 3 {
		for i := range 5 * namesRemembered {
			require.True(t, n.Use(fmt.Sprint(i), 1<<30, at), "minute %d", minute)
		}
		assert.LessOrEqual(t, len(n.now)+len(n.old), 4*namesRemembered)
		at = at.Add(NewNamesEvery)
	}
	var off Names
	require.True(t, off.Use("a", -1, at))
	assert.Nil(t, off.now)
}

func TestNamesCountNewOnes(t *testing.T) {
	t.Parallel()
	var n Names
	at := time.Unix(1_800_000_000, 0)
	use := func(name string) bool { return n.Use(name, 2, at) }
	assert.True(t, use("a"))
	assert.True(t, use("b"))
	assert.True(t, use("a"), "known")
	assert.False(t, use("c"), "the third new one")
	at = at.Add(NewNamesEvery)
	assert.True(t, use("a"), "of the period before")
	assert.True(t, use("c"))
	assert.True(t, use("d"))
	assert.False(t, use("e"))
	at = at.Add(2 * NewNamesEvery)
	assert.True(t, use("x"))
	assert.True(t, use("a"), "forgotten, and new")
	assert.False(t, use("c"))
}
