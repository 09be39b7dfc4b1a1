package load

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/redis/go-redis/v9"
)

// SoakTruth holds the differences between clients and Redis at a moment without changes.
type SoakTruth struct {
	Wrong    int      // ledgers that differ from Redis, and clients that Redis does not have
	Examples []string // the first few
	Mine     []string // ids of the connected clients; Redis may hold no others
	Watching int      // ledgers compared
}

// Truth compares each watcher's ledger with Redis, and looks for each client where it
// should be. A silent client may be there or not.
func (s *Soak) Truth(ctx context.Context) (SoakTruth, error) {
	held, err := Members(ctx, s.redis, s.cfg.Prefix, s.cfg.Rooms)
	if err != nil {
		return SoakTruth{}, err
	}
	var out SoakTruth
	wrong := func(format string, args ...any) {
		if out.Wrong++; len(out.Examples) < 5 {
			out.Examples = append(out.Examples, fmt.Sprintf(format, args...))
		}
	}
	for _, a := range s.actors {
		a.mu.Lock()
		if a.c != nil {
			out.Mine = append(out.Mine, a.id)
		}
		if _, there := held[a.room][a.id]; a.idleLocked() && !there {
			wrong("%s is in %s, Redis lacks it", a.id, a.room)
		}
		if l := a.ledger; l != nil {
			out.Watching++
			if !maps.Equal(l.Present, held[l.Room]) {
				wrong("the ledger of %s of room %s has too many %v, too few %v", a.id, l.Room, beyond(l.Present, held[l.Room]), beyond(held[l.Room], l.Present))
			}
		}
		a.mu.Unlock()
	}
	return out, nil
}

// Members reads the members of rooms.
func Members(ctx context.Context, client *redis.Client, prefix string, rooms []string) (map[string]map[string]struct{}, error) {
	held := make(map[string]map[string]struct{}, len(rooms))
	for part := range slices.Chunk(rooms, 100) {
		pipe := client.Pipeline()
		replies := make([]*redis.StringSliceCmd, len(part))
		for i, room := range part {
			replies[i] = pipe.HKeys(ctx, prefix+room)
		}
		if _, err := pipe.Exec(ctx); err != nil {
			return nil, err
		}
		for i, room := range part {
			held[room] = make(map[string]struct{}, len(replies[i].Val()))
			for _, id := range replies[i].Val() {
				held[room][id] = struct{}{}
			}
		}
	}
	return held, nil
}

// beyond returns the elements of x that are not in y.
func beyond(x, y map[string]struct{}) (list []string) {
	for id := range x {
		if _, ok := y[id]; !ok {
			list = append(list, id)
		}
	}
	return list
}
