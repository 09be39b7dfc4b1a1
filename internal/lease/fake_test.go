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
	"github.com/meshpresence/mesh/internal/wait"
)

var errCut = errors.New("connection refused")

// redis models the data of the lease scripts, with a clock of its own.
type redis struct {
	mu            sync.Mutex
	start         time.Time
	offset        time.Duration // steps of the clock
	slowedAt      time.Time     // from then on the clock runs at half speed
	instances     map[string]int64
	dead          map[string]int64
	fences        map[string]bool
	owned         map[string]map[store.EntryRef]bool
	left          map[string]int // entry -> leaves
	declaredDead  map[string]int
	calls         map[string]int
	hear          map[string]func(string)
	uncounted     bool                           // PUBLISH counts no receiver
	roundRobin    bool                           // it does so every other time, like the nodes of a cluster in turn
	turn          int64                          // of roundRobin
	refuse        string                         // an entry that cannot be ended
	grace         time.Duration                  // of all entries
	kept          map[string]int64               // entry -> deadline of its kept place
	onDeclareDead func(inc string, lateMs int64) // called for each declared dead
}

func newRedis() *redis {
	return &redis{
		start: time.Now(), instances: map[string]int64{}, dead: map[string]int64{}, fences: map[string]bool{},
		owned: map[string]map[store.EntryRef]bool{}, left: map[string]int{}, declaredDead: map[string]int{},
		kept: map[string]int64{}, calls: map[string]int{}, hear: map[string]func(string){},
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
		set := map[store.EntryRef]bool{{Conn: "c" + inc}: true}
		for i := range n {
			id := fmt.Sprint(i)
			set[store.EntryRef{Conn: "c" + id, Entry: fmt.Sprint(inc, "/", bucket, "/", i), Room: "room"}] = true
		}
		r.owned[place(bucket, inc)] = set
	})
}

// listenersLocked is the answer of PUBLISH if there is a listener.
func (r *redis) listenersLocked() int64 {
	if r.uncounted {
		return 0
	}
	if r.roundRobin {
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

// link is the connection of one server to redis.
type link struct {
	r *redis

	mu               sync.Mutex
	cut              bool          // refuse calls
	hang             bool          // let calls run into their deadline
	latency          time.Duration // of every call
	paused           chan struct{} // the process stalls: not even deadlines pass
	inside           int           // calls in progress
	cutAfterCleanUps int           // cut after so many more CleanUp calls; 0: never
}

func (k *link) set(f func()) { k.mu.Lock(); defer k.mu.Unlock(); f() }

func (k *link) stop() { k.set(func() { k.paused = make(chan struct{}) }) }

func (k *link) cont() { k.set(func() { close(k.paused); k.paused = nil }) }

// await waits until a call is in progress.
func (k *link) await() {
	for inside := 0; inside == 0; k.set(func() { inside = k.inside }) {
		time.Sleep(time.Millisecond)
	}
}

// freeze blocks during a stall.
func (k *link) freeze() {
	k.mu.Lock()
	paused := k.paused
	k.mu.Unlock()
	if paused != nil {
		<-paused
	}
}

// call runs a script unless the link is cut. The answer may be late.
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
	if err := wait.For(ctx, latency/2+time.Microsecond); err != nil {
		return err
	}
	k.r.do(func() { k.r.calls[name]++; script() })
	if err := wait.For(ctx, latency/2+time.Microsecond); err != nil {
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

func (k *link) Renew(ctx context.Context, inc string, ttl time.Duration, echo string, wantDead bool) (a store.Renewal, err error) {
	name := "renew"
	if wantDead {
		name = "renew+dead"
	}
	err = k.call(ctx, name, func() {
		a.Now, a.Owned = k.r.nowLocked(), int64(len(k.r.owned[place(0, inc)]))
		if _, a.Listed = k.r.instances[inc]; a.Listed {
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
			for _, inc := range a.Dead {
				a.DeadSince = append(a.DeadSince, k.r.dead[inc])
			}
		}
		if hear := k.r.hear[inc]; hear != nil {
			a.Receivers = k.r.listenersLocked()
			hear(echo)
		}
	})
	return a, err
}

// clockLocked checks a clock proof as the scripts do.
func (r *redis) clockLocked(proof store.ClockProof) error {
	if d := r.nowLocked() - proof.Now; max(d, -d) > proof.Tolerance.Milliseconds() {
		return store.ErrClock
	}
	return nil
}

func (k *link) DeclareDeadIfExpired(ctx context.Context, proof store.ClockProof, inc string) (won bool, err error) {
	var clock error
	err = k.call(ctx, "declare dead if expired", func() {
		if clock = k.r.clockLocked(proof); clock != nil {
			return
		}
		if deadline, ok := k.r.instances[inc]; ok && deadline <= k.r.nowLocked() {
			delete(k.r.instances, inc)
			k.r.dead[inc] = deadline
			k.r.declaredDead[inc]++
			if k.r.onDeclareDead != nil {
				k.r.onDeclareDead(inc, k.r.nowLocked()-deadline)
			}
			won = true
		}
	})
	return won, errors.Join(err, clock)
}

func (k *link) DeclareDead(ctx context.Context, inc string) error {
	return k.call(ctx, "declare", func() { delete(k.r.instances, inc); k.r.dead[inc] = k.r.nowLocked() })
}

func (k *link) RemoveDead(ctx context.Context, inc string) error {
	return k.call(ctx, "cleaned", func() { delete(k.r.dead, inc) })
}

func (k *link) Fence(ctx context.Context, bucket int, inc string) error {
	return k.call(ctx, "fence", func() { k.r.fences[place(bucket, inc)] = true })
}

func (k *link) OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) (refs []store.EntryRef, next uint64, err error) {
	err = k.call(ctx, "page", func() {
		for ref := range k.r.owned[place(bucket, inc)] {
			if refs = append(refs, ref); len(refs) == 300 {
				break
			}
		}
		if cursor < 2 && len(refs) == 300 { // another pass finds the rest
			next = cursor + 1
		}
	})
	return refs, next, err
}

func (k *link) OwnedSize(ctx context.Context, bucket int, inc string) (n int64, err error) {
	err = k.call(ctx, "size", func() { n = int64(len(k.r.owned[place(bucket, inc)])) })
	return n, err
}

func (k *link) CleanUp(ctx context.Context, proof store.ClockProof, items []store.CleanUpItem) (out []store.CleanUpStatus, err error) {
	k.set(func() {
		if k.cutAfterCleanUps > 0 {
			k.cutAfterCleanUps--
			k.cut = k.cut || k.cutAfterCleanUps == 0
		}
	})
	var refused error
	err = k.call(ctx, "clean up", func() {
		if refused = k.r.clockLocked(proof); refused != nil {
			return
		}
		for i, it := range items {
			if it.Entry == k.r.refuse {
				refused = store.ErrUnavailable
				out = append(out, 0)
				continue
			}
			out = append(out, k.r.cleanUpLocked(&items[i]))
		}
	})
	return out, errors.Join(err, refused)
}

func (r *redis) cleanUpLocked(it *store.CleanUpItem) store.CleanUpStatus {
	for key, set := range r.owned {
		ref := store.EntryRef{Conn: it.Conn, Entry: it.Entry, Room: it.Room}
		if !set[ref] {
			continue
		}
		if !r.fences[key] {
			return store.Alive
		}
		delete(set, ref)
		since := it.Since
		if since == 0 {
			since = r.nowLocked()
		}
		if until := since + r.grace.Milliseconds(); r.grace > 0 && until > r.nowLocked() {
			r.kept[it.Entry] = until
			it.KeptUntil = until
			return store.PlaceKept
		}
		r.left[it.Entry]++
		return store.Ended
	}
	return store.NotThere
}

func (k *link) ForgetConnections(ctx context.Context, bucket int, inc string, conns []string) error {
	return k.call(ctx, "forget", func() {
		for _, c := range conns {
			delete(k.r.owned[place(bucket, inc)], store.EntryRef{Conn: c})
		}
	})
}

func (k *link) Publish(ctx context.Context, channel, payload string) (receivers int64, err error) {
	err = k.call(ctx, "publish", func() {
		if hear := k.r.hear[channel]; hear != nil {
			receivers = k.r.listenersLocked()
			hear(payload)
		}
	})
	return receivers, err
}
