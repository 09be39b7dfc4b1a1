package local

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// drained removes all items and returns their rooms in that order.
func drained(q *priorityQueue) (rooms []string) {
	for it := q.pop(true); it != nil; it = q.pop(true) {
		rooms = append(rooms, it.(*entry).room)
	}
	return rooms
}

func TestQueueGivesEachConnectionItsTurn(t *testing.T) {
	t.Parallel()
	a, b, c := &Conn{id: "a"}, &Conn{id: "b"}, &Conn{id: "c"}
	of := func(c *Conn, n int) *entry { return &entry{c: c, room: fmt.Sprint(c.id, n)} }
	var q priorityQueue
	assert.Nil(t, q.pop(true))
	for n := range 4 {
		q.push(of(a, n), timed)
	}
	q.push(of(b, 0), timed)
	q.push(of(c, 0), timed)
	q.push(of(b, 1), timed)
	assert.Equal(t, 7, q.n)
	first := []writable{q.pop(true), q.pop(true), q.pop(true)}
	q.push(of(c, 1), timed)
	assert.Equal(t, "b0", first[1].(*entry).room)
	q.putBack(first)
	assert.Equal(t, 8, q.n)
	assert.Equal(t, []string{"a0", "b0", "c0", "a1", "c1", "b1", "a2", "a3"}, drained(&q))
	assert.Zero(t, q)
	q.putBack(first)
	q.push(&orphan{}, background)
	q.push(&orphan{}, background)
	assert.Len(t, q.clear(), 5)
	assert.Zero(t, q)
}

// This compares with a plain model. Nothing is lost or doubled, the items of each
// connection keep their order, and none waits for more than one item of every other
// connection.
func TestQueueKeepsEachConnectionsOrder(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(5, 6))
	for range 200 {
		var q priorityQueue
		conns := make([]*Conn, 5)
		want := make(map[*Conn][]writable)
		for i := range conns {
			conns[i] = &Conn{id: fmt.Sprint(i)}
		}
		total := 0
		for range 100 {
			switch c := conns[rng.IntN(len(conns))]; rng.IntN(3) {
			case 0, 1:
				e := &entry{c: c}
				q.push(e, timed)
				want[c] = append(want[c], e)
				total++
			default:
				var batch []writable
				for range rng.IntN(6) {
					if it := q.pop(true); it != nil {
						batch = append(batch, it)
						require.Same(t, want[it.conn()][0], it)
						want[it.conn()] = want[it.conn()][1:]
					}
				}
				if rng.IntN(2) == 0 {
					q.putBack(batch)
					for _, it := range slices.Backward(batch) {
						want[it.conn()] = append([]writable{it}, want[it.conn()]...)
					}
				} else {
					total -= len(batch)
				}
			}
			require.Equal(t, total, q.n)
		}
		for it := q.pop(true); it != nil; it = q.pop(true) {
			require.Same(t, want[it.conn()][0], it)
			want[it.conn()] = want[it.conn()][1:]
			total--
		}
		require.Zero(t, total)
	}
}

// The entries of a connection in two hundred rooms are rewritten because of new metadata.
// A state of another connection goes with the next batch all the same.
func TestRewritingManyEntriesDelaysNoOther(t *testing.T) {
	virtual(t, func(r *rig) {
		big, small := r.connect("big"), r.connect("small")
		for i := range 200 {
			r.join(big, fmt.Sprint("room", i))
		}
		r.join(small, "x")
		r.plan(func(int, []store.Op) fault { return fault{before: 10 * time.Millisecond} })
		big.SetMeta(7, bytes.Repeat([]byte("7"), 16<<10))
		r.sleep(time.Millisecond) // the first batch is in flight
		began := r.calls()
		now := time.Now()
		r.publish(small, "x", "s", 0)
		assert.LessOrEqual(r, time.Since(now), 30*time.Millisecond, "what is under way, what is ready behind it, and its own")
		assert.LessOrEqual(r, r.calls()-began, 3)
		require.NoError(r, big.Flush(r.Context()))
		assert.GreaterOrEqual(r, r.calls()-began, 200/5, "there was much to do")
		r.atRest()
	})
}

// lineup queues an item of each of n connections, in as many rooms.
func lineup(q *priorityQueue, p priority, n, rooms int) []writable {
	items := make([]writable, n)
	for i := range items {
		items[i] = &entry{c: &Conn{id: fmt.Sprint(p, i)}, room: fmt.Sprint(p, i%rooms), inQueue: queueState{priority: p}}
		q.push(items[i], p)
	}
	return items
}

// While all priorities have items, each gets its share of every batch. The share of an
// empty one goes to the others.
func TestQueueServesAllPriorities(t *testing.T) {
	t.Parallel()
	var q priorityQueue
	for p := range priorities {
		lineup(&q, p, 100, 10)
	}
	round := 0
	for _, share := range priorityWeights {
		round += share
	}
	for range 5 {
		var got [priorities]int
		for range round {
			got[q.pop(true).queueState().priority]++
		}
		assert.Equal(t, priorityWeights, got)
	}
	var got [priorities]int
	for range 14 {
		got[q.pop(false).queueState().priority]++
	}
	assert.Equal(t, [priorities]int{timed: 8, asked: 4, arriving: 2}, got)

	q.clear()
	lineup(&q, background, 3, 1)
	assert.Nil(t, q.pop(false))
	for range 3 {
		assert.NotNil(t, q.pop(true))
	}
	assert.Zero(t, q)
}

// rank returns the number of items that are taken before it.
func rank(q *priorityQueue, it writable) int {
	for n := 0; ; n++ {
		if q.pop(true) == it {
			return n
		}
	}
}

// However many items wait to join one room, or a room each, and however much one
// connection has to write, an item of another connection and room is soon taken.
func TestQueueServesTheNewest(t *testing.T) {
	t.Parallel()
	for name, rooms := range map[string]int{"one room": 1, "some rooms": 40, "a room each": 1000} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var q priorityQueue
			backlog := lineup(&q, asked, 1000, rooms)
			for range 20 {
				late := &Conn{id: "late"}
				q.push(&registration{c: late}, arriving)
				own := &entry{c: late, room: "other"}
				q.push(own, asked)
				assert.LessOrEqual(t, rank(&q, own), 6)
			}
			assert.Zero(t, backlog[0].queueState().stays-1, "the oldest advance, too")
		})
	}
	t.Run("of one connection", func(t *testing.T) {
		t.Parallel()
		for _, p := range []priority{timed, asked, routine, background} {
			var q priorityQueue
			busy := &Conn{id: "busy"}
			for i := range 1000 {
				q.push(&entry{c: busy, room: fmt.Sprint(i), inQueue: queueState{priority: p}}, p)
			}
			other := &entry{c: &Conn{}, room: "other", inQueue: queueState{priority: p}}
			q.push(other, p)
			assert.LessOrEqual(t, rank(&q, other), 1)
		}
	})
	t.Run("of one room", func(t *testing.T) {
		t.Parallel()
		for _, p := range []priority{timed, asked, routine, background} {
			var q priorityQueue
			lineup(&q, p, 1000, 1)
			other := &entry{c: &Conn{}, room: "other", inQueue: queueState{priority: p}}
			q.push(other, p)
			assert.LessOrEqual(t, rank(&q, other), 1)
		}
	})
}

// An item with a higher priority leaves one queue for the other, even if it waits behind
// another item of its connection.
func TestQueueMoves(t *testing.T) {
	t.Parallel()
	var q priorityQueue
	items := lineup(&q, background, 50, 5)
	c := items[7].conn()
	behind := []writable{&entry{c: c, room: "x"}, &entry{c: c, room: "y"}}
	for _, it := range behind {
		it.queueState().priority = background
		q.push(it, background)
	}
	q.move(behind[1], background, timed)
	assert.Same(t, behind[1], q.pop(true))
	q.move(items[7], background, timed)
	assert.Same(t, items[7], q.pop(true))
	assert.Equal(t, 50, q.n)
	for _, it := range items[10:] {
		q.move(it, background, asked)
	}
	seen := make(map[writable]bool)
	for it := q.pop(true); it != nil; it = q.pop(true) {
		assert.False(t, seen[it])
		seen[it] = true
	}
	assert.Len(t, seen, 50)
	assert.True(t, seen[behind[0]], "it has followed the one that was moved")
	assert.Zero(t, q)
}
