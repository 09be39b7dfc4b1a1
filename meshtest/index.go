package meshtest

import (
	"container/heap"
	"slices"
	"strconv"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// index knows when each key may run out, so that time can pass without a look at every
// key. It is told of each command that may give a key a TTL, and asks miniredis for the
// TTL before the clock moves next. The clock stands still between the command and that
// question, so the index never learns of a key too late. If a key was deleted or got a
// longer TTL, the index finds that at the key's old time.
type index struct {
	fresh     map[string]struct{}  // may have been given a TTL since the last move
	scheduled map[string]time.Time // the one valid item of each key
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

// apply schedules the fresh keys. now is the time of the clock.
func (x *index) apply(m *miniredis.Miniredis, now time.Time) {
	for key := range x.fresh {
		for _, db := range x.dbs {
			if ttl := m.DB(db).TTL(key); ttl > 0 {
				x.schedule(key, now.Add(ttl))
			}
		}
	}
	clear(x.fresh)
}

// schedule makes the index look at the key at that time or before.
func (x *index) schedule(key string, at time.Time) {
	if before, ok := x.scheduled[key]; ok && !at.Before(before) {
		return
	}
	x.scheduled[key] = at
	heap.Push(&x.heap, deadline{key: key, at: at})
}

// dueBy reports whether a key may run out by target.
func (x *index) dueBy(m *miniredis.Miniredis, now, target time.Time) bool {
	x.apply(m, now)
	return len(x.heap) > 0 && !x.heap[0].at.After(target)
}

// due returns the keys that run out when the clock moves from now to target, in order.
func (x *index) due(m *miniredis.Miniredis, now, target time.Time) []expiry {
	x.apply(m, now)
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
			case ttl <= 0: // deleted, or made persistent
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

// note tells the index of a command that is about to run or has just run. Its keys are
// passed to touch, which may postpone them until EXEC.
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

// expiring lists the commands that can give a key a TTL, with the position of the key
// among the arguments.
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

// deadlines implements [heap.Interface], with the earliest first.
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
