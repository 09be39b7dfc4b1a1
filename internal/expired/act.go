package expired

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/store"
)

// act reads the records of the hinted entries, on the node that takes the write, and ends
// those whose keys have expired.
//
// On a cluster each node fails by itself. While one is away, its keys cannot be refreshed,
// and a key that expires on the replica that takes its place says nothing about its
// owner. The lease is on another node, and may have been renewed in time. So act looks for
// failovers first. After a failover the queue pauses for the time of one lease.
func (q *Queue) act(ctx context.Context, due []hint) {
	if err := q.cfg.Look(ctx); err != nil || q.Paused() {
		q.dropped.Add(uint64(len(due)))
		return
	}
	if _, ok := q.cfg.Lease.ClockProof(); !ok {
		q.dropped.Add(uint64(len(due)))
		return
	}
	refs := make([]store.EntryRef, len(due))
	for i, h := range due {
		refs[i] = store.EntryRef{Room: h.Room, Conn: h.Conn}
	}
	asked := time.Now()
	records, err := q.cfg.Store.Records(ctx, refs)
	if err != nil {
		q.failed(due, asked)
		return
	}
	buckets := make(map[int][]int) // indexes of due and records
	for i, r := range records {
		if r.Entry != "" && !r.Kept() { // a kept place has ended its connection before
			buckets[due[i].bucket] = append(buckets[due[i].bucket], i)
		}
	}
	began := time.Now()
	var ended []keys.Expired
	for _, list := range buckets {
		items, of := q.items(due, records, list)
		ended = append(ended, q.end(ctx, items, of, asked)...)
	}
	q.notifyPeers(ctx, ended, began)
}

// end ends the entries and states of hints of one bucket, and returns those that it has
// ended. An entry whose place is kept is one of them. end takes a clock proof of its own, because a proof holds for a short time. A
// failure in one bucket does not concern the others.
func (q *Queue) end(ctx context.Context, items []store.CleanUpItem, of []hint, asked time.Time) (ended []keys.Expired) {
	if len(items) == 0 {
		return nil
	}
	proof, ok := q.cfg.Lease.ClockProof()
	if !ok || q.Paused() { // act has checked both, but Records took time
		q.dropped.Add(uint64(len(items)))
		return nil
	}
	began := time.Now()
	statuses, err := q.cfg.Store.CleanUp(ctx, proof, items)
	if errors.Is(err, store.ErrClock) {
		q.cfg.Lease.ClockRefused(time.Since(began))
	}
	var open []hint
	for i, h := range of {
		switch statuses[i] {
		case store.Ended:
			q.used.Add(1)
			ended = append(ended, h.Expired)
		case store.PlaceKept:
			q.placesKept.Add(1)
			ended = append(ended, h.Expired)
			tellKept(q.cfg.Kept, &items[i])
		case 0:
			open = append(open, h)
		}
	}
	if err != nil {
		q.cfg.Logger.Debug("mesh: expired entries not ended", "error", err)
		q.failed(open, asked)
	}
	return ended
}

// tellKept tells a hook, if there is one, that the place of an item is kept.
func tellKept(hook func(room, conn, entry string, until int64), it *store.CleanUpItem) {
	if hook != nil {
		hook(it.Room, it.Conn, it.Entry, it.KeptUntil)
	}
}

// items returns what to end according to some of the records, and the hint for each. A
// hint waits again if a write failed since it was due, because the owner's write may have
// failed, too.
func (q *Queue) items(due []hint, records []store.Record, list []int) (items []store.CleanUpItem, of []hint) {
	now := time.Now()
	for _, i := range list {
		h, r := due[i], records[i]
		if at, ok := turnOver(q.cfg.Store.Writes(h.bucket), h.learned, turnOf(h.Kind)); !ok || now.Before(at) {
			q.enqueue(h.Expired, h.bucket, false)
			continue
		}
		item := store.CleanUpItem{
			Mode: store.GroundExpired, Room: h.Room, Conn: r.Conn, Entry: r.Entry, Incarnation: r.Incarnation,
			StateVersion: r.StateVersion,
		}
		if h.Kind == keys.StateExpired {
			item.Mode = store.GroundStateExpired
		}
		items = append(items, item)
		of = append(of, h)
	}
	return items, of
}

// failed puts hints back if a write in their bucket has failed since the given time, so
// that a short outage does not lose them. It drops the others.
func (q *Queue) failed(due []hint, since time.Time) {
	for _, h := range due {
		if q.cfg.Store.Writes(h.bucket).Failed.Before(since) {
			q.dropped.Add(1)
			continue
		}
		q.enqueue(h.Expired, h.bucket, false)
	}
}

// notifyPeers tells the other servers which entries this one has ended, so that they drop
// their hints. If each server looked by itself, an expired entry would cost Redis more
// with every server. A server that misses the message looks, and finds nothing. So the
// message is not sent if it would be late.
func (q *Queue) notifyPeers(ctx context.Context, ended []keys.Expired, since time.Time) {
	ctx, cancel := context.WithDeadline(ctx, since.Add(notifyWithin))
	defer cancel()
	if len(ended) == 0 || ctx.Err() != nil {
		return
	}
	var note strings.Builder
	for _, e := range ended { // ids contain no spaces, and names of rooms no line ends
		fmt.Fprintf(&note, "%c %s %s\n", e.Kind, e.Conn, e.Room)
	}
	if _, err := q.cfg.Store.Publish(ctx, q.cfg.Channel, note.String()); err != nil {
		q.cfg.Logger.Debug("mesh: ended entries not told to the other servers", "error", err)
	}
}
