package hub

import (
	"sync"
	"sync/atomic"
	"time"
)

// A join is answered with the members of the room. If many connections join a room,
// reading it for each join costs Redis far more than the joins. So the hub also
// mirrors a room while connections of this server join it shortly one after the
// other, as long as the mirror is cheap:
//
// A single join in a quiet room is answered from Redis. A mirror would cost a
// subscription and its end, and would receive every event of the room for seconds.
// A server of quiet rooms would receive everything although it watches nothing. For
// the same reason the second join of a room of two or three members (a private
// conversation) starts no mirror: reading such a room is cheap.
//
// If answers are bounded, an answer costs less than a mirror, which must read all
// members. Such a room is mirrored once its joins have cost as much.
const (
	// joinsWithin is the time within which another join must follow for the room to
	// be mirrored. It may be up to twice as long.
	joinsWithin = 3 * time.Second
	// maxNotedRooms bounds the rooms whose joins are counted.
	maxNotedRooms = 8192
	// minMembers and maxMembers bound the size of a room that is mirrored only for
	// joins. While a larger one is read, too much happens in it.
	minMembers, maxMembers = 4, 16 << 10
	// callCost is the cost of a call, in records that it could read instead.
	callCost = 32
	// maxKeptMembers bounds the members of all mirrors together that exist only for
	// joins. The size of a room counts as of its last join, and no mirror counts for
	// less than minShare.
	maxKeptMembers, minShare = 64 << 10, 16
)

// recentJoins counts the recent joins by room, and the members of the mirrors that
// exist for joins.
type recentJoins struct {
	kept       atomic.Int64 // the sum of all mirrors' shares
	timeouts   atomic.Int32 // joins in a row that waited in vain
	timedOutAt atomic.Int64 // when the last of them gave up, since Hub.madeAt

	mu            sync.Mutex // guards the following
	rotatedAt     time.Time  // when recent became older
	recent, older map[string]int
}

// note counts a join and returns the number of recent joins before it.
func (j *recentJoins) note(room string, now time.Time) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	if passed := now.Sub(j.rotatedAt); passed > joinsWithin || len(j.recent) >= maxNotedRooms/2 {
		j.older, j.recent, j.rotatedAt = j.recent, nil, now
		if passed > 2*joinsWithin {
			j.older = nil
		}
	}
	if j.recent == nil {
		j.recent = make(map[string]int)
	}
	earlier := j.recent[room] + j.older[room]
	j.recent[room]++
	return earlier
}

// fits reports whether a mirror of that many members may exist for joins. share is
// the mirror's present share.
func (j *recentJoins) fits(share, total int) bool {
	return total <= maxMembers && j.kept.Load()-int64(share)+int64(shareOf(total)) <= maxKeptMembers
}

// shareOf returns the share of a mirror of that many members.
func shareOf(total int) int { return max(total, minShare) }
