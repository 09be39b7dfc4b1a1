package kept

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A place that the index has lost, and whose server is gone, is found by its record. That
// takes two searches at most: the first is at a random time, and a place must be overdue.
func TestPlacesLostFromTheIndex(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, 2), newServer(t, r, 2)
		defer b.kill()
		a.add(0, 0, 5, r.keep(0, 0, 5, time.Minute))
		a.kill()
		r.do(func() { clear(r.listed); clear(r.order) })
		b.heartbeats(2*searchEvery + overdueBy)
		pass(2*searchEvery + 2*overdueBy)
		leftOnce(t, r, 0, 0, 5, 2*searchEvery+2*overdueBy)
		require.LessOrEqual(t, r.count("search"), 3)
	})
}

// A search does not run after Stop, nor twice at once.
func TestSearchEndsWithTheSweeper(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, 1)
		a.mu.Lock()
		a.searchAt = time.Now().Add(-time.Second)
		a.mu.Unlock()
		a.Renewed()
		a.Renewed()
		a.kill()
		require.LessOrEqual(t, r.count("search"), 1)
		a.Renewed()
		pass(time.Hour)
		require.LessOrEqual(t, r.count("search"), 1)
	})
}
