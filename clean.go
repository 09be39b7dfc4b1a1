package mesh

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// CleanExpired ends the entries of a room whose TTL has run out, each with its
// leave event, and returns how many it ended. It is what remains to be done by
// hand where Options.EnablePresenceExpirationEvents is false. Any server may
// call it; of several that do, each entry is ended by one.
//
// Entries of other servers are only judged by one that has been in steady
// touch with Redis for one LeaseTTL: sooner, the call waits for that. It takes
// as long as ctx lasts. With an error it returns how many it ended until then.
func (p *PresenceManager) CleanExpired(ctx context.Context, room string) (int, error) {
	if err := p.n.use(room); err != nil {
		return 0, err
	}
	ended, err := p.n.owner.EndLapsed(ctx, room)
	if err != nil {
		return ended, p.n.storeError(err)
	}
	records, _, err := p.n.store.Some(ctx, room, -1)
	if err != nil {
		return ended, p.n.storeError(err)
	}
	var items []store.ReapItem
	for _, r := range records {
		if _, mine := p.n.owner.Conn(r.Conn); r.TTL > 0 && !mine {
			items = append(items, store.ReapItem{
				Mode: store.ReapExpired, Room: room, Conn: r.Conn, Entry: r.Entry, Incarnation: r.Incarnation,
			})
		}
	}
	if len(items) == 0 {
		return ended, nil
	}
	more, err := p.n.reap(ctx, items)
	return ended + more, p.n.storeError(err)
}

// reapTogether is how many entries are ended on one judgment, which holds for a
// short time only.
const reapTogether = 4 * store.MaxOps

// reap ends what is not this server's, and returns how many it ended.
func (n *node) reap(ctx context.Context, items []store.ReapItem) (int, error) {
	ended := 0
	for part := range slices.Chunk(items, reapTogether) {
		some, err := n.reapSome(ctx, part)
		ended += some
		if err != nil {
			return ended, err
		}
	}
	return ended, nil
}

// reapSome waits until this server may judge, and ends a few entries.
func (n *node) reapSome(ctx context.Context, items []store.ReapItem) (ended int, err error) {
	for {
		if j, ok := n.lease.Judge(); ok {
			began := time.Now()
			statuses, err := n.store.Reap(ctx, j, items)
			for _, s := range statuses {
				if s == store.Ended {
					ended++
				}
			}
			if !errors.Is(err, store.ErrClock) {
				return ended, err
			}
			n.lease.ClockRefused(time.Since(began))
		}
		t := time.NewTimer(wheelStep)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ended, ctx.Err()
		case <-n.life.Done():
			t.Stop()
			return ended, ErrClosed
		}
	}
}
