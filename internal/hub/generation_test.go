package hub

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestGenerationMayDiffer(t *testing.T) {
	t.Parallel()
	never, unknown := generation{neverKnown: true}, generation{}
	assert.False(t, never.mayDifferFrom(never))
	assert.True(t, unknown.mayDifferFrom(generation{id: "1"}))
	assert.True(t, generation{id: "1"}.mayDifferFrom(never))
	assert.True(t, generation{id: "1"}.mayDifferFrom(unknown))
	assert.True(t, generation{id: "2"}.mayDifferFrom(generation{id: "1"}))
	assert.False(t, generation{id: "1"}.mayDifferFrom(generation{id: "1"}))
}
