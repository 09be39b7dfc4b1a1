package hub

import "sync"

// fewPlaces is how many jobs of one bucket run at once where there are several.
const fewPlaces = 2

// jobs runs one function for many mirrors, for a bounded number at once of each
// bucket. Buckets share no places: jobs of those on a node that does not answer
// would in the end hold all of them, each for as long as a call may take. A
// mirror is in it at most once, so the queues are no longer than the list of
// rooms. Its goroutines exist only while there is work.
type jobs struct {
	limit  int // of one bucket, if there is no other
	bucket func(room string) int
	run    func(*mirror)
	wg     sync.WaitGroup

	mu     sync.Mutex // guards the following, and what rows point to
	rows   map[int]*row
	closed bool
}

// row is what waits, and runs, of one bucket.
type row struct {
	queue   []*mirror
	running int
}

func newJobs(limit int, bucket func(room string) int, run func(*mirror)) *jobs {
	return &jobs{limit: limit, bucket: bucket, run: run, rows: make(map[int]*row)}
}

// push queues m. After close it does nothing.
func (j *jobs) push(m *mirror) {
	b := j.bucket(m.room)
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return
	}
	r := j.rows[b]
	if r == nil {
		r = new(row)
		j.rows[b] = r
	}
	r.queue = append(r.queue, m)
	if r.running < j.places() {
		r.running++
		j.wg.Go(func() { j.work(r) })
	}
}

// places returns how many jobs of one bucket may run. j.mu is held.
func (j *jobs) places() int {
	if len(j.rows) > 1 {
		return min(j.limit, fewPlaces)
	}
	return j.limit
}

// work runs what is queued until nothing is.
func (j *jobs) work(r *row) {
	for {
		m := j.pop(r)
		if m == nil {
			return
		}
		j.run(m)
	}
}

// pop takes the mirror that waited longest. Where there is none, or others are
// enough for what is left, it signs the caller off and returns nil.
func (j *jobs) pop(r *row) *mirror {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		r.queue = nil
	}
	if len(r.queue) == 0 || r.running > j.places() {
		r.running--
		return nil
	}
	m := r.queue[0]
	r.queue[0] = nil
	r.queue = r.queue[1:]
	return m
}

// close drops what is queued and waits for what runs.
func (j *jobs) close() {
	j.mu.Lock()
	j.closed = true
	j.mu.Unlock()
	j.wg.Wait()
}
