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
// Entries of other servers are only judged by a server that has been in steady
// touch with Redis for one LeaseTTL. Before that, the call waits as long as ctx
// lasts. If there are expired entries of other servers, their owners first get
// half a second in which Redis takes writes (2.5 seconds if connections broke):
// they may have been unable to refresh. It returns an error that wraps
// [ErrUnavailable] if Redis takes no writes for two seconds. With an error it
// returns how many it ended until then.
func (p *PresenceManager) CleanExpired(ctx context.Context, room string) (int, error) {
	if err := p.n.use(ctx, room); err != nil {
		return 0, err
	}
	ended, err := p.n.owner.EndLapsed(ctx, room)
	if err != nil {
		return ended, p.n.errorFor(ctx, err)
	}
	records, _, err := p.n.store.Some(ctx, room, -1)
	if err != nil {
		return ended, p.n.errorFor(ctx, err)
	}
	var conns []string
	of := make(map[string]store.Record)
	for _, r := range records {
		if _, mine := p.n.owner.Conn(r.Conn); r.TTL > 0 && !mine {
			conns = append(conns, r.Conn)
			of[r.Conn] = r
		}
	}
	lapsed, err := p.n.store.Lapsed(ctx, room, conns)
	if err != nil || len(lapsed) == 0 {
		return ended, p.n.errorFor(ctx, err)
	}
	items := make([]store.ReapItem, len(lapsed))
	for i, conn := range lapsed {
		items[i] = store.ReapItem{
			Mode: store.ReapExpired, Room: room, Conn: conn, Entry: of[conn].Entry, Incarnation: of[conn].Incarnation,
		}
	}
	more, err := p.n.reap(ctx, p.n.keys.RoomBucket(room), items)
	return ended + more, p.n.errorFor(ctx, err)
}

// reapTogether is the number of entries ended on one judgment, which holds for a
// short time only.
const reapTogether = 4 * store.MaxOps

// reap ends entries of other servers, all in one bucket, whose keys were gone a
// moment ago, and returns how many it ended. It waits for the owners' turn, and
// until this server may judge.
func (n *node) reap(ctx context.Context, bucket int, items []store.ReapItem) (ended int, err error) {
	began := time.Now()
	for part := range slices.Chunk(items, reapTogether) {
		some, err := n.reapSome(ctx, bucket, began, part)
		ended += some
		if err != nil {
			return ended, err
		}
	}
	return ended, nil
}

func (n *node) reapSome(ctx context.Context, bucket int, learned time.Time, items []store.ReapItem) (ended int, err error) {
	for {
		if err := n.awaitTurn(ctx, bucket, learned); err != nil {
			return ended, err
		}
		if j, ok := n.lease.Judge(); ok {
			sent := time.Now()
			statuses, err := n.store.Reap(ctx, j, items)
			for _, s := range statuses {
				if s == store.Ended {
					ended++
				}
			}
			if !errors.Is(err, store.ErrClock) {
				return ended, err
			}
			n.lease.ClockRefused(time.Since(sent))
		}
		if err := n.rest(ctx, wheelStep); err != nil {
			return ended, err
		}
	}
}

// awaitTurn waits until owners in a bucket have had their turn to refresh keys that
// were seen as expired at the given time. It returns ErrUnavailable if Redis takes no writes
// for callLimit.
func (n *node) awaitTurn(ctx context.Context, bucket int, learned time.Time) error {
	began, tried := time.Now(), time.Time{}
	for {
		now := time.Now()
		w := n.store.Writes(bucket)
		switch {
		case mayAct(w, learned, ownersTurn, 0, now):
			return nil
		case w.Since.IsZero() && now.Sub(began) >= callLimit && now.Sub(w.Back) >= callLimit:
			return store.ErrUnavailable
		case now.Sub(tried) >= tryEvery && now.Sub(w.Back) >= tryEvery/2:
			tried = now
			short, cancel := context.WithTimeout(ctx, tryWithin)
			_ = n.store.TryWrite(short, bucket) // Writes tells
			cancel()
			continue
		}
		if err := n.rest(ctx, wheelStep); err != nil {
			return err
		}
	}
}

// rest waits for a moment, unless ctx or the node ends.
func (n *node) rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-n.life.Done():
		return ErrClosed
	}
}
