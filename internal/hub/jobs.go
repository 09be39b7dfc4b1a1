package hub

import "sync"

// jobs runs one function for many mirrors, for a bounded number at once. A
// mirror is in it at most once, so the queue is no longer than the list of
// rooms. Its goroutines exist only while there is work.
type jobs struct {
	limit int
	run   func(*mirror)
	wg    sync.WaitGroup

	mu      sync.Mutex // guards the following
	queue   []*mirror
	running int
	closed  bool
}

func newJobs(limit int, run func(*mirror)) *jobs { return &jobs{limit: limit, run: run} }

// push queues m. After close it does nothing.
func (j *jobs) push(m *mirror) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return
	}
	j.queue = append(j.queue, m)
	if j.running < j.limit {
		j.running++
		j.wg.Go(j.work)
	}
}

// work runs what is queued until nothing is.
func (j *jobs) work() {
	for {
		m := j.pop()
		if m == nil {
			return
		}
		j.run(m)
	}
}

// pop takes the mirror that waited longest. Where there is none it signs the
// caller off and returns nil.
func (j *jobs) pop() *mirror {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.queue) == 0 || j.closed {
		j.queue = nil
		j.running--
		return nil
	}
	m := j.queue[0]
	j.queue[0] = nil
	j.queue = j.queue[1:]
	return m
}

// close drops what is queued and waits for what runs.
func (j *jobs) close() {
	j.mu.Lock()
	j.closed = true
	j.mu.Unlock()
	j.wg.Wait()
}
