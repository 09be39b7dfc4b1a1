package meshtest

import (
	"container/heap"
	"slices"
	"strconv"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// index knows which keys may run out when, so that time can pass without a
// look at every key. It is told of commands that may give a key a TTL, and asks
// miniredis what became of that key before the clock moves next. It never
// knows of a key too late, since the clock stands still from the command on;
// that a key was deleted or prolonged is noticed when its old time has come.
type index struct {
	fresh     map[string]struct{}  // may have been given a TTL since the last move
	scheduled map[string]time.Time // the item of the key that counts
	heap      deadlines
	dbs       []int // databases that have been selected
}

// expiry is a key that ran out.
type expiry struct {
	db  int
	key string
	at  time.Time
}

func (x *index) init() {
	x.fresh = map[string]struct{}{}
	x.scheduled = map[string]time.Time{}
	x.dbs = []int{0}
}

// touch notes that the key may have been given a TTL.
func (x *index) touch(key string) { x.fresh[key] = struct{}{} }

// use notes that there may be keys in the database.
func (x *index) use(db int) {
	if !slices.Contains(x.dbs, db) {
		x.dbs = append(x.dbs, db)
	}
}

// settle schedules the fresh keys. now is what the clock shows.
func (x *index) settle(m *miniredis.Miniredis, now time.Time) {
	for key := range x.fresh {
		for _, db := range x.dbs {
			if ttl := m.DB(db).TTL(key); ttl > 0 {
				x.schedule(key, now.Add(ttl))
			}
		}
	}
	clear(x.fresh)
}

// schedule has the key looked at then, or before.
func (x *index) schedule(key string, at time.Time) {
	if before, ok := x.scheduled[key]; ok && !at.Before(before) {
		return
	}
	x.scheduled[key] = at
	heap.Push(&x.heap, deadline{key: key, at: at})
}

// dueBy reports whether a key may run out by target.
func (x *index) dueBy(m *miniredis.Miniredis, now, target time.Time) bool {
	x.settle(m, now)
	return len(x.heap) > 0 && !x.heap[0].at.After(target)
}

// due returns what runs out when the clock moves from now to target, in order.
func (x *index) due(m *miniredis.Miniredis, now, target time.Time) []expiry {
	x.settle(m, now)
	var out []expiry
	for len(x.heap) > 0 && !x.heap[0].at.After(target) {
		item := heap.Pop(&x.heap).(deadline)
		if at, ok := x.scheduled[item.key]; !ok || !at.Equal(item.at) {
			continue
		}
		delete(x.scheduled, item.key)
		for _, db := range x.dbs {
			ttl := m.DB(db).TTL(item.key)
			switch at := now.Add(ttl); {
			case ttl <= 0: // deleted, or made to stay
			case at.After(target):
				x.schedule(item.key, at)
			default:
				out = append(out, expiry{db: db, key: item.key, at: at})
			}
		}
	}
	slices.SortStableFunc(out, func(a, b expiry) int { return a.at.Compare(b.at) })
	return out
}

// note tells the index of a command that is about to run or has just run. keys
// are handed to touch, which may put them off until EXEC.
func (x *index) note(cmd string, args []string, touch func(key string)) {
	if from, ok := expiring[cmd]; ok && len(args) > from && (cmd != "SET" || len(args) > 2) {
		touch(args[from])
	}
	switch cmd {
	case "SELECT", "MOVE", "COPY", "SWAPDB":
		for _, arg := range args {
			if db, err := strconv.Atoi(arg); err == nil && db >= 0 && db < 16 {
				x.use(db)
			}
		}
	}
}

// expiring lists the commands that can give a key a TTL, and where its name
// stands.
var expiring = map[string]int{
	"SET": 0, "SETEX": 0, "PSETEX": 0, "GETEX": 0,
	"EXPIRE": 0, "PEXPIRE": 0, "EXPIREAT": 0, "PEXPIREAT": 0,
	"RESTORE": 0, "MOVE": 0, "RENAME": 1, "RENAMENX": 1, "COPY": 1,
}

// deadline is an item of the heap.
type deadline struct {
	key string
	at  time.Time
}

// deadlines implements [heap.Interface], the earliest first.
type deadlines []deadline

// Len implements [heap.Interface].
func (d deadlines) Len() int { return len(d) }

// Less implements [heap.Interface].
func (d deadlines) Less(i, j int) bool { return d[i].at.Before(d[j].at) }

// Swap implements [heap.Interface].
func (d deadlines) Swap(i, j int) { d[i], d[j] = d[j], d[i] }

// Push implements [heap.Interface].
func (d *deadlines) Push(v any) { *d = append(*d, v.(deadline)) }

// Pop implements [heap.Interface].
func (d *deadlines) Pop() any {
	old := *d
	last := old[len(old)-1]
	old[len(old)-1] = deadline{}
	*d = old[:len(old)-1]
	return last
}
