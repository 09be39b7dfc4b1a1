package store

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"

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

// KeptOf returns the kept place of a user in a room. ok is false if there is none.
func (s *Store) KeptOf(ctx context.Context, room, user string) (place EntryRef, ok bool, err error) {
	key := s.keys.Users(room)
	seat, err := read(ctx, s, key, func(ctx context.Context) (string, error) { return s.client.HGet(ctx, key, user).Result() })
	conn, kept := strings.CutPrefix(seat, NoOwner)
	switch {
	case errors.Is(err, redis.Nil), err == nil && !kept, wrongType(err):
		return EntryRef{}, false, nil
	case err != nil:
		return EntryRef{}, false, err
	}
	r, ok, err := s.Record(ctx, room, conn)
	if err != nil || !ok || !r.Kept() || r.User != user {
		return EntryRef{}, false, err
	}
	return EntryRef{Conn: conn, Entry: r.Entry, Room: room}, true, nil
}

// anyTime is a proof for ends that do not depend on a clock.
var anyTime = ClockProof{Tolerance: math.MaxInt64}

// RemoveKept ends kept places at the app's request, and returns how many it has ended.
func (s *Store) RemoveKept(ctx context.Context, places []EntryRef) (ended int, err error) {
	items := make([]CleanUpItem, len(places))
	for i, p := range places {
		items[i] = CleanUpItem{Mode: GroundRemoved, Room: p.Room, Conn: p.Conn, Entry: p.Entry, Incarnation: NoOwner}
	}
	statuses, err := s.CleanUp(ctx, anyTime, items)
	for _, status := range statuses {
		if status == Ended {
			ended++
		}
	}
	return ended, err
}

// OverduePlaces calls f for the kept places whose time was over before a time on the clock
// of Redis (unix ms). It does not look at the index, which may have lost them, but at the
// records of the rooms whose position counts kept places. It walks through all rooms in
// pages, and may name a place twice.
func (s *Store) OverduePlaces(ctx context.Context, before int64, f func(KeptPlace)) error {
	var rooms []string
	var failed error
	look := func() error {
		with, err := s.roomsWithPlaces(ctx, rooms)
		rooms = rooms[:0]
		for _, room := range with {
			if err == nil {
				err = s.scan(ctx, room, 0, func(r Record) bool {
					if r.Kept() && r.KeptUntil < before {
						f(KeptPlace{EntryRef: EntryRef{Conn: r.Conn, Entry: r.Entry, Room: room}, Until: r.KeptUntil})
					}
					return true
				})
			}
			if errors.Is(err, errFormat) || wrongType(err) {
				err = nil // of other software; the other rooms are looked at all the same
			}
		}
		return err
	}
	err := s.Rooms(ctx, func(room string) bool {
		if rooms = append(rooms, room); len(rooms) == positionsPerCall {
			failed = look()
		}
		return failed == nil
	})
	if err != nil || failed != nil {
		return errors.Join(err, failed)
	}
	return look()
}

// roomsWithPlaces returns those of the rooms whose position counts kept places.
func (s *Store) roomsWithPlaces(ctx context.Context, rooms []string) (with []string, err error) {
	err = s.eachPosition(ctx, rooms, func(at int, position string) error {
		counts, _, _ := decodeCounts(position)
		if slices.ContainsFunc(counts, func(c count) bool { return c.incarnation == NoOwner }) {
			with = append(with, rooms[at])
		}
		return nil
	})
	return with, err
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
