package store

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// hurried is the least duration of a call whose timeout says something about
	// Redis. A caller may give up sooner.
	hurried = 250 * time.Millisecond
	// oneOutage: a failure this soon after a recovery belongs to the same outage.
	oneOutage = 3 * time.Second
)

// Writes says whether Redis takes this server's writes in one bucket, as far as
// this server's own calls show it.
type Writes struct {
	// Last is when the newest write began that has succeeded, and Back when the
	// answer to a write last said so. Zero: none has.
	Last, Back time.Time
	// Failed is when Redis last refused a call, or a call failed on the way.
	// Zero: that never happened.
	Failed time.Time
	// Since is when the first write returned that began after Failed. Writes
	// have succeeded since then. Zero: none has succeeded since Failed.
	Since time.Time
	// Broken says that in the last outage some calls got no answer at all. After
	// a refusal every server can write at once when it ends. After a broken
	// connection a server may first have to wait for a call or for a dial.
	Broken bool
}

// writes collects what Writes reports of one bucket.
type writes struct {
	mu       sync.Mutex // guards the fields below
	now      Writes
	answered time.Time
}

// wrote notes a write that began at the given time and has succeeded.
func (w *writes) wrote(began time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.now.Back = now
	if began.After(w.now.Last) {
		w.now.Last = began
	}
	// Redis may have answered a write that began earlier before it refused the
	// call that failed.
	if w.now.Since.IsZero() && began.After(w.now.Failed) {
		w.now.Since = now
	}
}

// failed notes a failure.
func (w *writes) failed(broken bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if !w.now.Since.IsZero() && now.Sub(w.now.Since) > oneOutage || w.now.Failed.IsZero() {
		w.now.Broken = false // another outage begins
	}
	w.now.Failed, w.now.Since = now, time.Time{}
	w.now.Broken = w.now.Broken || broken
}

// answer notes that Redis answered a call, with whatever.
func (w *writes) answer() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answered = time.Now()
}

// Writes returns the recent successes and failures of writes in a bucket.
func (s *Store) Writes(bucket int) Writes {
	w := &s.places[bucket].health
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

// Answered returns when Redis last answered a call of a bucket, be it too late
// for the caller. Zero: it never did.
func (s *Store) Answered(bucket int) time.Time {
	w := &s.places[bucket].health
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answered
}

// TryWrite makes a write in a bucket that changes nothing. Redis refuses it
// whenever it refuses a refresh. It needs no memory, as a refresh does not.
func (s *Store) TryWrite(ctx context.Context, bucket int) error {
	key := s.keys.Rooms(bucket)
	began := time.Now()
	_, err := within(ctx, s, s.places[bucket].write(), func(ctx context.Context) (int64, error) {
		return s.client.SRem(ctx, key, "").Result()
	})
	switch {
	case err == nil:
		s.places[bucket].health.wrote(began)
	case answered(err): // whatever Redis said
		s.places[bucket].health.failed(false)
	}
	return err
}

// Disturbed notes that a connection to Redis that is not used for calls was
// lost: others may have been lost with it.
func (s *Store) Disturbed() { s.unwell(nowhere, true) }

// unwell notes a failure in a bucket, or in all of them (nowhere).
func (s *Store) unwell(bucket int, broken bool) {
	if bucket != nowhere {
		s.places[bucket].health.failed(broken)
		return
	}
	for i := range s.places {
		s.places[i].health.failed(broken)
	}
}

// suffered notes the error of a call that took so long, if it says something
// about Redis. ctx is the call's: if it has ended, the caller has given up. The
// client library also returns, at once, the timeout of an earlier dial.
//
// If Redis refuses to read, or an administrative command, because it lacks the
// command or the user lacks the right, it may go on to for ever and take every
// write. Only a write tells.
func (s *Store) suffered(ctx context.Context, at place, took time.Duration, err error) {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, errFormat):
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil && took < hurried:
	case answered(err) && aboutData(err.Error()):
	case !at.writes && notAllowed(err):
	default:
		s.unwell(at.bucket, !answered(err))
	}
}

// answered reports whether a call came back with an answer of Redis.
func answered(err error) bool {
	var answer redis.Error
	return err == nil || errors.As(err, &answer)
}

// notAllowed reports whether Redis lacks the command, or the user the right to it.
func notAllowed(err error) bool {
	text, ok := said(err)
	return ok && (isForbidden(text) || isMissing(text))
}

// aboutData reports whether Redis refused something on account of what is stored
// there, or of how much. Other writes are taken then: refreshes and endings need
// no memory. Before Redis 7 a script's error carries that of its command within.
func aboutData(text string) bool {
	for _, code := range []string{"WRONGTYPE ", "WRONGFORMAT ", "OOM ", "NOSCRIPT "} {
		if strings.Contains(text, code) {
			return true
		}
	}
	return false
}
