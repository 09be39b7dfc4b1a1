package mesh

import (
	"context"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// A server ends entries of other servers because their keys are gone. A key is
// also gone if Redis took no writes for a while, too short for any
// server's patience to suffer: then its owner could not refresh it, and will as soon as
// Redis takes writes again. So the owner's turn comes first.
//
// Interleavings that the rules below exclude, with TTL 1 s (a key lives for two):
//
//   - Redis refuses writes for 1.8 s. The key runs out in the outage, and its
//     event arrives in the outage, too. Counted from the event, the turn of the
//     owner would be over when the outage is, or before. So it counts from the
//     moment when writes succeed again, at the earliest.
//   - The same, and the server that gets the event writes nothing in the outage.
//     It would not know that there is one. So a write of its own must have
//     succeeded since it got the event, and it makes one (store.TryWrite).
//   - Writes are refused, accepted for a moment and refused again. The owner,
//     which tries every 200 ms, may miss that moment. So trying goes on while
//     hints wait, and each failure begins the owner's turn again.
//   - Connections break instead. The client library dials again only once a
//     second, and a call over a connection that swallows everything may take two
//     until it is given up. The owner then needs longer than after a refusal.
//   - All of it between the last check and the script that ends the entry. The
//     key was gone before that, for the owner's whole turn, in which writes
//     succeeded: that is no outage's doing.
const (
	// ownersTurn is the time that an owner has to refresh its keys before other
	// servers act. Owners retry a refused batch every 200 ms.
	ownersTurn = 500 * time.Millisecond
	// reconnectTurn is ownersTurn after calls got no answer: see store.Writes.
	reconnectTurn = 2500 * time.Millisecond
	// tryEvery is how often it is tried whether Redis takes writes while hints
	// wait and nothing else is written, and tryRarely is that in a long outage.
	tryEvery  = 200 * time.Millisecond
	tryRarely = time.Second
	// tryWithin limits one such attempt.
	tryWithin = 600 * time.Millisecond
	// confirmed is how old the newest success may be when a server acts.
	confirmed = 300 * time.Millisecond
)

// turnOver returns when the owner's turn is over about something that was
// learned at the given time, and takes so long as turn without an outage.
// False: that depends on a write, which has not succeeded yet.
func turnOver(w store.Writes, learned time.Time, turn time.Duration) (at time.Time, ok bool) {
	if w.Last.Before(learned) || w.Since.IsZero() {
		return time.Time{}, false
	}
	at = learned.Add(turn)
	if w.Failed.IsZero() {
		return at, true
	}
	after := w.Since.Add(ownersTurn)
	if w.Broken {
		after = w.Since.Add(reconnectTurn)
	}
	if after.After(at) {
		at = after
	}
	return at, true
}

// mayAct reports whether the owner's turn is over, and writes succeed still.
func mayAct(w store.Writes, learned time.Time, turn, lead time.Duration, now time.Time) bool {
	at, ok := turnOver(w, learned, turn)
	return ok && !now.Before(at.Add(lead)) && now.Sub(w.Back) < confirmed
}

// trials find out whether Redis takes writes, bucket by bucket, as long as
// hints wait there. The zero value is ready for use.
type trials struct {
	mu   sync.Mutex // guards of
	of   map[int]*trial
	work sync.WaitGroup
}

// trial holds the attempts to write in one bucket.
type trial struct {
	flying bool
	next   time.Time
	pause  time.Duration
}

// want tries a write in a bucket, beside the caller, if it is time to and no
// other write of this server has just answered the question. fresh says that
// there is something that no write has succeeded since. done is called after it.
func (t *trials) want(ctx context.Context, s *store.Store, bucket int, fresh bool, done func()) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.of == nil {
		t.of = make(map[int]*trial)
	}
	it := t.of[bucket]
	if it == nil {
		it = &trial{pause: tryEvery}
		t.of[bucket] = it
	}
	if it.flying || now.Before(it.next) || !fresh && now.Sub(s.Writes(bucket).Last) < tryEvery {
		return
	}
	it.flying = true
	t.work.Go(func() {
		cctx, cancel := context.WithTimeout(ctx, tryWithin)
		err := s.TryWrite(cctx, bucket)
		cancel()
		t.mu.Lock()
		it.flying = false
		if err == nil {
			it.pause = tryEvery
		} else {
			it.pause = min(it.pause*5/4, tryRarely)
		}
		it.next = now.Add(it.pause)
		t.mu.Unlock()
		done()
	})
}

// forget forgets buckets in which no hint waits.
func (t *trials) forget(wanted map[int]store.Writes) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for bucket, it := range t.of {
		if _, ok := wanted[bucket]; !ok && !it.flying {
			delete(t.of, bucket)
		}
	}
}
