package store

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// CheckSize is how many rooms and keys one Check should be about: a command of it
// takes Redis less than a millisecond.
const CheckSize = 512

// KeyKind is the kind of a key that exists once per entry or connection.
type KeyKind byte

// The kinds of keys that Check looks for.
const (
	KeyConn     KeyKind = 'c' // the per-connection key of an entry with a TTL
	KeyState    KeyKind = 's' // the copy of an entry's state
	KeyConnMeta KeyKind = 'm' // a connection's metadata
)

// KeyRef names such a key.
type KeyRef struct {
	Kind KeyKind
	Room string // not for KeyConnMeta
	Conn string
}

// CheckList lists the rooms and keys that an incarnation relies on in one bucket.
type CheckList struct {
	Own   bool     // whether to look at the incarnation's index and fence
	Rooms []string // in which it has entries
	Index bool     // whether to look for the rooms on the index of rooms, too
	Keys  []KeyRef
}

// Checked is what Redis holds of an incarnation in one bucket.
type Checked struct {
	Owned   int64       // size of the incarnation's index; -1: not known
	Fenced  bool        // the fence is there, in either of its meanings, or that was not asked
	Rooms   []RoomCheck // in the order asked
	Missing []int       // which of the keys are not there
}

// RoomCheck is what Redis holds of one room.
type RoomCheck struct {
	Members bool // the hash of members exists
	Listed  bool // the room is on the index of rooms, or that was not asked
	Entries int  // that its position counts of the incarnation, 0 if it has none; -1: it cannot be read
}

// Check reads whether the keys that an incarnation relies on in one bucket are
// there. It takes one round trip of few commands, however many rooms and keys
// it is about, and further ones only if some are missing. The answers are not of
// one moment: changes under way may show in some of them.
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

// checkCall is one Check on its way.
type checkCall struct {
	list                CheckList
	index               string   // of rooms
	members, seqs, keys []string // names of keys

	there, known *redis.IntCmd // how many of members and of keys there are
	positions    *redis.SliceCmd
	listed       *redis.BoolSliceCmd
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

// ask adds the questions about rooms and keys to a round trip.
func (q *checkCall) ask(ctx context.Context, pipe redis.Pipeliner) {
	if len(q.members) > 0 {
		q.there, q.positions = pipe.Exists(ctx, q.members...), pipe.MGet(ctx, q.seqs...)
		if q.list.Index {
			q.listed = pipe.SMIsMember(ctx, q.index, anys(q.list.Rooms)...)
		}
	}
	if len(q.keys) > 0 {
		q.known = pipe.Exists(ctx, q.keys...)
	}
}

// read puts the answers into c. If fewer keys are there than should be, it asks
// which.
func (q *checkCall) read(ctx context.Context, s *Store, inc string, c *Checked) (err error) {
	c.Rooms = make([]RoomCheck, len(q.members))
	for i := range c.Rooms {
		c.Rooms[i] = RoomCheck{Members: true, Listed: q.listed == nil || q.listed.Err() != nil || q.listed.Val()[i]}
	}
	if q.there != nil && q.there.Val() < int64(len(q.members)) {
		var gone []int
		// Another server may write the members again meanwhile. Its position, read
		// after that, shows that they were lost.
		gone, err = s.absent(ctx, q.members, func(pipe redis.Pipeliner) { q.positions = pipe.MGet(ctx, q.seqs...) })
		for _, i := range gone {
			c.Rooms[i].Members = false
		}
	}
	if err == nil && q.known != nil && q.known.Val() < int64(len(q.keys)) {
		c.Missing, err = s.absent(ctx, q.keys, func(redis.Pipeliner) {})
	}
	if err != nil {
		return err
	}
	for i := range c.Rooms {
		if at, ok := q.positions.Val()[i].(string); ok {
			c.Rooms[i].Entries = entriesOf(at, inc)
		}
	}
	return nil
}

// absent returns which of the keys do not exist. more adds to the same round trip.
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

// wrongType reports whether Redis holds something else under a name of ours.
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

// entriesOf returns how many entries of an incarnation a position counts; -1: it
// is not in this layout.
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

// countedIn returns how many entries a position counts of all incarnations.
func countedIn(position string) int {
	f := strings.Split(position, " ")
	sum := 0
	for i := 4; i < len(f); i += 2 {
		n, _ := strconv.Atoi(f[i])
		sum += n
	}
	return sum
}
