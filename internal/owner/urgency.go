package owner

// urgency says how soon an item has to be written. A lane serves all
// urgencies in every batch, each by its share, so that no backlog of one of
// them delays another: ten thousand entries that are compared with Redis must
// not hold up the refresh of a key that is about to expire.
type urgency uint8

const (
	// timed: the item's key in Redis expires soon.
	timed urgency = iota
	// asked: a caller or a subscriber waits for it.
	asked
	// arriving: a connection is new. Its registration has a share of its own,
	// because a crowd that connects is no crowd in one room.
	arriving
	// routine: no caller waits and nothing expires soon. Leaves of closed
	// connections, refreshes of keys with much time left, and entries that are
	// written again after a rebirth.
	routine
	// background: comparison with Redis, rewriting after lost data, and
	// registrations that are written again after a rebirth.
	background
	urgencies
)

// shares is the number of items of each urgency that are taken in turn while all of them
// wait. An urgency with nothing waiting leaves its share to the others.
var shares = [urgencies]int{timed: 8, asked: 4, arriving: 2, routine: 2, background: 1}

// clusterPortion bounds the ops of one batch that are routine or background on
// a Redis with several buckets. There each bucket has a lane, dozens of them
// write to the same node at once, and an urgent batch waits behind one batch of
// each.
const clusterPortion = 32

// pressing reports whether the item must not wait for a portion.
func (u urgency) pressing() bool { return u < routine }

// newest reports whether the newest items are served, too, and not the oldest
// alone. Callers wait for them.
func (u urgency) newest() bool { return u == asked || u == arriving }
