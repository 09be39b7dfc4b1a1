package local

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// registration is the record of a connection in Redis: its metadata and its owner. Its
// fields are guarded by Conn.mu, except inQueue.
type registration struct {
	c       *Conn
	inQueue queueState // guarded by the writer's mu

	tried       bool
	written     bool
	writtenAt   time.Time
	incarnation string
	ready       chan struct{} // closed after the first write
	isReady     bool
	gone        chan struct{} // closed when Redis no longer holds the connection
	isGone      bool
}

func (r *registration) conn() *Conn { return r.c }

func (r *registration) key() queueKey { return queueKey{conn: r.c} }

func (r *registration) queueState() *queueState { return &r.inQueue }

// pending implements writable.
func (r *registration) pending() bool {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	if r.c.closed && !r.tried && len(r.c.entries) == 0 {
		r.finish()
	}
	return !r.isGone
}

// next implements writable.
func (r *registration) next(inc string, after *store.Op) (store.Op, bool) {
	c := r.c
	if after != nil {
		return store.Op{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.written && r.incarnation != inc {
		r.written = false
	}
	op := store.Op{Conn: c.id, Fresh: !r.isReady}
	switch {
	case r.isGone:
		return op, false // another connection may have the id by now
	case c.closed && len(c.entries) > 0:
		return op, false // its entries leave first
	case c.closed && !r.tried:
		r.finish()
		return op, false
	case c.closed:
		op.Kind = store.OpDisconnect
		return op, true
	case r.written:
		return op, false
	}
	op.Kind, op.MetaVersion, op.Meta = store.OpConnect, c.metaVersion, c.meta
	r.incarnation, r.tried = inc, true
	return op, true
}

// done implements writable.
func (r *registration) done(op store.Op, res store.OpResult) {
	c := r.c
	if res.Err != nil {
		c.registry.refused(c.id, res.Err)
		c.registry.cfg.Wheel.Schedule(&c.retry, retryAfter, func() { r.writer().enqueueAgain(r) })
		return
	}
	if op.Kind == store.OpConnect && res.MetaVersion > op.MetaVersion {
		c.SetMeta(res.MetaVersion, res.Meta)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if op.Kind == store.OpDisconnect {
		r.forgetWritten()
		r.finish()
		return
	}
	if r.incarnation == c.registry.cfg.Incarnation() {
		r.written, r.writtenAt = true, time.Now()
		r.writer().addStored(r.incarnation, 1)
		if !r.isReady {
			r.isReady = true
			close(r.ready)
		}
	}
	if r.differs() {
		r.writer().enqueueAgain(r)
	}
}

// differs reports whether Redis may lack this registration or hold an older one. Conn.mu
// is held.
func (r *registration) differs() bool {
	if r.c.closed {
		return len(r.c.entries) == 0
	}
	return !r.written
}

func (r *registration) forgetWritten() {
	if r.written {
		r.writer().addStored(r.incarnation, -1)
	}
	r.written = false
}

func (r *registration) writer() *bucketWriter {
	return r.c.registry.writers[r.c.registry.cfg.ConnBucket(r.c.id)]
}

func (r *registration) enqueue(p priority) { r.writer().enqueue(r, p) }

// finish removes an ended connection. Conn.mu is held.
func (r *registration) finish() {
	if r.isGone {
		return
	}
	r.isGone = true
	r.c.registry.cfg.Wheel.Cancel(&r.c.retry)
	r.c.registry.cfg.Wheel.Cancel(&r.c.returnTimer)
	if r.c.rewriting.timer != nil {
		r.c.registry.cfg.Wheel.Cancel(r.c.rewriting.timer)
	}
	r.c.registry.remove(r.c)
	close(r.gone)
}
