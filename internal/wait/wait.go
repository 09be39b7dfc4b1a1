// Package wait holds the small waits that several packages need: a sleep that a
// context ends, a wake-up signal, pauses between attempts, and work on many things a
// few at a time.
package wait

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// For waits for d. If ctx ends first, it returns the context's error at once. It
// returns nil only if ctx has not ended.
func For(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Signal wakes one goroutine that receives from it. Signals that have not been received yet are one signal. A Signal is safe for concurrent use; make it with NewSignal.
type Signal chan struct{}

// NewSignal returns a signal that is not set.
func NewSignal() Signal { return make(Signal, 1) }

// Set wakes the receiver, now or at its next receive. Set never blocks.
func (s Signal) Set() {
	select {
	case s <- struct{}{}:
	default:
	}
}

// Backoff is a series of pauses that double from First up to Last. It is a value
// without state: the caller counts its failures.
type Backoff struct {
	First, Last time.Duration
}

// After returns the pause after the given number of failures in a row. It is zero for
// no failure.
func (b Backoff) After(failures int) time.Duration {
	d := b.First
	for range failures - 1 {
		if d >= b.Last {
			break
		}
		d *= 2
	}
	if failures < 1 {
		return 0
	}
	return min(d, b.Last)
}

// Jitter returns d less a random part of up to share of it, 0 < share <= 1, so that the
// servers of one Redis do not try again at the same moment.
func Jitter(d time.Duration, share float64) time.Duration {
	if part := time.Duration(float64(d) * share); part > 0 {
		return d - rand.N(part)
	}
	return d
}

// Each calls work for 0 to n-1, at most atOnce calls at a time, and returns when all
// calls have returned. It stops with the first error, or with that of ctx: calls that
// have begun then go on, and no other begins. It returns that error.
func Each(ctx context.Context, n, atOnce int, work func(i int) error) error {
	var (
		mu   sync.Mutex // guards next and err
		next int
		err  error
		wg   sync.WaitGroup
	)
	take := func() (int, bool) {
		mu.Lock()
		defer mu.Unlock()
		if err == nil && next < n {
			err = ctx.Err()
		}
		if err != nil || next >= n {
			return 0, false
		}
		next++
		return next - 1, true
	}
	for range min(n, atOnce) {
		wg.Go(func() {
			for i, ok := take(); ok; i, ok = take() {
				if e := work(i); e != nil {
					mu.Lock()
					if err == nil {
						err = e
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return err
}
