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

// Callers that wait together share a call of at most MaxOps.
func TestGroupCommit(t *testing.T) {
	virtual(t, func(r *rig) {
		r.plan(func(int, []store.Op) fault { return fault{before: time.Millisecond} })
		const n = 512
		conns := make([]*Conn, n)
		for i := range n {
			conns[i] = r.connect(fmt.Sprint(i))
		}
		r.sleep(time.Second)
		before := r.calls()
		var wg sync.WaitGroup
		began := time.Now()
		for i, c := range conns {
			wg.Go(func() {
				j, err := c.Join(r.Context(), fmt.Sprint("room", i%7))
				assert.NoError(r, err)
				assert.NotZero(r, j.Total)
			})
		}
		wg.Wait()
		assert.LessOrEqual(r, r.calls()-before, 1+(n+store.MaxOps-1)/store.MaxOps)
		assert.LessOrEqual(r, time.Since(began), 10*time.Millisecond)
		assert.Len(r, r.told(), n)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// Large states keep a call within MaxBytes.
func TestBatchesAreBoundedInBytes(t *testing.T) {
	virtual(t, func(r *rig) {
		r.plan(func(int, []store.Op) fault { return fault{before: time.Millisecond} })
		state := make([]byte, 20<<10)
		conns := make([]*Conn, 20)
		for i := range conns {
			conns[i] = r.connect(fmt.Sprint(i))
			r.join(conns[i], "x")
		}
		var wg sync.WaitGroup
		for _, c := range conns {
			wg.Go(func() { assert.NoError(r, c.PublishState(r.Context(), "x", state, 0, false)) })
		}
		wg.Wait()
		for _, b := range r.redis.batches {
			size := 0
			for i := range b {
				size += b[i].Size()
			}
			assert.Less(r, size, store.MaxBytes+21<<10)
		}
	})
}

// An item that is queued again while its batch is made goes with the next batch.
func TestItemOnceInABatch(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		require.NoError(r, c.Registered(r.Context()))
		w := &bucketWriter{registry: r.Registry, running: true} // only this test runs it
		for _, room := range []string{"x", "y"} {
			w.enqueue(&eager{entry: &entry{c: c, room: room}, l: w}, asked)
		}
		for range 3 {
			batch := w.take(nil).items
			require.Len(r, batch, 2)
			assert.NotSame(r, batch[0], batch[1])
		}
	})
}

// eager is queued again as soon as it was taken.
type eager struct {
	*entry
	l *bucketWriter
}

func (e *eager) next(_ string, after *store.Op) (store.Op, bool) {
	if after != nil {
		return store.Op{}, false
	}
	e.l.enqueue(e, asked)
	return store.Op{}, true
}

func TestBucketsAreWrittenConcurrently(t *testing.T) {
	virtual(t, func(r *rig) {
		r.plan(func(_ int, ops []store.Op) fault {
			if ops[0].Room == "bad" {
				return fault{before: 10 * time.Minute}
			}
			return fault{}
		})
		c := r.connect("a")
		_, err := c.Join(r.Context(), "bad")
		require.ErrorIs(r, err, ErrUnavailable)
		began := time.Now()
		r.join(c, "good")
		assert.Zero(r, time.Since(began))
	}, func(cfg *Config) {
		cfg.Buckets = 2
		cfg.RoomBucket = func(room string) int { return len(room) % 2 }
	})
}
