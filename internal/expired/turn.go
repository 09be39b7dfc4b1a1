package expired

import (
	"context"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// A server ends entries of other servers because their keys have expired. A key also
// expires if Redis takes no writes for a while, even if that is too short for any server
// to lose contact. The owner could not refresh the key then, and does so as soon as Redis
// takes writes again. So the owner's turn comes first.
//
// The rules below exclude these interleavings. The TTL is 1 s, so that a key lives for 2 s:
//
//   - Redis refuses writes for 1.8 s. The key expires in the outage, and its event arrives
//     in the outage, too. Counted from the event, the owner's turn would be over when the
//     outage is, or before. So the turn counts from the moment at which writes succeed
//     again, at the earliest.
//   - The same, and the server that receives the event writes nothing in the outage. It
//     would not notice the outage. So one of its own writes must have succeeded since it
//     received the event, and it makes one (store.TryWrite).
//   - Writes are refused, accepted for a moment and refused again. The owner, which tries
//     every 200 ms, may miss that moment. So trial writes go on while hints wait, and each
//     failure begins the owner's turn again.
//   - Connections break instead. The client library dials only once a second, and a call
//     over a connection that swallows everything may take two seconds to fail. The owner
//     then needs longer than after a refusal.
//   - All of it happens between the last check and the script that ends the entry. The key
//     was gone before that, for the owner's whole turn, in which writes succeeded. So no
//     outage has caused it.
const (
	// ownersTurn is the time that an owner has to refresh its keys before other servers
	// act. Owners retry a refused batch every 200 ms.
	ownersTurn = 500 * time.Millisecond
	// reconnectTurn is ownersTurn after calls that got no answer: see store.Writes.
	reconnectTurn = 2500 * time.Millisecond
	// tryEvery is the time between two trial writes while hints wait and nothing else is
	// written. In a long outage it grows to tryRarely.
	tryEvery  = 200 * time.Millisecond
	tryRarely = time.Second
	// tryWithin limits one trial write.
	tryWithin = 600 * time.Millisecond
	// confirmed is the greatest age of the newest successful write at which a server acts.
	confirmed = 300 * time.Millisecond
)

// turnOver returns the time at which the owner's turn is over. learned is the time at
// which this server learned of the expiry, and turn is the length of the turn without an
// outage. If turnOver is not ok, the time depends on a write that has not succeeded yet.
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

// mayAct reports whether the owner's turn is over, with a further delay of lead, and
// writes still succeed.
func mayAct(w store.Writes, learned time.Time, turn, lead time.Duration, now time.Time) bool {
	at, ok := turnOver(w, learned, turn)
	return ok && !now.Before(at.Add(lead)) && now.Sub(w.Back) < confirmed
}

// trialWrites write nothing of use, to learn whether Redis takes writes in the buckets in
// which hints wait. The zero value is ready for use.
type trialWrites struct {
	mu   sync.Mutex // guards of
	of   map[int]*trial
	work sync.WaitGroup
}

// trial is the state of the trial writes in one bucket.
type trial struct {
	inflight bool
	next     time.Time
	pause    time.Duration
}

// start begins a trial write in a bucket, on a goroutine, if it is time for one and no
// other write of this server has just succeeded. fresh says that no write has succeeded
// since the newest hint of the bucket. start calls done after the write.
func (t *trialWrites) start(ctx context.Context, s Store, bucket int, fresh bool, done func()) {
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
	if it.inflight || now.Before(it.next) || !fresh && now.Sub(s.Writes(bucket).Last) < tryEvery {
		return
	}
	it.inflight = true
	t.work.Go(func() {
		cctx, cancel := context.WithTimeout(ctx, tryWithin)
		err := s.TryWrite(cctx, bucket)
		cancel()
		t.mu.Lock()
		it.inflight = false
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

// forget drops the state of buckets in which no hint waits.
func (t *trialWrites) forget(wanted map[int]store.Writes) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for bucket, it := range t.of {
		if _, ok := wanted[bucket]; !ok && !it.inflight {
			delete(t.of, bucket)
		}
	}
}
