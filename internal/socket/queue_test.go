package socket

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"github.com/meshpresence/mesh/internal/wire"
)

// contents returns the items of the queue, first to last, and checks its links.
func contents(t *testing.T, q *queue) []*item {
	t.Helper()
	var items []*item
	var prev *item
	for it := q.head; it != nil; it = it.next {
		if it.prev != prev {
			t.Fatal("broken links")
		}
		prev = it
		items = append(items, it)
	}
	if q.tail != prev || len(items) != q.n {
		t.Fatalf("tail or count wrong: %d items, count %d", len(items), q.n)
	}
	return items
}

// superfluous returns items without the states and numbers that later ones replace.
func superfluous(items []*item) []*item {
	last := make(map[member]*item)
	for _, it := range items {
		if key, ok := it.key(); ok {
			last[key] = it
		}
	}
	var kept []*item
	for _, it := range items {
		if key, ok := it.key(); !ok || last[key] == it {
			kept = append(kept, it)
		}
	}
	return kept
}

func TestQueueAgainstModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(100) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var q queue
		var model []*item
		coalescing := false
		for seq := range uint64(300) {
			switch rnd.IntN(10) {
			case 0, 1, 2:
				want := (*item)(nil)
				if len(model) > 0 {
					want, model = model[0], model[1:]
				}
				if got := q.pop(); got != want {
					t.Fatalf("seed %d: popped %v, want %v", seed, got, want)
				}
			case 3:
				if rnd.IntN(5) > 0 {
					break
				}
				before := len(model)
				model = superfluous(model)
				if removed, freed := q.coalesce(); removed != before-len(model) || freed != removed {
					t.Fatalf("seed %d: removed %d, freed %d, want %d", seed, removed, freed, before-len(model))
				}
				coalescing = true
			default:
				it := &item{charge: 1}
				switch kind := rnd.IntN(5); kind {
				case 0:
				case 4:
					it.frame = wire.PushNumbers(wire.Occupancy{RoomName: fmt.Sprint(rnd.IntN(2)), Seq: seq})
				default:
					it.update = state(fmt.Sprint(rnd.IntN(2)), fmt.Sprint(rnd.IntN(3)), seq)
					if kind == 1 {
						it.update.Type = wire.UpdateLeave
					}
				}
				q.push(it)
				if model = append(model, it); coalescing {
					model = superfluous(model)
				}
			}
			if coalescing = coalescing && len(model) > 0; (q.latest != nil) != coalescing {
				t.Fatalf("seed %d: coalescing is %v, want %v", seed, q.latest != nil, coalescing)
			}
			if got := contents(t, &q); !slices.Equal(got, model) {
				t.Fatalf("seed %d: queue and model differ", seed)
			}
		}
		if n := len(model); q.clear() != n || q.head != nil || q.latest != nil {
			t.Fatalf("seed %d: not clear", seed)
		}
	}
}

// Each frame costs an item per socket that it is sent to. One more field would make the
// item a third larger.
func TestItemsAreSmall(t *testing.T) {
	t.Parallel()
	if size := unsafe.Sizeof(item{}); size > 48 {
		t.Errorf("an item has %d bytes, want at most 48", size)
	}
}
