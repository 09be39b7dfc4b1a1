package store

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// CheckSize is the recommended number of rooms and keys of one Check. A command of that
// size takes Redis less than a millisecond.
const CheckSize = 512

// KeyKind is the kind of a key that exists once per entry or per connection.
type KeyKind byte

// The kinds of keys that Check can test.
const (
	KeyConn     KeyKind = 'c' // the per-connection key of an entry with a TTL
	KeyState    KeyKind = 's' // the copy of an entry's state
	KeyConnMeta KeyKind = 'm' // a connection's metadata
)

// KeyRef names one key of such a kind.
type KeyRef struct {
	Kind KeyKind
	Room string // empty for KeyConnMeta
	Conn string
}

// CheckList lists the rooms and keys that an incarnation relies on in one bucket.
type CheckList struct {
	Own   bool     // read the size of the incarnation's index, and its fence
	Rooms []string // rooms in which the incarnation has entries
	Index bool     // also test whether the rooms are in the index of rooms
	Keys  []KeyRef
}

// Checked is the state in Redis of one incarnation in one bucket.
type Checked struct {
	Owned   int64       // size of the incarnation's index; -1: unknown
	Fenced  bool        // the fence exists (with a number or as "dead"), or it was not asked for
	Rooms   []RoomCheck // in the order of the request
	Missing []int       // indexes of the keys that do not exist
}

// RoomCheck is the state in Redis of one room.
type RoomCheck struct {
	Members bool // the hash of members exists
	Listed  bool // the room is in the index of rooms, or it was not asked for
	Entries int  // entries of the incarnation, as counted in the room's position; -1: the position is unreadable
	// Uncounted means that the users have to be counted again. An OpRecount does a part
	// of that.
	Uncounted bool
}

// Check reads whether the keys of one incarnation in one bucket exist. It takes one
// round trip of few commands for any number of rooms and keys, and more only if some
// are missing. The answers do not belong to a single moment: a change that is under way
// may show in some of them.
func (s *Store) Check(ctx context.Context, bucket int, inc string, list CheckList) (Checked, error) {
	fence := s.keys.Fence(bucket, inc)
	return read(ctx, s, fence, func(ctx context.Context) (Checked, error) {
		q := s.newCheckCall(bucket, list)
		var owned, fenced *redis.IntCmd
		pipe := s.client.Pipeline()
		if list.Own {
			owned, fenced = pipe.SCard(ctx, s.keys.Owned(bucket, inc)), pipe.Exists(ctx, fence)
		}
		q.ask(ctx, pipe)
		if _, err := pipe.Exec(ctx); err != nil && !wrongType(err) {
			return Checked{}, err
		}
		c := Checked{Owned: -1, Fenced: fenced == nil || fenced.Val() > 0}
		if owned != nil && owned.Err() == nil {
			c.Owned = owned.Val()
		}
		return c, q.read(ctx, s, inc, &c)
	})
}

// checkCall is one call of Check.
type checkCall struct {
	list                CheckList
	index               string   // of rooms
	members, seqs, keys []string // names of keys

	membersFound, keysFound *redis.IntCmd // how many of members and of keys exist
	positions               *redis.SliceCmd
	listed                  *redis.BoolSliceCmd
}

func (s *Store) newCheckCall(bucket int, list CheckList) *checkCall {
	q := &checkCall{
		list: list, index: s.keys.Rooms(bucket),
		members: make([]string, len(list.Rooms)), seqs: make([]string, len(list.Rooms)), keys: make([]string, len(list.Keys)),
	}
	for i, room := range list.Rooms {
		q.members[i], q.seqs[i] = s.keys.Members(room), s.keys.Seq(room)
	}
	for i, k := range list.Keys {
		q.keys[i] = s.nameOf(k)
	}
	return q
}

// ask adds the commands about rooms and keys to a round trip.
func (q *checkCall) ask(ctx context.Context, pipe redis.Pipeliner) {
	if len(q.members) > 0 {
		q.membersFound, q.positions = pipe.Exists(ctx, q.members...), pipe.MGet(ctx, q.seqs...)
		if q.list.Index {
			q.listed = pipe.SMIsMember(ctx, q.index, anys(q.list.Rooms)...)
		}
	}
	if len(q.keys) > 0 {
		q.keysFound = pipe.Exists(ctx, q.keys...)
	}
}

// read puts the answers into c. If keys are missing, it asks which.
func (q *checkCall) read(ctx context.Context, s *Store, inc string, c *Checked) (err error) {
	c.Rooms = make([]RoomCheck, len(q.members))
	for i := range c.Rooms {
		c.Rooms[i] = RoomCheck{Members: true, Listed: q.listed == nil || q.listed.Err() != nil || q.listed.Val()[i]}
	}
	if q.membersFound != nil && q.membersFound.Val() < int64(len(q.members)) {
		var gone []int
		// Another server may write members again in between. The position is therefore
		// read after them: it shows that the earlier ones were lost.
		gone, err = s.absent(ctx, q.members, func(pipe redis.Pipeliner) { q.positions = pipe.MGet(ctx, q.seqs...) })
		for _, i := range gone {
			c.Rooms[i].Members = false
		}
	}
	if err == nil && q.keysFound != nil && q.keysFound.Val() < int64(len(q.keys)) {
		c.Missing, err = s.absent(ctx, q.keys, func(redis.Pipeliner) {})
	}
	if err != nil {
		return err
	}
	for i := range c.Rooms {
		if at, ok := q.positions.Val()[i].(string); ok {
			c.Rooms[i].Entries = entriesOf(at, inc)
			c.Rooms[i].Uncounted = decodeNumbers(at, 1, 0).Users < 0
		}
	}
	return nil
}

// absent returns the indexes of the keys that do not exist. more adds commands to the
// same round trip.
func (s *Store) absent(ctx context.Context, keys []string, more func(redis.Pipeliner)) (missing []int, err error) {
	pipe := s.client.Pipeline()
	cmds := make([]*redis.IntCmd, len(keys))
	for i, key := range keys {
		cmds[i] = pipe.Exists(ctx, key)
	}
	more(pipe)
	if _, err := pipe.Exec(ctx); err != nil {
		return nil, err
	}
	for i, c := range cmds {
		if c.Val() == 0 {
			missing = append(missing, i)
		}
	}
	return missing, nil
}

func (s *Store) nameOf(k KeyRef) string {
	switch k.Kind {
	case KeyConn:
		return s.keys.Conn(k.Room, k.Conn)
	case KeyState:
		return s.keys.State(k.Room, k.Conn)
	}
	return s.keys.ConnMeta(k.Conn)
}

// wrongType reports whether a key of this library holds a value of another type.
func wrongType(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer) && strings.HasPrefix(answer.Error(), "WRONGTYPE")
}

func anys(list []string) []any {
	out := make([]any, len(list))
	for i, v := range list {
		out[i] = v
	}
	return out
}

// entriesOf returns the number of entries that a position counts for an incarnation, or
// -1 if the position is not in this layout.
func entriesOf(position, inc string) int {
	if _, err := decodePosition(position); err != nil {
		return -1
	}
	_, rest, ok := strings.Cut(position, " "+inc+" ")
	if !ok {
		return 0
	}
	text, _, _ := strings.Cut(rest, " ")
	n, err := strconv.Atoi(text)
	if err != nil {
		return -1
	}
	return n
}

// countedIn returns the number of entries that a position counts for all incarnations,
// and of kept places.
func countedIn(position string) int {
	counts, _, _ := decodeCounts(position)
	sum := 0
	for _, c := range counts {
		n, _ := strconv.Atoi(c.entries)
		sum += n
	}
	return sum
}
