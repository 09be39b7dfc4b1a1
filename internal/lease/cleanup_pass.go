package lease

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// pass goes once through the entries and connections of inc in a bucket. It reads one
// page while it ends those of others, so that round trips do not add up.
func (c *cleaner) pass(ctx context.Context, bucket int, inc string, getProof proofFunc) (done tally, err error) {
	var (
		out   passResult
		wg    sync.WaitGroup
		slots = make(chan struct{}, maxPages)
	)
	for cursor := uint64(0); ; {
		var refs []store.EntryRef
		err := c.call(ctx, func(ctx context.Context) (err error) {
			refs, cursor, err = c.l.cfg.Store.OwnedPage(ctx, bucket, inc, cursor)
			return err
		})
		if err != nil {
			out.add(tally{}, err)
			break
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			c.page(ctx, bucket, inc, refs, getProof, &out)
		})
		if cursor == 0 || !out.add(tally{}, nil) {
			break
		}
	}
	wg.Wait()
	return out.done, out.err
}

// passResult is the result of a pass so far.
type passResult struct {
	mu      sync.Mutex // guards the fields below
	done    tally
	refused int
	err     error // the last one
}

// add adds the result of a call and reports whether to go on. An entry that Redis refuses
// to end does not keep the rest from ending. But a few refusals, or one because of the
// clock, end the pass.
func (p *passResult) add(some tally, err error) (goOn bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done.add(some)
	if err != nil {
		p.err = err
		p.refused++
	}
	if errors.Is(err, store.ErrClock) || errors.Is(err, context.Canceled) {
		p.refused = maxRefused
	}
	return p.refused < maxRefused
}

// page ends the entries and connections of one page of an index.
func (c *cleaner) page(ctx context.Context, bucket int, inc string, refs []store.EntryRef, getProof proofFunc, out *passResult) {
	items, conns := split(refs, inc)
	for batch := range slices.Chunk(items, cleanUpBatch) {
		if !out.add(c.end(ctx, batch, getProof)) {
			return
		}
	}
	for batch := range slices.Chunk(conns, cleanUpBatch) {
		err := c.call(ctx, func(ctx context.Context) error {
			return c.l.cfg.Store.ForgetConnections(ctx, bucket, inc, batch)
		})
		if !out.add(tally{}, err) {
			return
		}
	}
}

// split sorts a page into entries and connections.
func split(refs []store.EntryRef, inc string) (items []store.CleanUpItem, conns []string) {
	for _, ref := range refs {
		if ref.Room == "" && ref.Entry == "" {
			conns = append(conns, ref.Conn)
			continue
		}
		items = append(items, store.CleanUpItem{
			Mode: store.GroundDead, Room: ref.Room, Conn: ref.Conn, Entry: ref.Entry, Incarnation: inc,
		})
	}
	return items, conns
}

// end ends the entries of one batch, or hands them over, and counts them.
func (c *cleaner) end(ctx context.Context, items []store.CleanUpItem, getProof proofFunc) (done tally, err error) {
	proof, err := getProof(ctx)
	if err != nil {
		return done, err
	}
	leaseEnd := c.leaseEnd(items[0].Incarnation)
	for i := range items {
		items[i].Since = leaseEnd
	}
	sent := time.Now()
	var answers []store.CleanUpStatus
	err = c.call(ctx, func(ctx context.Context) (err error) {
		answers, err = c.l.cfg.Store.CleanUp(ctx, proof, items)
		return err
	})
	for i, status := range answers {
		switch status {
		case store.Ended:
			done.ended++
		case store.PlaceKept:
			done.kept++
			if it := &items[i]; c.l.cfg.Kept != nil {
				c.l.cfg.Kept(it.Room, it.Conn, it.Entry, it.KeptUntil)
			}
		}
	}
	c.observeDelays(items[0].Incarnation, done.ended)
	if errors.Is(err, store.ErrClock) {
		c.l.ClockRefused(time.Since(sent))
	}
	return done, err
}

// leaseEnd returns the time at which the lease of a dead incarnation ended, 0 if it is
// unknown.
func (c *cleaner) leaseEnd(inc string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known[inc].leaseEnd
}

// observeDelays records the delay of entries that have just ended.
func (c *cleaner) observeDelays(inc string, entries int) {
	c.mu.Lock()
	leaseUntil := c.known[inc].leaseUntil
	c.mu.Unlock()
	if !leaseUntil.IsZero() {
		c.delays.ObserveN(time.Since(leaseUntil), entries)
	}
}
