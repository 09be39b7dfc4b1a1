package mesh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// act reads the records of the hinted entries, on the node that takes the write,
// and ends those that have run out.
//
// On a cluster the nodes fail each by itself. While one was away its keys could
// not be refreshed, and what ran out on the replica that took its place says
// nothing about its owner; but the lease, kept by another node, may have been
// renewed in time all along. So failovers are looked for first. After one no
// hint is acted on for one lease, see node.failover.
func (h *hints) act(ctx context.Context, due []dueHint) {
	if err := h.n.expiry.Look(ctx); err != nil || h.rests() {
		h.dropped.Add(uint64(len(due)))
		return
	}
	if _, ok := h.n.lease.Judge(); !ok {
		h.dropped.Add(uint64(len(due)))
		return
	}
	refs := make([]store.OwnedRef, len(due))
	for i, k := range due {
		refs[i] = store.OwnedRef{Room: k.room, Conn: k.conn}
	}
	asked := time.Now()
	records, err := h.n.store.Records(ctx, refs)
	if err != nil {
		h.failed(due, asked)
		return
	}
	buckets := make(map[int][]int) // of due and records
	for i, r := range records {
		if r.Entry != "" {
			buckets[due[i].bucket] = append(buckets[due[i].bucket], i)
		}
	}
	began := time.Now()
	var ended []hint
	for _, list := range buckets {
		items, of := h.items(due, records, list)
		ended = append(ended, h.end(ctx, items, of, asked)...)
	}
	h.tell(ctx, ended, began)
}

// end ends what hints of one bucket are about, and returns those that are true.
// Each bucket has a judgment of its own, which does not last for long, and what
// fails in one is nothing to the others.
func (h *hints) end(ctx context.Context, items []store.ReapItem, of []dueHint, asked time.Time) (ended []hint) {
	if len(items) == 0 {
		return nil
	}
	j, ok := h.n.lease.Judge()
	if !ok || h.rests() { // since just now
		h.dropped.Add(uint64(len(items)))
		return nil
	}
	began := time.Now()
	statuses, err := h.n.store.Reap(ctx, j, items)
	if errors.Is(err, store.ErrClock) {
		h.n.lease.ClockRefused(time.Since(began))
	}
	var open []dueHint
	for i, k := range of {
		switch statuses[i] {
		case store.Ended:
			h.acted.Add(1)
			ended = append(ended, k.hint)
		case 0:
			open = append(open, k)
		}
	}
	if err != nil {
		h.n.opts.Logger.Debug("mesh: expired entries not ended", "error", err)
		h.failed(open, asked)
	}
	return ended
}

// items returns what is to be ended of what some of the records hold, and the
// hint about each. Hints wait again if something failed since they came due: the owner may
// have been refused just now.
func (h *hints) items(due []dueHint, records []store.Record, list []int) (items []store.ReapItem, of []dueHint) {
	now := time.Now()
	for _, i := range list {
		k, r := due[i], records[i]
		if at, ok := turnOver(h.n.store.Writes(k.bucket), k.learned, k.turn()); !ok || now.Before(at) {
			h.put(k.hint, k.bucket, false)
			continue
		}
		item := store.ReapItem{
			Mode: store.ReapExpired, Room: k.room, Conn: r.Conn, Entry: r.Entry, Incarnation: r.Incarnation,
			StateVersion: r.StateVersion,
		}
		if k.kind == expiredState {
			item.Mode = store.ReapState
		}
		items = append(items, item)
		of = append(of, k)
	}
	return items, of
}

// failed puts hints back whose bucket has failed since the given time, so that a
// short outage does not lose them. It drops the others.
func (h *hints) failed(due []dueHint, since time.Time) {
	for _, k := range due {
		if h.n.store.Writes(k.bucket).Failed.Before(since) {
			h.dropped.Add(1)
			continue
		}
		h.put(k.hint, k.bucket, false)
	}
}

// tell makes the other servers forget hints about entries that this one has ended.
// If each server looked by itself, an expired entry would cost Redis more with every
// server. A server that misses the message looks, and finds nothing. So the message
// is not sent if it would come too late.
func (h *hints) tell(ctx context.Context, ended []hint, since time.Time) {
	ctx, cancel := context.WithDeadline(ctx, since.Add(tellWithin))
	defer cancel()
	if len(ended) == 0 || ctx.Err() != nil {
		return
	}
	var note strings.Builder
	for _, k := range ended { // ids hold no spaces, names of rooms no line ends
		fmt.Fprintf(&note, "%c %s %s\n", k.kind, k.conn, k.room)
	}
	if _, err := h.n.store.Publish(ctx, h.n.keys.Ended(), note.String()); err != nil {
		h.n.opts.Logger.Debug("mesh: ended entries not told to the other servers", "error", err)
	}
}
