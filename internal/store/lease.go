package store

import (
	"context"
	"fmt"
	"strconv"
	"time"
)

// fenceLife is how long a dead incarnation stays locked out: far longer than
// anything it sent can sit in a proxy.
const fenceLife = 24 * time.Hour

// leasing is where the scripts run that keep the list of the living. It is in
// bucket 0.
func (s *Store) leasing() place { return place{s.leases, 0, true} }

// unqueued is where calls of no one bucket run that do not wait for what clients
// ask.
func (s *Store) unqueued() place { return place{s.leases, nowhere, false} }

// Register puts an incarnation on the list of the living for ttl and returns
// Redis's time (unix ms).
func (s *Store) Register(ctx context.Context, inc string, ttl time.Duration) (int64, error) {
	reply, err := runIn(ctx, s, s.leasing(), registerScript, []string{s.keys.Instances()}, inc, millis(ttl))
	if err != nil {
		return 0, err
	}
	text, ok := reply.(string)
	if !ok {
		return 0, fmt.Errorf("register: %w", errFormat)
	}
	return strconv.ParseInt(text, 10, 64)
}

// Renew prolongs a lease to ttl from now, only if it is still on the list, and
// publishes beat on the incarnation's control channel.
func (s *Store) Renew(ctx context.Context, inc string, ttl time.Duration, beat string, wantDead bool) (Renewal, error) {
	// The size of the index and the format are looked at in turns: an idle server
	// must not cost Redis more than two commands a second.
	last, layout := s.keys.Format(), s.layout()
	if s.keys.Buckets() == 1 && s.renewals.Add(1)%2 == 1 {
		last, layout = s.keys.Owned(0, inc), ""
	}
	keys := []string{s.keys.Instances(), s.keys.Dead(), last}
	want := "0"
	if wantDead {
		want = "1"
	}
	began := time.Now()
	reply, err := runIn(ctx, s, s.leasing(), renewScript, keys, inc, millis(ttl), s.keys.Control(inc), beat, want, layout)
	if err != nil {
		return Renewal{}, err
	}
	s.places[0].health.wrote(began)
	f, err := texts(reply)
	if err != nil || len(f) < 6 {
		return Renewal{}, fmt.Errorf("renew: %w", errFormat)
	}
	var p parser
	r := Renewal{Present: f[0] == "1", Now: p.int(f[1]), Next: f[2], Owned: -1}
	if r.Next != "" {
		r.NextIn = time.Duration(p.int(f[3])-r.Now) * time.Millisecond
	}
	if f[4] != "-1" {
		r.Owned = p.int(f[4])
	}
	r.Heard = p.int(f[5])
	if wantDead {
		r.Dead = append([]string{}, f[6:]...)
	}
	return r, p.err
}

// Bury moves an incarnation whose lease has run out from the living to the
// dead. True: this call did.
func (s *Store) Bury(ctx context.Context, j Judgment, inc string) (bool, error) {
	reply, err := runIn(ctx, s, s.leasing(), buryScript, []string{s.keys.Instances(), s.keys.Dead()}, inc, j.Now, millis(j.Tolerance))
	if err != nil {
		return false, err
	}
	if reply == "CLOCK" {
		return false, ErrClock
	}
	return reply == "1", nil
}

// DeclareDead moves the caller's own incarnation to the dead.
func (s *Store) DeclareDead(ctx context.Context, inc string) error {
	_, err := runIn(ctx, s, s.leasing(), declareScript, []string{s.keys.Instances(), s.keys.Dead()}, inc)
	return err
}

// Cleaned takes an incarnation off the list of the dead, when nothing of it is left.
func (s *Store) Cleaned(ctx context.Context, inc string) error {
	_, err := within(ctx, s, s.unqueued(), func(ctx context.Context) (int64, error) {
		return s.client.ZRem(ctx, s.keys.Dead(), inc).Result()
	})
	return err
}

// Fence locks an incarnation out of a bucket: none of its writes is taken any more.
func (s *Store) Fence(ctx context.Context, bucket int, inc string) error {
	key := s.keys.Fence(bucket, inc)
	_, err := runIn(ctx, s, s.at(key).fence(), fenceScript, []string{key}, millis(fenceLife))
	return err
}
