package lease

import (
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// places collects the calls of Config.Kept of several servers.
type places struct {
	mu    sync.Mutex // guards until
	until map[string]int64
}

func (p *places) hook(c *Config) {
	c.Kept = func(room, conn, entry string, until int64) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.until[fmt.Sprint(room, " ", conn, " ", entry)] = until
	}
}

// The grace of the entries of a dead server counts from the end of its lease, although
// they are handed over later, and by several servers.
func TestPlacesOfADeadServerAreKept(t *testing.T) {
	for name, first := range map[string]int{"by one server": 0, "by another one after the first stopped": 2} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				const entries = 1000
				told := places{until: make(map[string]int64)}
				a, b := newServer(t, r, "a", told.hook).start(), newServer(t, r, "b", told.hook).start()
				c := newServer(t, r, "c").start()
				defer a.kill()
				defer b.kill()
				pass(25 * time.Second)
				var end int64
				r.do(func() { end, r.grace = r.instances["c1"], time.Minute })
				r.own(0, "c1", entries)
				if first > 0 { // the rest is left to the other one, which reads the list of dead servers
					r.do(func() {
						r.onDeclareDead = func(string, int64) {
							for _, s := range []*server{a, b} {
								s.set(func() { s.cutAfterCleanUps = first })
							}
						}
					})
				}
				c.kill()
				pass(ttl + 2*time.Second)
				if first > 0 {
					for _, s := range []*server{a, b} {
						s.set(func() { s.cut, s.cutAfterCleanUps = false, 0 })
					}
					r.do(func() { check(t, len(r.kept) < entries, "nothing is left for the second") })
				}
				pass(3 * ttl)
				r.do(func() {
					check(t, len(r.kept) == entries && len(r.left) == 0, "%d kept, %d left", len(r.kept), len(r.left))
					for entry, until := range r.kept {
						if until != end+time.Minute.Milliseconds() {
							t.Fatalf("%s is kept %d ms too long", entry, until-end-time.Minute.Milliseconds())
						}
					}
					check(t, len(r.owned[place(0, "c1")]) == 0 && len(r.dead) == 0, "c1 is not cleaned up")
					want := make(map[string]int64)
					for i := range entries {
						entry := fmt.Sprint("c1/0/", i)
						want[fmt.Sprint("room c", i, " ", entry)] = r.kept[entry]
					}
					check(t, maps.Equal(told.until, want), "%d places told", len(told.until))
				})
				sa, sb := a.Stats(), b.Stats()
				check(t, sa.PlacesKept+sb.PlacesKept == entries && sa.CleanedUp+sb.CleanedUp == 0, "stats: %+v %+v", sa, sb)
			})
		})
	}
}

// An entry whose grace is over when its server is found dead leaves at once.
func TestGraceShorterThanTheCleanUp(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, c := newServer(t, r, "a").start(), newServer(t, r, "c").start()
		defer a.kill()
		pass(25 * time.Second)
		r.do(func() { r.grace = time.Millisecond })
		r.own(0, "c1", 10)
		c.kill()
		pass(2 * ttl)
		endedOnce(t, r, 0, "c1", 10)
		check(t, a.Stats().CleanedUp == 10 && a.Stats().PlacesKept == 0, "stats: %+v", a.Stats())
	})
}

func TestMayEnd(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a")
		check(t, !a.MayEnd(store.Writes{}, 0), "before the clock of Redis is known")
		r.step(time.Hour)
		a.start()
		defer a.kill()
		pass(time.Second)
		now := time.Now()
		deadline := now.Add(time.Hour).UnixMilli() // this moment, on the clock of Redis
		ok := store.Writes{Last: now.Add(10 * time.Millisecond), Since: now.Add(-time.Minute)}
		pass(time.Second)
		check(t, a.MayEnd(ok, deadline), "a write succeeded after the deadline")
		check(t, !a.MayEnd(ok, deadline+11), "a write before the deadline is not enough")
		check(t, !a.MayEnd(store.Writes{}, deadline), "no write has succeeded")

		failed := ok
		failed.Failed, failed.Since = time.Now(), time.Now()
		failed.Last = time.Now()
		pass(quietFor - time.Millisecond)
		check(t, !a.MayEnd(failed, deadline), "less than a second after a failure")
		pass(time.Millisecond)
		check(t, a.MayEnd(failed, deadline), "a second after the failure")
		failed.Since = time.Time{}
		check(t, !a.MayEnd(failed, deadline), "no write has succeeded since the failure")
	})
}
