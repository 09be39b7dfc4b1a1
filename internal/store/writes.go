package store

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"
)

const (
	// shortestTelling is the minimum duration of a call whose timeout says something about
	// Redis. A caller may give up sooner.
	shortestTelling = 250 * time.Millisecond
	// oneOutage is the time after a recovery in which a failure still belongs to the
	// same outage.
	oneOutage = 3 * time.Second
)

// Writes is the knowledge from this server's own calls about whether Redis takes its
// writes in one bucket.
type Writes struct {
	// Last is when the newest successful write began. Back is when the last success was
	// answered. Zero means never.
	Last, Back time.Time
	// Failed is when Redis last refused a call, or a call failed on the way. Zero means
	// never.
	Failed time.Time
	// Since is when the first write returned that began after Failed and succeeded.
	// Zero means that none has succeeded since Failed.
	Since time.Time
	// Broken means that in the last outage some calls got no answer at all. After a
	// refusal every server can write as soon as it ends. After a broken connection a
	// server may first have to wait for a call or for a dial.
	Broken bool
}

// writes collects the data of Writes for one bucket.
type writes struct {
	mu       sync.Mutex // guards the fields below
	now      Writes
	answered time.Time
}

// noteSuccess records a write that began at the given time and succeeded.
func (w *writes) noteSuccess(began time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.now.Back = now
	if began.After(w.now.Last) {
		w.now.Last = began
	}
	// Redis may have answered a write that began earlier before it refused the call
	// that failed.
	if w.now.Since.IsZero() && began.After(w.now.Failed) {
		w.now.Since = now
	}
}

// noteFailure records a failure.
func (w *writes) noteFailure(broken bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if !w.now.Since.IsZero() && now.Sub(w.now.Since) > oneOutage || w.now.Failed.IsZero() {
		w.now.Broken = false // another outage begins
	}
	w.now.Failed, w.now.Since = now, time.Time{}
	w.now.Broken = w.now.Broken || broken
}

// noteAnswer records that Redis answered a call in any way.
func (w *writes) noteAnswer() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answered = time.Now()
}

// Writes returns the recent successes and failures of writes in a bucket.
func (s *Store) Writes(bucket int) Writes {
	w := &s.slots[bucket].health
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

// Answered returns when Redis last answered a call of a bucket, even if that was too
// late for the caller. Zero means never.
func (s *Store) Answered(bucket int) time.Time {
	w := &s.slots[bucket].health
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answered
}

// TryWrite makes a write in a bucket that changes nothing. Redis refuses it whenever it
// would refuse a refresh. Like a refresh it needs no memory.
func (s *Store) TryWrite(ctx context.Context, bucket int) error {
	key := s.keys.Rooms(bucket)
	began := time.Now()
	_, err := within(ctx, s, s.slots[bucket].write(), func(ctx context.Context) (int64, error) {
		return s.client.SRem(ctx, key, "").Result()
	})
	switch {
	case err == nil:
		s.slots[bucket].health.noteSuccess(began)
	case answered(err): // even an error counts as an answer
		s.slots[bucket].health.noteFailure(false)
	}
	return err
}

// MayHaveFailed records that a connection to Redis that is not used for calls was lost.
// Others may have been lost with it.
func (s *Store) MayHaveFailed() { s.noteUnhealthy(nowhere, true) }

// noteUnhealthy records a failure in a bucket, or in all buckets (nowhere).
func (s *Store) noteUnhealthy(bucket int, broken bool) {
	if bucket != nowhere {
		s.slots[bucket].health.noteFailure(broken)
		return
	}
	for i := range s.slots {
		s.slots[i].health.noteFailure(broken)
	}
}

// noteError records the error of a call of the given duration, if it says something
// about Redis. ctx is that of the call: if it has ended, the caller has given up. The
// client library may also return the timeout of an earlier dial at once.
//
// If Redis refuses a read or an administrative command because the command or the right
// to it is missing, that may never change, and writes may work all the time. Only a
// write shows that.
func (s *Store) noteError(ctx context.Context, at slotRef, took time.Duration, err error) {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, errFormat):
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil && took < shortestTelling:
	case answered(err) && aboutData(err.Error()):
	case !at.writes && notAllowed(err):
	default:
		s.noteUnhealthy(at.bucket, !answered(err))
	}
}

// answered reports whether a call came back with an answer of Redis.
func answered(err error) bool { return err == nil || isRedisError(err) }

// notAllowed reports whether Redis lacks the command, or the user lacks the right to
// it.
func notAllowed(err error) bool {
	text, ok := redisText(err)
	return ok && (isForbidden(text) || isMissing(text))
}

// aboutData reports whether Redis refused because of the type or the amount of stored
// data. Then it still takes other writes: refreshes and ends need no memory. Before
// Redis 7 a script's error contains that of its command.
func aboutData(text string) bool {
	for _, code := range []string{"WRONGTYPE ", "WRONGFORMAT ", "OOM ", "NOSCRIPT "} {
		if strings.Contains(text, code) {
			return true
		}
	}
	return false
}
