package store

import (
	"context"
	_ "embed"
	"fmt"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

var (
	//go:embed lua/occupancy.lua
	occupancyLua    string
	occupancyScript = redis.NewScript(occupancyLua)
)

// Numbers are the numbers of a room at one position.
type Numbers struct {
	Connections int // including kept places
	// Users counts a connection without a user as one. It is -1 while the records have
	// to be counted again, because Redis had lost keys.
	Users int
	// Rebuilding means that Redis had lost the room a short time ago. Its owners may not
	// have written all entries again.
	Rebuilding bool
}

// Occupancy holds the numbers of one room.
type Occupancy struct {
	Position Position // zero if Redis has none; then the room is empty
	Numbers
	// Incomplete means that the room counts more members than it has, as in Snapshot.
	Incomplete bool
}

// Occupancy reads the numbers of rooms, in the given order. It takes one round trip to
// each node that holds some of them.
func (s *Store) Occupancy(ctx context.Context, rooms ...string) ([]Occupancy, error) {
	out := make([]Occupancy, len(rooms))
	var parts [][]int
	err := s.eachPart(rooms, positionsPerCall, func(_ int, part []int) error {
		parts = append(parts, part)
		return nil
	})
	if err != nil || len(parts) == 0 {
		return out, err
	}
	replies, err := call(ctx, s, func(ctx context.Context) ([]any, error) {
		pipe := s.client.Pipeline()
		cmds := make([]*redis.Cmd, len(parts))
		for i, part := range parts {
			cmds[i] = occupancyScript.EvalSha(ctx, pipe, s.occupancyKeys(rooms, part))
		}
		_, _ = pipe.Exec(ctx) // each command has its own error
		replies := make([]any, len(parts))
		for i, c := range cmds {
			var err error
			replies[i], err = c.Result()
			if redis.HasErrorPrefix(err, "NOSCRIPT") {
				replies[i], err = occupancyScript.Eval(ctx, s.client, s.occupancyKeys(rooms, parts[i])).Result()
			}
			if err != nil {
				return nil, err
			}
		}
		return replies, nil
	})
	if err != nil {
		return nil, err
	}
	for i, part := range parts {
		if err := decodeOccupancy(replies[i], part, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// occupancyKeys returns the keys of the rooms at the given indexes.
func (s *Store) occupancyKeys(rooms []string, part []int) []string {
	keys := make([]string, 2*len(part))
	for i, at := range part {
		keys[i], keys[len(part)+i] = s.keys.Seq(rooms[at]), s.keys.Members(rooms[at])
	}
	return keys
}

// decodeOccupancy puts the numbers of the rooms at the given indexes into out.
func decodeOccupancy(reply any, part []int, out []Occupancy) error {
	f, err := texts(reply)
	if err != nil || len(f) != 1+2*len(part) {
		return fmt.Errorf("occupancy: %w", errFormat)
	}
	var p parser
	now := p.int(f[0])
	for i, at := range part {
		position, size := f[1+2*i], int(p.int(f[2+2*i]))
		o := &out[at]
		if o.Position, err = decodePosition(position); err != nil {
			return err
		}
		o.Numbers, o.Incomplete = decodeNumbers(position, size, now), countedIn(position) > size
	}
	return p.err
}

// decodeNumbers returns the numbers of a room with this position and so many members.
func decodeNumbers(position string, size int, now int64) Numbers {
	n := Numbers{Connections: size, Users: size}
	_, text, _ := decodeCounts(position)
	users, until, _ := strings.Cut(text, "/")
	if ms, err := strconv.ParseInt(until, 10, 64); err == nil {
		n.Rebuilding = ms > now
	}
	if users == "" || size == 0 { // without users, or its records are lost
		return n
	}
	n.Users = -1
	if v, err := strconv.Atoi(users); err == nil {
		n.Users = v
	}
	return n
}
