package kept

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

// Beyond the limit the oldest place of the user ends. A new place in the same room takes
// the place of the old one, and places whose time is over do not count.
func TestPlacesOfOneUser(t *testing.T) {
	t.Parallel()
	p := NewPerUser(2)
	add := func(user, room string, until, now int64) string {
		oldest, over := p.Add(user, store.KeptPlace{EntryRef: store.EntryRef{Room: room, Conn: "c-" + room}, Until: until}, now)
		assert.Equal(t, over, oldest.Room != "")
		return oldest.Room
	}
	assert.Empty(t, add("ann", "a", 100, 0))
	assert.Empty(t, add("ann", "b", 100, 0))
	assert.Empty(t, add("ann", "a", 110, 0), "the same room")
	assert.Empty(t, add("bob", "c", 100, 0))
	assert.Empty(t, add("", "d", 100, 0), "no user")
	assert.Equal(t, "b", add("ann", "c", 100, 1))
	assert.Equal(t, "a", add("ann", "d", 100, 2))
	assert.Empty(t, add("ann", "e", 300, 200), "the others are over")
	assert.Empty(t, add("ann", "f", 300, 200))
	p = NewPerUser(-1)
	for i := range 1000 {
		assert.Empty(t, add("ann", fmt.Sprint(i), 100, 0), "no limit")
	}
}

// Users whose places are over are forgotten.
func TestPlacesOfManyUsers(t *testing.T) {
	t.Parallel()
	p := NewPerUser(2)
	for i := range int64(100_000) {
		p.Add(fmt.Sprint(i), store.KeptPlace{EntryRef: store.EntryRef{Room: "r"}, Until: i + 100}, i)
	}
	assert.LessOrEqual(t, len(p.places), 2*minSweep)
}
