package owner

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// lots is as many connections as fill several batches.
const lots = 5 * store.MaxOps

// taken is how many ops have been taken from the queue and are not over.
func (r *rig) taken() int {
	l := r.Owner.lanes[0]
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.taken
}

// While a full batch flies the next one is ready, and it is sent alone.
func TestABatchIsTakenAhead(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := make([]*Conn, lots)
		for i := range conns {
			conns[i] = r.connect(fmt.Sprint(i))
		}
		r.sleep(time.Second)
		r.plan(func(int, []store.Op) fault { return fault{before: 2 * time.Millisecond} })
		before := r.calls()
		var wg sync.WaitGroup
		for _, c := range conns {
			wg.Go(func() {
				_, err := c.Join(r.Context(), "x")
				assert.NoError(r, err)
			})
		}
		r.sleep(3 * time.Millisecond) // the first one, of whoever was first, is over
		assert.Equal(r, 2*store.MaxOps, r.taken())
		wg.Wait()
		assert.LessOrEqual(r, r.calls()-before, 1+lots/store.MaxOps)
		assert.False(r, r.redis.together)
		assert.Zero(r, r.taken())
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// Whatever becomes of the batch that flies, what was taken ahead of its answer
// is written once, and behind it.
func TestTakenAheadOfWhatFails(t *testing.T) {
	for name, x := range map[string]fault{
		"reply lost":    {lost: true},
		"never arrives": {never: true},
		"slow":          {before: 200 * time.Millisecond},
		"too slow":      {before: time.Second},
		"answer slow":   {after: time.Second},
		"late":          {late: 300 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				conns := make([]*Conn, lots)
				for i := range conns {
					conns[i] = r.connect(fmt.Sprint(i))
				}
				r.sleep(time.Second)
				start := r.calls()
				r.plan(func(call int, _ []store.Op) fault {
					if (call-start)%4 == 1 {
						return x
					}
					return fault{before: time.Millisecond}
				})
				var wg sync.WaitGroup
				for i, c := range conns {
					wg.Go(func() {
						room := fmt.Sprint("room", i%50)
						_, _ = c.Join(r.Context(), room) // may be told that Redis is away
						for n := range 3 {
							_ = c.PublishState(r.Context(), room, []byte(fmt.Sprint(n)), 0, false)
						}
						if i%2 == 0 {
							_, _ = c.Leave(r.Context(), room, store.CauseLeft)
						}
					})
				}
				wg.Wait()
				r.heal()
				r.sleep(10 * time.Second)
				assert.False(r, r.redis.together)
				assert.Zero(r, r.taken())
				joins, leaves := 0, 0
				for _, line := range r.said() {
					switch line[0] {
					case 'J':
						joins++
					case 'L':
						leaves++
					}
				}
				require.Equal(r, lots, joins)
				require.Equal(r, lots/2, leaves)
				r.atRest()
				r.drain()
				r.nothingLeft()
			})
		})
	}
}

// A new incarnation while a batch flies: what was taken ahead was made for the
// old one, and is made anew.
func TestTakenAheadForAnotherIncarnation(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := make([]*Conn, lots)
		for i := range conns {
			conns[i] = r.connect(fmt.Sprint(i))
		}
		r.sleep(time.Second)
		r.plan(func(int, []store.Op) fault { return fault{before: 2 * time.Millisecond} })
		var wg sync.WaitGroup
		for _, c := range conns {
			wg.Go(func() {
				_, err := c.Join(r.Context(), "x")
				assert.NoError(r, err)
			})
		}
		r.sleep(3 * time.Millisecond)
		require.Equal(r, 2*store.MaxOps, r.taken())
		r.redis.do(func() { r.redis.bury("I1") })
		r.reborn("I2", false)
		wg.Wait()
		r.sleep(10 * time.Second)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}
