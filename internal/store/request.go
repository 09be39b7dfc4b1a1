package store

import (
	"slices"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// request is one call of commit.lua while it is assembled.
type request struct {
	keys    Keys
	tracked func(room string) bool // nil: no room is tracked
	own     bool                   // send the keys of its entry, and of users, with every op
	users   bool                   // send the keys of users for every room
	people  map[string]bool        // rooms for which they are sent otherwise
	room    string                 // the current room
	inRoom  bool                   // room is set
	count   int                    // number of ops

	head  []string // KEYS of the call itself
	rooms []string // KEYS of the rooms
	names []string // KEYS of the ops
	args  []any
}

// roomsAt is the index in ARGV of the number of rooms.
const roomsAt = 5

// call returns KEYS and ARGV.
func (r *request) call() ([]string, []any) {
	r.args[roomsAt] = strconv.Itoa(len(r.rooms))
	return slices.Concat(r.head, r.rooms, r.names), r.args
}

// CommitCall returns the script call that Commit makes, for measurements of the bare
// call: the script, its KEYS and its ARGV. If the answer to an op is "k", Commit makes
// a second call.
func CommitCall(keys Keys, bucket int, inc string, number, known uint64, ops []Op) (*redis.Script, []string, []any) {
	r := newRequest(keys, bucket, inc, number, known, len(ops))
	r.look(ops)
	for _, i := range orderOf(ops) {
		r.add(&ops[i])
	}
	names, args := r.call()
	return commitScript, names, args
}

func newRequest(keys Keys, bucket int, inc string, number, known uint64, ops int) *request {
	r := &request{keys: keys, args: make([]any, 0, 6+7*ops)}
	r.head = append(r.head, keys.Fence(bucket, inc), keys.Owned(bucket, inc), keys.Rooms(bucket))
	r.args = append(r.args, inc, strconv.FormatUint(number, 10), newTag(), keys.EventsPrefix(), strconv.FormatUint(known, 10), "")
	return r
}

// request returns a newRequest for a batch of this store.
func (s *Store) request(bucket int, inc string, number, known uint64, ops int) *request {
	r := newRequest(s.keys, bucket, inc, number, known, ops)
	r.tracked, r.users = s.isTracked, s.users
	if known == 0 && s.listed && bucket == 0 {
		r.args[roomsAt-1] = "i"
		r.head = append(r.head, s.keys.Instances())
	}
	return r
}

// look finds the rooms in which an op needs the keys of users.
func (r *request) look(ops []Op) {
	for i := range ops {
		if o := &ops[i]; o.User != "" || o.Keep {
			if r.people == nil {
				r.people = make(map[string]bool)
			}
			r.people[o.Room] = true
		}
	}
}

// add appends an op. The header of commit.lua lists the arguments and keys of each kind.
func (r *request) add(o *Op) {
	r.count++
	switch o.Kind {
	case OpConnect:
		r.names = append(r.names, r.keys.ConnMeta(o.Conn))
		r.args = append(r.args, "K", o.Conn, strconv.FormatUint(o.MetaVersion, 10), o.Meta, flag(o.Fresh))
	case OpDisconnect:
		r.names = append(r.names, r.keys.ConnMeta(o.Conn))
		r.args = append(r.args, "D", o.Conn)
	case OpJoin:
		r.join(o)
	case OpLeave:
		r.leave(o)
	case OpRecount:
		r.enter(o.Room)
		r.args = append(r.args, "C", strconv.Itoa(o.Entries))
	case OpTouch:
		r.args = append(r.args, "N")
	default:
		r.update(o)
	}
}

func (r *request) join(o *Op) {
	r.enter(o.Room)
	if o.User != "" || o.Grace > 0 {
		r.person(o)
	}
	if o.MaxConnections > 0 || o.MaxUsers > 0 {
		r.args = append(r.args, "P", strconv.Itoa(o.MaxConnections), strconv.Itoa(o.MaxUsers))
	}
	if o.Replaces != "" && o.User != "" {
		r.args = append(r.args, "Q", o.Replaces)
		r.names = append(r.names, r.keys.Conn(o.Room, o.Replaces), r.keys.State(o.Room, o.Replaces))
	}
	attributes := millis(o.TTL) + " " + stateAttributes(o) + metaAttributes(o)
	if !r.own && o.TTL == 0 && len(o.State) == 0 && !o.Stated {
		r.args = append(r.args, r.name('J', ""), o.Conn, o.Entry, attributes, o.Meta)
		return
	}
	left := "0"
	if o.TTL > 0 {
		left = millis(max(o.Left, time.Millisecond))
	}
	stateLeft := millis(o.StateLeft)
	if o.Stated && len(o.State) == 0 {
		stateLeft = ""
	}
	r.args = append(r.args, r.name('j', ""), o.Conn, o.Entry, attributes, o.Meta, left, o.State, stateLeft)
	r.entry(o)
}

func (r *request) leave(o *Op) {
	r.enter(o.Room)
	kind := byte('L')
	if r.own || o.TTL > 0 || o.Stated || o.Keep {
		kind = 'l'
		r.entry(o)
	}
	if o.Keep {
		kind = 'H'
	}
	r.args = append(r.args, r.name(kind, string(o.Cause)), o.Conn, o.Entry, flag(o.Known))
}

func (r *request) update(o *Op) {
	if o.MetaVersion == 0 && o.StateVersion == 0 && o.Left > 0 && !o.Person {
		r.names = append(r.names, r.keys.Members(o.Room), r.keys.Conn(o.Room, o.Conn))
		r.args = append(r.args, "T"+millis(o.TTL), o.Conn, o.Entry, millis(max(o.Left, time.Millisecond)))
		return
	}
	r.enter(o.Room)
	if o.Person {
		r.person(o)
	}
	r.entry(o)
	kind := byte('U')
	switch {
	case o.MetaVersion == 0:
		kind = 'S'
	case o.StateVersion == 0:
		kind = 'M'
	}
	r.args = append(r.args, r.name(kind, ""), o.Conn, o.Entry, millis(o.TTL), millis(o.Left))
	if kind != 'M' {
		r.args = append(r.args, strconv.FormatUint(o.StateVersion, 10), stateAttributes(o), millis(o.StateLeft), o.State)
	}
	if kind != 'S' {
		r.args = append(r.args, strconv.FormatUint(o.MetaVersion, 10), metaAttributes(o), o.Meta)
	}
}

// enter makes a room the current one of the ops that follow.
func (r *request) enter(room string) {
	if r.inRoom && r.room == room {
		return
	}
	r.room, r.inRoom = room, true
	r.rooms = append(r.rooms, r.keys.Seq(room))
	r.names = append(r.names, r.keys.Members(room))
	kind := "R"
	if r.own || r.users || r.people[room] {
		kind = "r"
		r.names = append(r.names, r.keys.Users(room), r.keys.Kept(r.keys.RoomBucket(room)), r.keys.Recount(room))
	}
	r.args = append(r.args, kind, room, flag(r.tracked != nil && r.tracked(room)))
}

// person appends the user and the grace of the op that follows.
func (r *request) person(o *Op) {
	rebuild := "0"
	if o.Kind == OpJoin && o.User != "" {
		rebuild = millis(o.Rebuild)
	}
	r.args = append(r.args, "W", o.User, millis(o.Grace), rebuild)
}

// entry appends the keys of one entry.
func (r *request) entry(o *Op) {
	r.names = append(r.names, r.keys.Conn(o.Room, o.Conn), r.keys.State(o.Room, o.Conn))
}

// name returns the name of the op. The tag of its write contains the name.
func (r *request) name(kind byte, more string) string {
	return string(append(strconv.AppendInt([]byte{kind}, int64(r.count), 10), more...))
}

// stateAttributes and metaAttributes return the fields of a record that describe the
// state and the metadata of an op.
func stateAttributes(o *Op) string {
	silence := " . "
	if o.StateSilent {
		silence = " s "
	}
	return strconv.Itoa(len(o.State)) + " " + strconv.FormatUint(o.StateVersion, 10) + silence
}

func metaAttributes(o *Op) string {
	return strconv.FormatUint(o.MetaVersion, 10) + " " + strconv.Itoa(len(o.Meta)) + " "
}

func flag(v bool) string {
	if v {
		return "1"
	}
	return "0"
}
