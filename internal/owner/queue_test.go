package owner

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

// drained returns the rooms of what is queued, as they come.
func drained(q *queue) (rooms []string) {
	for it := q.pop(); it != nil; it = q.pop() {
		rooms = append(rooms, it.(*entry).room)
	}
	return rooms
}

func TestQueueGivesEachConnectionItsTurn(t *testing.T) {
	t.Parallel()
	a, b, c := &Conn{id: "a"}, &Conn{id: "b"}, &Conn{id: "c"}
	of := func(c *Conn, n int) *entry { return &entry{c: c, room: fmt.Sprint(c.id, n)} }
	var q queue
	assert.Nil(t, q.pop())
	for n := range 4 {
		q.push(of(a, n))
	}
	q.push(of(b, 0))
	q.push(of(c, 0))
	q.push(of(b, 1))
	assert.Equal(t, 7, q.n)
	first := []item{q.pop(), q.pop(), q.pop()}
	q.push(of(c, 1))
	assert.Equal(t, "b0", first[1].(*entry).room)
	q.back(first)
	assert.Equal(t, 8, q.n)
	assert.Equal(t, []string{"a0", "b0", "c0", "a1", "b1", "c1", "a2", "a3"}, drained(&q))
	assert.Zero(t, q)
	q.back(first)
	q.push(&stray{})
	q.push(&stray{})
	assert.Len(t, q.clear(), 5)
	assert.Zero(t, q)
}

// Against a plain model: nothing is lost or doubled, each connection's items
// keep their order, and none waits for more than one of every other.
func TestQueueKeepsEachConnectionsOrder(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(5, 6))
	for range 200 {
		var q queue
		conns := make([]*Conn, 5)
		want := make(map[*Conn][]item)
		for i := range conns {
			conns[i] = &Conn{id: fmt.Sprint(i)}
		}
		total := 0
		for range 100 {
			switch c := conns[rng.IntN(len(conns))]; rng.IntN(3) {
			case 0, 1:
				e := &entry{c: c}
				q.push(e)
				want[c] = append(want[c], e)
				total++
			default:
				var batch []item
				for range rng.IntN(6) {
					if it := q.pop(); it != nil {
						batch = append(batch, it)
						require.Same(t, want[it.conn()][0], it)
						want[it.conn()] = want[it.conn()][1:]
					}
				}
				if rng.IntN(2) == 0 {
					q.back(batch)
					for _, it := range slices.Backward(batch) {
						want[it.conn()] = append([]item{it}, want[it.conn()]...)
					}
				} else {
					total -= len(batch)
				}
			}
			require.Equal(t, total, q.n)
		}
		for it := q.pop(); it != nil; it = q.pop() {
			require.Same(t, want[it.conn()][0], it)
			want[it.conn()] = want[it.conn()][1:]
			total--
		}
		require.Zero(t, total)
	}
}

// A connection whose metadata is in two hundred rooms has all of them
// rewritten; somebody else's state goes with the next batch all the same.
func TestManyEntriesOfOneHoldUpNobody(t *testing.T) {
	virtual(t, func(r *rig) {
		big, small := r.connect("big"), r.connect("small")
		for i := range 200 {
			r.join(big, fmt.Sprint("room", i))
		}
		r.join(small, "x")
		r.plan(func(int, []store.Op) fault { return fault{before: 10 * time.Millisecond} })
		big.SetMeta(7, bytes.Repeat([]byte("7"), 16<<10))
		r.sleep(time.Millisecond) // the first batch is under way
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
