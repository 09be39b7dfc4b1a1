package local

import (
	"errors"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// reconcileEvery is the interval at which everything is compared even without a sign
	// of trouble.
	reconcileEvery = 10 * time.Minute
	// reconcileWhenBusy is the number of heartbeats after which a writer that is never
	// quiet is reconciled without a comparison of sizes.
	reconcileWhenBusy = 30
	// quietFor is the time that a writer must have been quiet before its count can be
	// compared with that of Redis, which is taken at another moment.
	quietFor = 2 * time.Second
	// bucketsAtOnce is the number of buckets that are compared at a time.
	bucketsAtOnce = 8
	// metasPerCall is the number of connections whose metadata is read in one call.
	metasPerCall = 256
)

// Heartbeat compares the index of this server in Redis with the local entries. Every call
// compares the sizes; owned is the size for bucket 0, or -1. Entries are compared one by
// one if the sizes differ twice in a row, if trouble is set, and every ten minutes. The
// comparison runs in the background, one at a time.
func (r *Registry) Heartbeat(owned int64, trouble bool) {
	if trouble {
		r.reconcileAll.Store(true)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.closed || !r.reconciling.CompareAndSwap(false, true) {
		return
	}
	r.workers.Go(func() {
		defer r.reconciling.Store(false)
		r.compareIndexes(owned)
	})
}

// compareIndexes runs alone because of reconciling, which guards lastReconcile and some
// fields of the writers.
func (r *Registry) compareIndexes(owned int64) {
	inc := r.cfg.Incarnation()
	if r.reconcileAll.Swap(false) || time.Since(r.lastReconcile) >= reconcileEvery {
		for _, w := range r.writers {
			w.reconcileDue, w.metadataDue = true, true
		}
		r.lastReconcile = time.Now()
	}
	lists := r.checklists()
	// A node that does not answer for its buckets must not delay the others.
	_ = wait.Each(r.stop, len(r.writers), bucketsAtOnce, func(i int) error {
		w := r.writers[i]
		troubled := w.reconcileDue || w.metadataDue
		if troubled {
			if err := r.reconcileEverything(w, inc); err != nil { // repeated at the next heartbeat
				r.cfg.Logger.Debug("mesh: reconcile not finished", "bucket", w.bucket, "error", err)
			}
		}
		size := r.checkBucketKeys(w, inc, lists[w.bucket])
		if size < 0 && w.bucket == 0 {
			size = owned
		}
		if !troubled {
			r.compareIndex(w, inc, size)
		}
		return nil
	})
}

// compareIndex compares the size of a writer's index (-1: unknown) with the expected
// size.
func (r *Registry) compareIndex(w *bucketWriter, inc string, size int64) {
	stored, quiet := w.comparable(inc)
	if stored == 0 && r.cfg.Buckets > 1 {
		w.mismatches, w.busyHeartbeats = 0, 0
		return
	}
	if stored == 0 && size < 0 {
		return // the lease of an idle server reports the size with every second renewal only
	}
	if !quiet {
		w.mismatches = 0
		if w.busyHeartbeats++; w.busyHeartbeats >= reconcileWhenBusy {
			r.reconcileBucket(w, inc)
		}
		return
	}
	w.busyHeartbeats = 0
	if size < 0 {
		var err error
		if size, err = r.cfg.Store.OwnedSize(r.stop, w.bucket, inc); err != nil {
			return
		}
	}
	if size == stored {
		w.mismatches = 0
		return
	}
	if w.mismatches++; w.mismatches >= 2 {
		r.reconcileBucket(w, inc)
	}
}

func (r *Registry) reconcileBucket(w *bucketWriter, inc string) {
	w.mismatches, w.busyHeartbeats = 0, 0
	if err := r.reconcile(w, inc); err != nil {
		r.cfg.Logger.Debug("mesh: reconcile not finished", "bucket", w.bucket, "error", err)
	}
}

// comparable returns the number of things that Redis is known to hold for this writer,
// and whether the number has been stable for long enough to compare.
func (w *bucketWriter) comparable(inc string) (stored int64, quiet bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.storedOf == inc {
		stored = w.stored
	}
	return stored, !w.running && time.Since(w.lastBatchAt) > quietFor
}

// reconcileEverything compares everything of one bucket that has not been compared since
// the last trouble. A finished part is not repeated because another part or bucket fails.
// Otherwise, in a long outage of one node, each heartbeat would write every entry of the
// other nodes again.
func (r *Registry) reconcileEverything(w *bucketWriter, inc string) error {
	var compared, read error
	if w.reconcileDue {
		if compared = r.reconcile(w, inc); compared == nil {
			r.verifyEntries(w)
			w.reconcileDue = false
		}
	}
	if w.metadataDue {
		if read = r.readMetas(w); read == nil {
			w.metadataDue = false
		}
	}
	return errors.Join(compared, read)
}

// reconcile reads the index of one bucket. It ends orphans and writes what is missing.
func (r *Registry) reconcile(w *bucketWriter, inc string) error {
	r.stats.reconciles.Add(1)
	began := time.Now()
	seen := make(map[store.EntryRef]struct{})
	var orphans []store.EntryRef
	var cursor uint64
	for {
		refs, next, err := r.cfg.Store.OwnedPage(r.stop, w.bucket, inc, cursor)
		if err != nil {
			return err
		}
		for _, ref := range refs {
			seen[ref] = struct{}{}
			if !r.has(ref) {
				orphans = append(orphans, ref)
			}
		}
		if cursor = next; cursor == 0 {
			break
		}
	}
	for _, ref := range orphans {
		if !r.returned(ref, seen) {
			r.endOrphan(w, ref)
		}
	}
	var stored int64
	for _, c := range r.Conns() {
		stored += c.writeMissing(w, inc, seen, began)
	}
	w.correctStored(inc, stored, began)
	return nil
}

// correctStored corrects the count of what Redis is known to hold, unless a batch changed
// it since began.
func (w *bucketWriter) correctStored(inc string, stored int64, began time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.running && w.storedOf == inc && w.lastBatchAt.Before(began) {
		w.stored = stored
	}
}

// writeMissing queues what was written before began and is not in seen. It returns the
// number of things that Redis then holds.
func (c *Conn) writeMissing(w *bucketWriter, inc string, seen map[store.EntryRef]struct{}, began time.Time) (stored int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := seen[store.EntryRef{Conn: c.id}]; !ok && c.reg.written && c.reg.writer() == w && c.reg.incarnation == inc &&
		c.reg.writtenAt.Before(began) {
		c.reg.forgetWritten()
		c.reg.enqueue(background)
	}
	if c.reg.written && c.reg.writer() == w && c.reg.incarnation == inc {
		stored++
	}
	for _, e := range c.entries {
		if e.writer != w || !e.written() || e.incarnation != inc {
			continue
		}
		stored++
		if _, ok := seen[store.EntryRef{Conn: c.id, Entry: e.id, Room: e.room}]; !ok && e.writtenAt.Before(began) {
			stored--
			e.handleMissing()
		}
	}
	return stored
}

// verifyEntries verifies every entry of a bucket. Neither the index nor the key check
// shows that Redis went back to an older state or older metadata of an entry.
func (r *Registry) verifyEntries(w *bucketWriter) {
	for _, c := range r.Conns() {
		c.mu.Lock()
		for _, e := range c.entries {
			if e.writer == w {
				e.verify()
			}
		}
		c.mu.Unlock()
	}
}

// readMetas reads the metadata of the connections of one bucket, which other servers may
// have changed while this one did not receive their messages.
func (r *Registry) readMetas(w *bucketWriter) error {
	conns := slices.DeleteFunc(r.Conns(), func(c *Conn) bool { return c.reg.writer() != w })
	for part := range slices.Chunk(conns, metasPerCall) {
		ids := make([]string, len(part))
		for i, c := range part {
			ids[i] = c.id
		}
		values, err := r.cfg.Store.ConnMetas(r.stop, ids)
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

// rewriteMeta writes the metadata of a connection again if Redis lost it or its last
// change.
func (c *Conn) rewriteMeta(stored store.MetaValue) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reg.written && (stored.Owner == "" || stored.Version < c.metaVersion) {
		c.reg.forgetWritten()
		c.reg.enqueue(background)
	}
}
