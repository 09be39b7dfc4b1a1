package store

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// fenceLife is the time for which the fence of a dead incarnation is kept. It is far
// longer than a message can wait in a proxy.
const fenceLife = 24 * time.Hour

// leasing is the slot of the scripts that maintain the leases, which are in bucket 0.
func (s *Store) leasing() slotRef { return slotRef{s.leases, 0, true} }

// unqueued is the slot of calls without a bucket that must not wait for calls of
// clients.
func (s *Store) unqueued() slotRef { return slotRef{s.leases, nowhere, false} }

// nameLife is the time for which the name of an incarnation is kept after its last
// renewal. The incarnation may be in the list of dead servers that long. The server
// that removes it from that list also deletes the name, unless it runs a version
// without names.
const nameLife = 24 * time.Hour

// nameEvery is the number of renewals after which a name that Redis lost is written
// again.
const nameEvery = 4

// Named sets the name that Register and Renew keep in Redis for all incarnations of
// this server. Call it before use.
func (s *Store) Named(name string) { s.name = name }

// Register adds an incarnation to the list of live servers for ttl, with its name. It
// returns the time of Redis (unix ms).
func (s *Store) Register(ctx context.Context, inc string, ttl time.Duration) (int64, error) {
	reply, err := runIn(ctx, s, s.leasing(), registerScript, []string{s.keys.Instances(), s.keys.Name(inc)},
		inc, millis(ttl), s.name, millis(nameLife))
	if err != nil {
		return 0, err
	}
	text, ok := reply.(string)
	if !ok {
		return 0, fmt.Errorf("register: %w", errFormat)
	}
	return strconv.ParseInt(text, 10, 64)
}

// Renew extends a lease to ttl from now if the incarnation is still in the list of live
// servers, and publishes echo on the incarnation's channel.
func (s *Store) Renew(ctx context.Context, inc string, ttl time.Duration, echo string, wantDead bool) (Renewal, error) {
	// An idle server must not cost Redis more than two commands a second. Renewals
	// therefore alternate between the size of the index and the format key, and a lost
	// name waits for a few renewals.
	renewals := s.renewals.Add(1)
	last, layout, name := s.keys.Format(), s.layout(), ""
	if s.keys.Buckets() == 1 && renewals%2 == 1 {
		last, layout = s.keys.Owned(0, inc), ""
	}
	if renewals%nameEvery == 0 {
		name = s.name
	}
	keys := []string{s.keys.Instances(), s.keys.Dead(), last, s.keys.Name(inc)}
	want := "0"
	if wantDead {
		want = "1"
	}
	began := time.Now()
	reply, err := runIn(ctx, s, s.leasing(), renewScript, keys, inc, millis(ttl), s.keys.ServerChannel(inc), echo, want, layout, name, millis(nameLife))
	if err != nil {
		return Renewal{}, err
	}
	s.slots[0].health.noteSuccess(began)
	f, err := texts(reply)
	if err != nil || len(f) < 6 {
		return Renewal{}, fmt.Errorf("renew: %w", errFormat)
	}
	var p parser
	r := Renewal{Listed: f[0] == "1", Now: p.int(f[1]), Next: f[2], Owned: -1}
	if r.Next != "" {
		r.NextIn = time.Duration(p.int(f[3])-r.Now) * time.Millisecond
	}
	if f[4] != "-1" {
		r.Owned = p.int(f[4])
	}
	r.Receivers = p.int(f[5])
	if wantDead {
		r.Dead = []string{}
		for pair := range slices.Chunk(f[6:], 2) {
			if len(pair) < 2 {
				return Renewal{}, fmt.Errorf("renew: %w", errFormat)
			}
			r.Dead, r.DeadSince = append(r.Dead, pair[0]), append(r.DeadSince, p.int(pair[1]))
		}
	}
	return r, p.err
}

// DeclareDeadIfExpired moves an incarnation whose lease has run out from the live to
// the dead servers. It returns true if this call moved it.
func (s *Store) DeclareDeadIfExpired(ctx context.Context, proof ClockProof, inc string) (bool, error) {
	reply, err := runIn(ctx, s, s.leasing(), declareDeadIfExpiredScript, []string{s.keys.Instances(), s.keys.Dead()}, inc, proof.Now, millis(proof.Tolerance))
	if err != nil {
		return false, err
	}
	if reply == "CLOCK" {
		return false, ErrClock
	}
	return reply == "1", nil
}

// DeclareDead moves the caller's own incarnation to the dead servers, or puts a dead one
// back if the list was lost. It does nothing after RemoveDead.
func (s *Store) DeclareDead(ctx context.Context, inc string) error {
	_, err := runIn(ctx, s, s.leasing(), declareDeadScript, []string{s.keys.Instances(), s.keys.Dead(), s.keys.Fence(0, inc)}, inc)
	return err
}

// RemoveDead removes an incarnation from the list of dead servers, and deletes its
// name. Call it when nothing else of the incarnation is left. A copy of DeclareDead that
// arrives later does nothing.
func (s *Store) RemoveDead(ctx context.Context, inc string) error {
	_, err := within(ctx, s, s.unqueued(), func(ctx context.Context) ([]redis.Cmder, error) {
		pipe := s.client.Pipeline()
		pipe.Eval(ctx, fenceLua, []string{s.keys.Fence(0, inc)}, millis(fenceLife), "1")
		pipe.Del(ctx, s.keys.Name(inc))
		pipe.ZRem(ctx, s.keys.Dead(), inc)
		return pipe.Exec(ctx)
	})
	return err
}

// Names returns the names of incarnations in the given order, "" for an incarnation
// without one. The caller must validate them, because Redis may hold anything.
func (s *Store) Names(ctx context.Context, incs []string) ([]string, error) {
	names := make([]string, 0, len(incs))
	for part := range slices.Chunk(incs, sizesPerCall) {
		keys := make([]string, len(part))
		for i, inc := range part {
			keys[i] = s.keys.Name(inc)
		}
		values, err := read(ctx, s, keys[0], func(ctx context.Context) ([]any, error) {
			return s.client.MGet(ctx, keys...).Result()
		})
		if err == nil && len(values) != len(part) {
			err = fmt.Errorf("names: %w", errFormat)
		}
		if err != nil {
			return nil, err
		}
		for _, value := range values {
			name, _ := value.(string)
			names = append(names, name)
		}
	}
	return names, nil
}

// Fence fences an incarnation in a bucket: Redis then refuses all of its batches there.
func (s *Store) Fence(ctx context.Context, bucket int, inc string) error {
	key := s.keys.Fence(bucket, inc)
	_, err := runIn(ctx, s, s.at(key).fence(), fenceScript, []string{key}, millis(fenceLife), "0")
	return err
}
