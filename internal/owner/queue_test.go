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
	for it := q.pop(true); it != nil; it = q.pop(true) {
		rooms = append(rooms, it.(*entry).room)
	}
	return rooms
}

func TestQueueGivesEachConnectionItsTurn(t *testing.T) {
	t.Parallel()
	a, b, c := &Conn{id: "a"}, &Conn{id: "b"}, &Conn{id: "c"}
	of := func(c *Conn, n int) *entry { return &entry{c: c, room: fmt.Sprint(c.id, n)} }
	var q queue
	assert.Nil(t, q.pop(true))
	for n := range 4 {
		q.push(of(a, n), timed)
	}
	q.push(of(b, 0), timed)
	q.push(of(c, 0), timed)
	q.push(of(b, 1), timed)
	assert.Equal(t, 7, q.n)
	first := []item{q.pop(true), q.pop(true), q.pop(true)}
	q.push(of(c, 1), timed)
	assert.Equal(t, "b0", first[1].(*entry).room)
	q.back(first)
	assert.Equal(t, 8, q.n)
	assert.Equal(t, []string{"a0", "b0", "c0", "a1", "b1", "c1", "a2", "a3"}, drained(&q))
	assert.Zero(t, q)
	q.back(first)
	q.push(&stray{}, background)
	q.push(&stray{}, background)
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
				q.push(e, timed)
				want[c] = append(want[c], e)
				total++
			default:
				var batch []item
				for range rng.IntN(6) {
					if it := q.pop(true); it != nil {
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
		for it := q.pop(true); it != nil; it = q.pop(true) {
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

func lineup(q *queue, u urgency, n int) []item {
	items := make([]item, n)
	for i := range items {
		items[i] = &entry{c: &Conn{id: fmt.Sprint(u, i)}, marked: mark{urgency: u}}
		q.push(items[i], u)
	}
	return items
}

// While all urgencies wait each gets its share of every batch, and what one
// does not need goes to the others.
func TestQueueSharesOut(t *testing.T) {
	t.Parallel()
	var q queue
	for u := range urgencies {
		lineup(&q, u, 100)
	}
	round := 0
	for _, share := range shares {
		round += share
	}
	for range 5 {
		var got [urgencies]int
		for range round {
			got[q.pop(true).mark().urgency]++
		}
		assert.Equal(t, shares, got)
	}
	var got [urgencies]int
	for range 12 {
		got[q.pop(false).mark().urgency]++
	}
	assert.Equal(t, [urgencies]int{timed: 8, asked: 4}, got)

	q.clear()
	lineup(&q, background, 3)
	assert.Nil(t, q.pop(false))
	for range 3 {
		assert.NotNil(t, q.pop(true))
	}
	assert.Zero(t, q)
}

// Behind a backlog of asked items the newest and the oldest are served in turn.
func TestQueueServesNewestAndOldest(t *testing.T) {
	t.Parallel()
	var q queue
	backlog := lineup(&q, asked, 100)
	for i := range 20 {
		assert.Same(t, backlog[i], q.pop(true))
		late := &Conn{id: "late"}
		entries := []item{&registration{c: late}, &entry{c: late}}
		q.push(entries[0], asked)
		q.push(entries[1], asked)
		assert.Same(t, entries[0], q.pop(true))
		q.back([]item{&entry{c: &Conn{}, marked: mark{urgency: asked}}})
		q.pop(true) // what was put back goes first
		assert.Same(t, entries[1], q.pop(true), "in the order of its connection")
	}
	// A connection with more than a newcomer's items waits for its turns.
	var crowd []item
	busy := &Conn{id: "busy"}
	for range 2 * newcomer {
		it := &entry{c: busy}
		crowd = append(crowd, it)
		q.push(it, asked)
	}
	served := 0
	for range 2 * 2 * newcomer {
		if q.pop(true).conn() == busy {
			served++
		}
	}
	assert.Equal(t, newcomer, served)
}

// An item that becomes more urgent loses its place in one line and has one in
// the other. Nothing is kept of where it was.
func TestQueueMoves(t *testing.T) {
	t.Parallel()
	var q queue
	items := lineup(&q, background, 50)
	for range 100 {
		q.move(items[7], background, timed)
		assert.Same(t, items[7], q.lines[timed].turns[0].items[0])
		q.move(items[7], timed, background)
		assert.Zero(t, q.lines[timed])
	}
	assert.Equal(t, 50, q.n)
	assert.Len(t, q.lines[background].turns, 50)
	for _, it := range items[10:] {
		q.move(it, background, asked)
	}
	rest := 0
	for it := q.pop(true); it != nil; it = q.pop(true) {
		rest++
	}
	assert.Equal(t, 50, rest)
	assert.Zero(t, q)
	q.move(items[0], background, timed) // it is in no line
	assert.Zero(t, q)
}
