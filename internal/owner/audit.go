package owner

import (
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// auditEvery is how often everything is compared even if nothing seems wrong.
	auditEvery = 10 * time.Minute
	// auditBusy is after how many heartbeats without a comparison a lane is
	// audited because it is never quiet.
	auditBusy = 30
	// settled is how long a lane must have been quiet for its count and that of
	// Redis, taken at another moment, to be comparable.
	settled = 2 * time.Second
	// lanesAtOnce is how many buckets are compared at a time.
	lanesAtOnce = 8
	// metasPerCall bounds one read of metadata.
	metasPerCall = 256
)

// stray is something that Redis holds in this server's name and that it does
// not have.
type stray struct {
	o      *Owner
	ref    store.OwnedRef
	op     store.Op
	marked mark // the lane's
}

func (s *stray) conn() *Conn  { return nil } // all of them have one turn
func (s *stray) place() place { return place{} }
func (s *stray) mark() *mark  { return &s.marked }

// next implements item.
func (s *stray) next(_ string, after *store.Op) (store.Op, bool) {
	return s.op, after == nil && s.pending()
}

// done implements item.
func (s *stray) done(op store.Op, res store.OpResult) {
	if op.Kind == store.OpLeave && res.Err == nil && res.Status == store.Done {
		s.o.stats.leaves[op.Cause].Add(1)
	}
}

// Heartbeat compares what Redis holds in this server's name with what it has:
// by size (owned is that of bucket 0, or -1) every time, entry by entry where
// the sizes differ twice in a row, where trouble is said to have been, and
// every ten minutes. It does so in the background, one at a time.
func (o *Owner) Heartbeat(owned int64, trouble bool) {
	if trouble {
		o.trouble.Store(true)
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	if o.closed || !o.auditing.CompareAndSwap(false, true) {
		return
	}
	o.workers.Go(func() {
		defer o.auditing.Store(false)
		o.compare(owned)
	})
}

// compare runs alone: auditing says so, and guards lastAudit and what it
// guards of a lane.
func (o *Owner) compare(owned int64) {
	inc := o.cfg.Incarnation()
	if o.trouble.Swap(false) || time.Since(o.lastAudit) >= auditEvery {
		for _, l := range o.lanes {
			l.troubled, l.deaf = true, true
		}
		o.lastAudit = time.Now()
	}
	lists := o.checklists()
	o.eachLane(func(l *lane) {
		troubled := l.troubled || l.deaf
		if troubled {
			if err := o.auditAll(l, inc); err != nil { // once more at the next heartbeat
				o.cfg.Logger.Debug("mesh: audit not finished", "bucket", l.bucket, "error", err)
			}
		}
		size := o.checkLane(l, inc, lists[l.bucket])
		if size < 0 && l.bucket == 0 {
			size = owned
		}
		if !troubled {
			o.compareLane(l, inc, size)
		}
	})
}

// eachLane runs do for every lane, some at a time: where one bucket is kept by
// a node that does not answer, the others need not wait for it.
func (o *Owner) eachLane(do func(l *lane)) {
	if len(o.lanes) == 1 {
		do(o.lanes[0])
		return
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, lanesAtOnce)
	for _, l := range o.lanes {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			do(l)
		})
	}
	wg.Wait()
}

// compareLane compares the size of a lane's index (-1: not known) with the size that
// it should have.
func (o *Owner) compareLane(l *lane, inc string, size int64) {
	held, quiet := l.standing(inc)
	if held == 0 && o.cfg.Buckets > 1 {
		l.differs, l.busy = 0, 0
		return
	}
	if held == 0 && size < 0 {
		return // an idle server asks with every second renewal only
	}
	if !quiet {
		l.differs = 0
		if l.busy++; l.busy >= auditBusy {
			o.auditLane(l, inc)
		}
		return
	}
	l.busy = 0
	if size < 0 {
		var err error
		if size, err = o.cfg.Store.OwnedSize(o.stop, l.bucket, inc); err != nil {
			return
		}
	}
	if size == held {
		l.differs = 0
		return
	}
	if l.differs++; l.differs >= 2 {
		o.auditLane(l, inc)
	}
}

func (o *Owner) auditLane(l *lane, inc string) {
	l.differs, l.busy = 0, 0
	if err := o.audit(l, inc); err != nil {
		o.cfg.Logger.Debug("mesh: audit not finished", "bucket", l.bucket, "error", err)
	}
}

// standing returns how many things the lane knows Redis to hold, and whether
// that has not changed for long enough to compare.
func (l *lane) standing(inc string) (held int64, quiet bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.heldOf == inc {
		held = l.held
	}
	return held, !l.running && time.Since(l.moved) > settled
}

// auditAll compares everything of one bucket that has not been since trouble
// was said to be. What is done is not done again because of the rest, or
// because of other buckets: during a long outage of one node that would write
// every entry of the others anew at each heartbeat.
func (o *Owner) auditAll(l *lane, inc string) error {
	var audited, read error
	if l.troubled {
		if audited = o.audit(l, inc); audited == nil {
			o.verify(l)
			l.troubled = false
		}
	}
	if l.deaf {
		if read = o.readMetas(l); read == nil {
			l.deaf = false
		}
	}
	return errors.Join(audited, read)
}

// audit pages through one bucket's index: what this server does not have is
// ended, what is missing is written.
func (o *Owner) audit(l *lane, inc string) error {
	o.stats.audits.Add(1)
	began := time.Now()
	seen := make(map[store.OwnedRef]struct{})
	var strays []store.OwnedRef
	var cursor uint64
	for {
		refs, next, err := o.cfg.Store.OwnedPage(o.stop, l.bucket, inc, cursor)
		if err != nil {
			return err
		}
		for _, ref := range refs {
			seen[ref] = struct{}{}
			if !o.has(ref) {
				strays = append(strays, ref)
			}
		}
		if cursor = next; cursor == 0 {
			break
		}
	}
	for _, ref := range strays {
		if !o.returned(ref, seen) {
			o.endStray(l, ref)
		}
	}
	var held int64
	for _, c := range o.Conns() {
		held += c.writeMissing(l, inc, seen, began)
	}
	l.recount(inc, held, began)
	return nil
}

// recount corrects the count of what Redis is known to hold, unless it moved
// while it was taken.
func (l *lane) recount(inc string, held int64, began time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.running && l.heldOf == inc && l.moved.Before(began) {
		l.held = held
	}
}

// has reports whether an index member is something this server has, or is
// about to end by itself.
func (o *Owner) has(ref store.OwnedRef) bool {
	o.mu.RLock()
	c := o.conns[ref.Conn]
	o.mu.RUnlock()
	if c == nil {
		return false
	}
	if ref.Room == "" {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[ref.Room]
	return e != nil && ((e.want && e.id == ref.Entry) || e.ending == ref.Entry)
}

// returned reports whether an index member is of a connection that has left the
// room and joined it again since, and Redis does not show that (any more: it
// has gone back in time). Joining anew takes the place of the old entry; ending
// it would tell that somebody left who is there.
func (o *Owner) returned(ref store.OwnedRef, seen map[store.OwnedRef]struct{}) bool {
	o.mu.RLock()
	c := o.conns[ref.Conn]
	o.mu.RUnlock()
	if c == nil || ref.Room == "" {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[ref.Room]
	if e == nil || !e.want {
		return false
	}
	_, shown := seen[store.OwnedRef{Conn: ref.Conn, Entry: e.id, Room: ref.Room}]
	return !shown
}

func (o *Owner) endStray(l *lane, ref store.OwnedRef) {
	o.stats.strays.Add(1)
	op := store.Op{Kind: store.OpLeave, Room: ref.Room, Conn: ref.Conn, Entry: ref.Entry, Cause: store.CauseClosed, Known: true}
	if ref.Room == "" {
		op = store.Op{Kind: store.OpDisconnect, Conn: ref.Conn}
	}
	l.offer(&stray{o: o, ref: ref, op: op}, background)
}

// writeMissing writes what had been written before the audit began and was
// not among what it saw. It returns how much is held then.
func (c *Conn) writeMissing(l *lane, inc string, seen map[store.OwnedRef]struct{}, began time.Time) (held int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := seen[store.OwnedRef{Conn: c.id}]; !ok && c.reg.written && c.reg.lane() == l && c.reg.incarnation == inc &&
		c.reg.writtenAt.Before(began) {
		c.reg.forgetWritten()
		c.reg.offer(background)
	}
	if c.reg.written && c.reg.lane() == l && c.reg.incarnation == inc {
		held++
	}
	for _, e := range c.entries {
		if e.lane != l || !e.want || !e.written || e.incarnation != inc {
			continue
		}
		held++
		if _, ok := seen[store.OwnedRef{Conn: c.id, Entry: e.id, Room: e.room}]; !ok && e.writtenAt.Before(began) {
			held--
			e.vanished()
		}
	}
	return held
}

// verify has every entry of a bucket verified: neither the index nor a check of
// keys shows that Redis went back to an older state or older metadata of it.
func (o *Owner) verify(l *lane) {
	for _, c := range o.Conns() {
		c.mu.Lock()
		for _, e := range c.entries {
			if e.lane == l {
				e.verify()
			}
		}
		c.mu.Unlock()
	}
}

// readMetas catches up with metadata, of the connections of one bucket, that
// other servers have set while this one could not hear them.
func (o *Owner) readMetas(l *lane) error {
	conns := slices.DeleteFunc(o.Conns(), func(c *Conn) bool { return c.reg.lane() != l })
	for part := range slices.Chunk(conns, metasPerCall) {
		ids := make([]string, len(part))
		for i, c := range part {
			ids[i] = c.id
		}
		values, err := o.cfg.Store.ConnMetas(o.stop, ids)
		if err != nil {
			return err
		}
		for i, c := range part {
			if _, version := c.Metadata(); values[i].Version > version {
				c.SetMeta(values[i].Version, values[i].Data)
			}
			c.rewriteMeta(values[i])
		}
	}
	return nil
}

// rewriteMeta writes a connection's metadata anew where Redis lost them, or
// the last change of them.
func (c *Conn) rewriteMeta(stands store.MetaValue) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reg.written && (stands.Owner == "" || stands.Version < c.metaVersion) {
		c.reg.forgetWritten()
		c.reg.offer(background)
	}
}

// pending implements item: it is still a stray.
func (s *stray) pending() bool { return !s.o.has(s.ref) }
