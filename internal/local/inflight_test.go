package local

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// severalBatches is a number of connections that fill several batches.
const severalBatches = 5 * store.MaxOps

// taken returns the number of ops that were taken from the queue and are not done.
func (r *rig) taken() int {
	w := r.Registry.writers[0]
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.takenOps
}

// While a full batch is in flight the next one is taken, and it is sent alone.
func TestABatchIsTakenAhead(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := make([]*Conn, severalBatches)
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
		r.sleep(3 * time.Millisecond) // the small first batch is done
		assert.Equal(r, 2*store.MaxOps, r.taken())
		wg.Wait()
		assert.LessOrEqual(r, r.calls()-before, 1+severalBatches/store.MaxOps)
		assert.False(r, r.redis.overlapped)
		assert.Zero(r, r.taken())
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// A batch that was taken ahead is written once and after the one in flight, whatever
// happens to that one.
func TestBatchTakenAheadOfAFailure(t *testing.T) {
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
				conns := make([]*Conn, severalBatches)
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
						_, _ = c.Join(r.Context(), room) // may return ErrUnavailable
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
				assert.False(r, r.redis.overlapped)
				assert.Zero(r, r.taken())
				joins, leaves := 0, 0
				for _, line := range r.told() {
					switch line[0] {
					case 'J':
						joins++
					case 'L':
						leaves++
					}
				}
				require.Equal(r, severalBatches, joins)
				require.Equal(r, severalBatches/2, leaves)
				r.atRest()
				r.drain()
				r.nothingLeft()
			})
		})
	}
}

// The incarnation changes while a batch is in flight. The batch that was taken ahead was
// made for the old incarnation, and is made again.
func TestTakenAheadForAnotherIncarnation(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := make([]*Conn, severalBatches)
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
		r.redis.do(func() { r.redis.cleanUpDead("I1") })
		r.reregister("I2", false)
		wg.Wait()
		r.sleep(10 * time.Second)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}
