package local

// priority is the class of a queued item. A writer serves all priorities in every batch,
// each by its weight, so that a backlog of one does not delay the others. Ten thousand
// entries that are compared with Redis must not delay the refresh of a key that soon
// expires.
type priority uint8

const (
	// timed: the key of the item soon expires in Redis.
	timed priority = iota
	// asked: a caller or a subscriber waits for the write.
	asked
	// arriving: the registration of a new connection. It has its own weight, because a
	// crowd that connects is not a crowd in one room.
	arriving
	// routine: no caller waits and nothing expires soon. These are leaves of closed
	// connections, refreshes of keys with much time left, and entries that are written
	// again under a new incarnation.
	routine
	// background: the comparison with Redis, writes after a loss of data, and
	// registrations that are written again under a new incarnation.
	background
	priorities
)

// priorityWeights is the number of items of each priority that are taken in turn while
// all of them have items. A priority without items leaves its share to the others.
var priorityWeights = [priorities]int{timed: 8, asked: 4, arriving: 2, routine: 2, background: 1}

// clusterMaxRoutineOps is the most ops of one batch that are routine or background on a
// Redis with several buckets. There each bucket has a writer, dozens of writers write to
// the same node at once, and an urgent batch waits behind one batch of each.
const clusterMaxRoutineOps = 32

// unlimited reports whether the item is exempt from the limit of routine ops.
func (p priority) unlimited() bool { return p < routine }

// servesNewest reports whether the newest items are served too, not only the oldest.
// Callers wait for them.
func (p priority) servesNewest() bool { return p == asked || p == arriving }
