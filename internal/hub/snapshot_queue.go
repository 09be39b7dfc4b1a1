package hub

import "sync"

// readsPerBucket bounds the reads of one bucket if several buckets are in use.
const readsPerBucket = 2

// snapshotQueue runs reads of rooms, a bounded number at once per bucket. Buckets
// share no slots: otherwise the reads of buckets on a Redis node that does not
// answer would in the end fill all of them, each for as long as a call may take.
// A room is queued at most once, so the queues are no longer than the list of
// rooms. The goroutines exist only while there is work.
type snapshotQueue struct {
	limit  int // reads at once of one bucket, if there is no other
	bucket func(room string) int
	wg     sync.WaitGroup

	mu      sync.Mutex // guards the following, and the queues of buckets
	buckets map[int]*bucketQueue
	closed  bool
}

// bucketQueue holds the waiting reads of one bucket.
type bucketQueue struct {
	reads   []func()
	running int // goroutines
}

func newSnapshotQueue(limit int, bucket func(room string) int) *snapshotQueue {
	return &snapshotQueue{limit: limit, bucket: bucket, buckets: make(map[int]*bucketQueue)}
}

// push queues the read of a room. After close it does nothing.
func (q *snapshotQueue) push(room string, read func()) {
	n := q.bucket(room)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	b := q.buckets[n]
	if b == nil {
		b = new(bucketQueue)
		q.buckets[n] = b
	}
	b.reads = append(b.reads, read)
	if b.running < q.slots() {
		b.running++
		q.wg.Go(func() { q.work(b) })
	}
}

// slots returns the number of reads of one bucket that may run at once. The caller
// holds q.mu.
func (q *snapshotQueue) slots() int {
	if len(q.buckets) > 1 {
		return min(q.limit, readsPerBucket)
	}
	return q.limit
}

// work runs the reads of one bucket until none is left.
func (q *snapshotQueue) work(b *bucketQueue) {
	for {
		read := q.pop(b)
		if read == nil {
			return
		}
		read()
	}
}

// pop removes and returns the read that waited longest. It returns nil if there is
// none or too many goroutines run; the caller then ends and no longer counts as
// running.
func (q *snapshotQueue) pop(b *bucketQueue) func() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		b.reads = nil
	}
	if len(b.reads) == 0 || b.running > q.slots() {
		b.running--
		return nil
	}
	read := b.reads[0]
	b.reads[0] = nil
	b.reads = b.reads[1:]
	return read
}

// close drops the queued reads and waits for those that run.
func (q *snapshotQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.wg.Wait()
}
