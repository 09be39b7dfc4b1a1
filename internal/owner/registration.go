package owner

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// registration is a connection's place in Redis: its metadata, and who owns
// it. Its fields are guarded by Conn.mu, except marked.
type registration struct {
	c      *Conn
	marked mark // the lane's

	tried       bool
	written     bool
	writtenAt   time.Time
	incarnation string
	ready       chan struct{} // closed when it was written for the first time
	isReady     bool
	gone        chan struct{} // closed when the connection is out of Redis
	isGone      bool
}

func (r *registration) conn() *Conn { return r.c }

func (r *registration) place() place { return place{conn: r.c} }

func (r *registration) mark() *mark { return &r.marked }

// pending implements item.
func (r *registration) pending() bool {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	if r.c.closed && !r.tried && len(r.c.entries) == 0 {
		r.finish()
	}
	return !r.isGone
}

// next implements item.
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
		return op, false // the id may be another connection's by now
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

// done implements item.
func (r *registration) done(op store.Op, res store.OpResult) {
	c := r.c
	if res.Err != nil {
		c.o.refused(c.id, res.Err)
		c.o.cfg.Wheel.Schedule(&c.retry, retryAfter, func() { r.lane().offerAgain(r) })
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
	if r.incarnation == c.o.cfg.Incarnation() {
		r.written, r.writtenAt = true, time.Now()
		r.lane().hold(r.incarnation, 1)
		if !r.isReady {
			r.isReady = true
			close(r.ready)
		}
	}
	if r.differs() {
		r.lane().offerAgain(r)
	}
}

// differs reports whether Redis may lack this registration or hold an older one.
// Conn.mu is held.
func (r *registration) differs() bool {
	if r.c.closed {
		return len(r.c.entries) == 0
	}
	return !r.written
}

func (r *registration) forgetWritten() {
	if r.written {
		r.lane().hold(r.incarnation, -1)
	}
	r.written = false
}

func (r *registration) lane() *lane { return r.c.o.lanes[r.c.o.cfg.ConnBucket(r.c.id)] }

func (r *registration) offer(u urgency) { r.lane().offer(r, u) }

// finish lets go of a connection that is over. Conn.mu is held.
func (r *registration) finish() {
	if r.isGone {
		return
	}
	r.isGone = true
	r.c.o.cfg.Wheel.Cancel(&r.c.retry)
	r.c.o.cfg.Wheel.Cancel(&r.c.wake)
	if r.c.rewriting.timer != nil {
		r.c.o.cfg.Wheel.Cancel(r.c.rewriting.timer)
	}
	r.c.o.forget(r.c)
	close(r.gone)
}
