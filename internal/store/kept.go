package store

import (
	"context"

	"github.com/redis/go-redis/v9"
)

// KeptPlace is one item of the index of kept places.
type KeptPlace struct {
	EntryRef
	Until int64 // Redis time, unix ms
}

// Item returns the item that ends the place if its time is over. If it is not, CleanUp
// puts the place into the index again.
func (p KeptPlace) Item() CleanUpItem {
	return CleanUpItem{Mode: GroundGraceOver, Room: p.Room, Conn: p.Conn, Entry: p.Entry, Incarnation: NoOwner}
}

// Kept reads the kept places of a bucket in the order of their deadlines, at most limit
// of them, after the first skip. The index may list places that have ended, and lack
// places that exist: the records decide. CleanUp removes and restores items of the
// index. next is the number to skip for the following page, 0 after the last.
func (s *Store) Kept(ctx context.Context, bucket, skip, limit int) (places []KeptPlace, next int, err error) {
	key := s.keys.Kept(bucket)
	list, err := read(ctx, s, key, func(ctx context.Context) ([]redis.Z, error) {
		return s.client.ZRangeWithScores(ctx, key, int64(skip), int64(skip+limit)-1).Result()
	})
	if err != nil {
		return nil, 0, err
	}
	for _, z := range list {
		name, _ := z.Member.(string)
		ref, err := decodeOwned(name)
		if err != nil || ref.Entry == "" {
			continue // of other software
		}
		places = append(places, KeptPlace{EntryRef: ref, Until: int64(z.Score)})
	}
	if len(list) == limit {
		next = skip + limit
	}
	return places, next, nil
}

// NextKept returns the earliest deadline of the kept places in each of the buckets (Redis
// time, unix ms), 0 if there are none, in one round trip to each node.
func (s *Store) NextKept(ctx context.Context, buckets []int) ([]int64, error) {
	return call(ctx, s, func(ctx context.Context) ([]int64, error) {
		pipe := s.client.Pipeline()
		cmds := make([]*redis.ZSliceCmd, len(buckets))
		for i, b := range buckets {
			cmds[i] = pipe.ZRangeWithScores(ctx, s.keys.Kept(b), 0, 0)
		}
		if _, err := pipe.Exec(ctx); err != nil && !wrongType(err) {
			return nil, err
		}
		first := make([]int64, len(buckets))
		for i, c := range cmds {
			list, err := c.Result()
			if err != nil && !wrongType(err) {
				return nil, err
			}
			if len(list) > 0 {
				first[i] = int64(list[0].Score)
			}
		}
		return first, nil
	})
}
