package lease

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

var errCut = errors.New("connection refused")

// redis models what the lease scripts keep, with a clock of its own.
type redis struct {
	mu        sync.Mutex
	start     time.Time
	offset    time.Duration // the clock was stepped by
	slowedAt  time.Time     // from then on the clock runs at half speed
	instances map[string]int64
	dead      map[string]int64
	fences    map[string]bool
	owned     map[string]map[store.OwnedRef]bool
	left      map[string]int // entry -> leaves told
	burials   map[string]int
	calls     map[string]int
	hear      map[string]func(string)
	uncounted bool                           // says that nobody hears, whoever does
	robin     bool                           // says so every other time, as the nodes of a cluster do in turn
	turn      int64                          // of robin
	refuse    string                         // an entry that cannot be ended
	guard     func(inc string, lateMs int64) // sees every burial
}

func newRedis() *redis {
	return &redis{
		start: time.Now(), instances: map[string]int64{}, dead: map[string]int64{}, fences: map[string]bool{},
		owned: map[string]map[store.OwnedRef]bool{}, left: map[string]int{}, burials: map[string]int{},
		calls: map[string]int{}, hear: map[string]func(string){},
	}
}

func (r *redis) nowLocked() int64 {
	now := time.Now()
	if !r.slowedAt.IsZero() {
		now = r.slowedAt.Add(now.Sub(r.slowedAt) / 2)
	}
	return now.Add(r.offset).UnixMilli()
}

func place(bucket int, inc string) string { return fmt.Sprint(bucket, " ", inc) }

// own adds n entries and one connection to an incarnation in a bucket.
func (r *redis) own(bucket int, inc string, n int) {
	r.do(func() {
		set := map[store.OwnedRef]bool{{Conn: "c" + inc}: true}
		for i := range n {
			id := fmt.Sprint(i)
			set[store.OwnedRef{Conn: "c" + id, Entry: fmt.Sprint(inc, "/", bucket, "/", i), Room: "room"}] = true
		}
		r.owned[place(bucket, inc)] = set
	})
}

// listenersLocked is what PUBLISH answers where there is a listener.
func (r *redis) listenersLocked() int64 {
	if r.uncounted {
		return 0
	}
	if r.robin {
		r.turn++
		return r.turn % 2
	}
	return 1
}

func (r *redis) do(f func()) { r.mu.Lock(); defer r.mu.Unlock(); f() }

func (r *redis) step(d time.Duration) { r.do(func() { r.offset += d }) }

func (r *redis) flush() {
	r.do(func() { clear(r.instances); clear(r.dead); clear(r.fences); clear(r.owned) })
}

// link is one server's way to redis.
type link struct {
	r *redis

	mu      sync.Mutex
	cut     bool          // refuse
	hang    bool          // let calls run into their deadline
	latency time.Duration // of every call
	paused  chan struct{} // the process stands still: not even deadlines count
	inside  int           // calls under way
	reaps   int           // cut after so many more Reap calls; 0: never
}

func (k *link) set(f func()) { k.mu.Lock(); defer k.mu.Unlock(); f() }

func (k *link) stop() { k.set(func() { k.paused = make(chan struct{}) }) }

func (k *link) cont() { k.set(func() { close(k.paused); k.paused = nil }) }

// await waits until a call is under way.
func (k *link) await() {
	for inside := 0; inside == 0; k.set(func() { inside = k.inside }) {
		time.Sleep(time.Millisecond)
	}
}

// freeze blocks while the process stands still.
func (k *link) freeze() {
	k.mu.Lock()
	paused := k.paused
	k.mu.Unlock()
	if paused != nil {
		<-paused
	}
}

// call runs a script, unless the link is cut; the answer may come late.
func (k *link) call(ctx context.Context, name string, script func()) error {
	k.freeze()
	k.mu.Lock()
	cut, hang, latency := k.cut, k.hang, k.latency
	k.inside++
	k.mu.Unlock()
	defer k.set(func() { k.inside-- })
	if cut {
		return errCut
	}
	if hang {
		<-ctx.Done()
		return fmt.Errorf("%w: %w", store.ErrUnavailable, ctx.Err())
	}
	if err := sleep(ctx, latency/2+time.Microsecond); err != nil {
		return err
	}
	k.r.do(func() { k.r.calls[name]++; script() })
	if err := sleep(ctx, latency/2+time.Microsecond); err != nil {
		return err
	}
	k.freeze()
	return nil
}

func (k *link) Register(ctx context.Context, inc string, ttl time.Duration) (now int64, err error) {
	err = k.call(ctx, "register", func() {
		now = k.r.nowLocked()
		k.r.instances[inc] = now + ttl.Milliseconds()
	})
	return now, err
}

func (k *link) Renew(ctx context.Context, inc string, ttl time.Duration, beat string, wantDead bool) (a store.Renewal, err error) {
	name := "renew"
	if wantDead {
		name = "renew+dead"
	}
	err = k.call(ctx, name, func() {
		a.Now, a.Owned = k.r.nowLocked(), int64(len(k.r.owned[place(0, inc)]))
		if _, a.Present = k.r.instances[inc]; a.Present {
			k.r.instances[inc] = a.Now + ttl.Milliseconds()
		}
		var first int64
		for other, deadline := range k.r.instances {
			if other != inc && (a.Next == "" || deadline < first) {
				a.Next, first = other, deadline
				a.NextIn = time.Duration(deadline-a.Now) * time.Millisecond
			}
		}
		if wantDead {
			a.Dead = slices.Sorted(maps.Keys(k.r.dead))
		}
		if hear := k.r.hear[inc]; hear != nil {
			a.Heard = k.r.listenersLocked()
			hear(beat)
		}
	})
	return a, err
}

// clockLocked is how the scripts check a judgment.
func (r *redis) clockLocked(j store.Judgment) error {
	if d := r.nowLocked() - j.Now; max(d, -d) > j.Tolerance.Milliseconds() {
		return store.ErrClock
	}
	return nil
}

func (k *link) Bury(ctx context.Context, j store.Judgment, inc string) (won bool, err error) {
	var clock error
	err = k.call(ctx, "bury", func() {
		if clock = k.r.clockLocked(j); clock != nil {
			return
		}
		if deadline, ok := k.r.instances[inc]; ok && deadline <= k.r.nowLocked() {
			delete(k.r.instances, inc)
			k.r.dead[inc] = k.r.nowLocked()
			k.r.burials[inc]++
			if k.r.guard != nil {
				k.r.guard(inc, k.r.nowLocked()-deadline)
			}
			won = true
		}
	})
	return won, errors.Join(err, clock)
}

func (k *link) DeclareDead(ctx context.Context, inc string) error {
	return k.call(ctx, "declare", func() { delete(k.r.instances, inc); k.r.dead[inc] = k.r.nowLocked() })
}

func (k *link) Cleaned(ctx context.Context, inc string) error {
	return k.call(ctx, "cleaned", func() { delete(k.r.dead, inc) })
}

func (k *link) Fence(ctx context.Context, bucket int, inc string) error {
	return k.call(ctx, "fence", func() { k.r.fences[place(bucket, inc)] = true })
}

func (k *link) OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) (refs []store.OwnedRef, next uint64, err error) {
	err = k.call(ctx, "page", func() {
		for ref := range k.r.owned[place(bucket, inc)] {
			if refs = append(refs, ref); len(refs) == 300 {
				break
			}
		}
		if cursor < 2 && len(refs) == 300 { // what is left is found by another pass
			next = cursor + 1
		}
	})
	return refs, next, err
}

func (k *link) OwnedSize(ctx context.Context, bucket int, inc string) (n int64, err error) {
	err = k.call(ctx, "size", func() { n = int64(len(k.r.owned[place(bucket, inc)])) })
	return n, err
}

func (k *link) Reap(ctx context.Context, j store.Judgment, items []store.ReapItem) (out []store.ReapStatus, err error) {
	k.set(func() {
		if k.reaps > 0 {
			k.reaps--
			k.cut = k.cut || k.reaps == 0
		}
	})
	var refused error
	err = k.call(ctx, "reap", func() {
		if refused = k.r.clockLocked(j); refused != nil {
			return
		}
		for _, it := range items {
			if it.Entry == k.r.refuse {
				refused = store.ErrUnavailable
				continue
			}
			out = append(out, k.r.reapLocked(it))
		}
	})
	return out, errors.Join(err, refused)
}

func (r *redis) reapLocked(it store.ReapItem) store.ReapStatus {
	for key, set := range r.owned {
		ref := store.OwnedRef{Conn: it.Conn, Entry: it.Entry, Room: it.Room}
		if !set[ref] {
			continue
		}
		if !r.fences[key] {
			return store.Alive
		}
		delete(set, ref)
		r.left[it.Entry]++
		return store.Ended
	}
	return store.NotThere
}

func (k *link) ForgetConnections(ctx context.Context, bucket int, inc string, conns []string) error {
	return k.call(ctx, "forget", func() {
		for _, c := range conns {
			delete(k.r.owned[place(bucket, inc)], store.OwnedRef{Conn: c})
		}
	})
}

func (k *link) Publish(ctx context.Context, channel, payload string) (heard int64, err error) {
	err = k.call(ctx, "publish", func() {
		if hear := k.r.hear[channel]; hear != nil {
			heard = k.r.listenersLocked()
			hear(payload)
		}
	})
	return heard, err
}
