package lease

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// sim runs a test in a synctest bubble.
func sim(t *testing.T, f func(t *testing.T, r *redis)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { f(t, newRedis()) })
}

// pass lets time pass until everything is idle.
func pass(d time.Duration) { time.Sleep(d); synctest.Wait() }

func check(t *testing.T, ok bool, format string, args ...any) {
	t.Helper()
	if !ok {
		t.Errorf(format, args...)
	}
}

// nobodyDeclaredDead checks that these incarnations are alive and no other was declared
// dead.
func nobodyDeclaredDead(t *testing.T, r *redis, living ...string) {
	t.Helper()
	r.do(func() {
		check(t, len(r.declaredDead) == 0, "declared dead: %v", r.declaredDead)
		for _, inc := range living {
			_, ok := r.instances[inc]
			check(t, ok, "%s is not on the list: %v", inc, r.instances)
		}
	})
}

// endedOnce checks that n entries of inc in a bucket left once each, and that nothing of
// inc is left there.
func endedOnce(t *testing.T, r *redis, bucket int, inc string, n int) {
	t.Helper()
	r.do(func() {
		for i := range n {
			entry := fmt.Sprint(inc, "/", bucket, "/", i)
			if r.left[entry] != 1 {
				t.Errorf("%s left %d times", entry, r.left[entry])
				return
			}
		}
		check(t, len(r.owned[place(bucket, inc)]) == 0, "%s still owns something", inc)
		check(t, r.fences[place(bucket, inc)], "%s is not fenced", inc)
		_, dead := r.dead[inc]
		check(t, !dead, "%s is still on the dead list", inc)
	})
}

func TestKilledServerIsDeclaredDeadOnceInTime(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		const buckets, entries = 4, 1000
		several := func(c *Config) { c.Buckets = buckets }
		a, b := newServer(t, r, "a", several).start(), newServer(t, r, "b", several).start()
		c := newServer(t, r, "c", several).start()
		defer a.kill()
		defer b.kill()
		pass(25 * time.Second)
		for i := range buckets {
			r.own(i, "c1", entries)
		}
		last := time.Now().Add(-c.Stats().LastRenewal)
		c.kill()
		time.Sleep(time.Until(last.Add(ttl - 10*time.Millisecond)))
		nobodyDeclaredDead(t, r, "a1", "b1", "c1")
		time.Sleep(time.Until(last.Add(ttl + time.Second)))
		r.do(func() { check(t, r.declaredDead["c1"] == 1, "declared dead: %v", r.declaredDead) })
		for i := range buckets {
			endedOnce(t, r, i, "c1", entries)
		}
		check(t, a.Stats().DeclaredDead+b.Stats().DeclaredDead == 1, "not declared dead by exactly one server")
		sum := a.Stats().CleanedUp + b.Stats().CleanedUp
		check(t, sum == buckets*entries, "%d entries cleaned up", sum)
		pass(time.Minute)
		r.do(func() { check(t, len(r.declaredDead) == 1, "declared dead: %v", r.declaredDead) })
	})
}

func TestOneSurvivorOfMany(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		var others []*server
		for i := range 20 {
			others = append(others, newServer(t, r, fmt.Sprint("other", i, "-")).start())
			r.own(0, others[i].Incarnation(), 5)
		}
		pass(25 * time.Second)
		var last time.Time
		for _, o := range others {
			last = time.Now().Add(-o.Stats().LastRenewal)
			o.kill()
		}
		time.Sleep(time.Until(last.Add(ttl + time.Second)))
		for _, o := range others {
			endedOnce(t, r, 0, o.Incarnation(), 5)
		}
	})
}

func TestTwoServersFindTheDeadAtStart(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		old := newServer(t, r, "old").start()
		r.own(0, "old1", 10)
		pass(time.Second)
		old.kill()
		r.own(0, "gone", 3)
		r.do(func() { r.dead["gone"] = 1 })
		pass(time.Hour)
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(ttl - time.Second)
		r.do(func() { check(t, len(r.declaredDead) == 0 && len(r.left) == 0, "declared dead without contact") })
		pass(2 * time.Second)
		r.do(func() { check(t, r.declaredDead["old1"] == 1, "declared dead: %v", r.declaredDead) })
		endedOnce(t, r, 0, "old1", 10)
		endedOnce(t, r, 0, "gone", 3)
	})
}

func TestCleanerDiesHalfway(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b")
		c := newServer(t, r, "c").start()
		pass(15 * time.Second)
		b.start()
		defer b.kill()
		r.own(0, "c1", 1000)
		a.set(func() { a.cutAfterCleanUps = 3 }) // only a is in contact when c is due
		c.kill()
		pass(ttl - 500*time.Millisecond)
		r.do(func() {
			check(t, r.declaredDead["c1"] == 1, "declared dead: %v", r.declaredDead)
			check(t, len(r.left) > 0 && len(r.left) < 1000, "%d left", len(r.left))
		})
		a.kill()
		pass(2*ttl + 2*time.Second)
		endedOnce(t, r, 0, "c1", 1000)
		r.do(func() { check(t, r.declaredDead["c1"] == 1, "declared dead: %v", r.declaredDead) })
	})
}

func TestAnIdleServerIsFrugal(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(300 * time.Second)
		r.do(func() {
			renewals, asked := r.calls["renew"]+r.calls["renew+dead"], r.calls["renew+dead"]
			check(t, renewals <= 2*92 && renewals >= 2*88, "%d renewals", renewals)
			check(t, asked <= 2*32 && asked >= 2*28, "%d asked for the dead list", asked)
			check(t, len(r.calls) == 3, "calls: %v", r.calls)
		})
	})
}

func TestStartAndStop(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a")
		_, ok := a.Now()
		check(t, a.Incarnation() == "" && !ok && a.Stats().LastRenewal == -1, "something before Start")
		a.set(func() { a.cut = true })
		err := a.Start(t.Context())
		check(t, errors.Is(err, errCut), "Start: %v", err)
		a.set(func() { a.cut = false })
		a.start()
		check(t, errors.Is(a.Start(t.Context()), ErrStarted), "a second Start")
		check(t, errors.Is(a.Resign(t.Context()), ErrRunning), "Resign while running")
		pass(time.Second)
		now, ok := a.Now()
		r.do(func() { d := r.nowLocked() - now; check(t, ok && d >= -2 && d <= 2, "Now is off by %d ms", d) })

		a.set(func() { a.hang = true })
		pass(5 * time.Second) // in the middle of a call
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		a.kill()
		check(t, a.Stop(ended) == nil, "Stop again")
		check(t, errors.Is(a.Start(t.Context()), ErrStarted), "Start after Stop")
	})
}

func TestStopBeforeStart(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a")
		a.kill()
		check(t, a.Resign(t.Context()) == nil, "Resign of nobody")
		check(t, errors.Is(a.Start(t.Context()), ErrStarted), "Start after Stop")
		r.do(func() { check(t, len(r.instances) == 0, "registered") })
	})
}

func TestResign(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a", func(c *Config) { c.Buckets = 3 }).start()
		for i := range 3 {
			r.own(i, "a1", 200)
		}
		r.step(time.Hour) // the clock does not matter for its own end
		a.kill()
		for range 2 {
			if err := a.Resign(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 3 {
			endedOnce(t, r, i, "a1", 200)
		}
		r.do(func() { check(t, len(r.instances) == 0 && len(r.declaredDead) == 0, "still listed") })
		a.set(func() { a.cut = true })
		began := time.Now()
		check(t, errors.Is(a.Resign(t.Context()), errCut), "Resign without Redis")
		check(t, time.Since(began) >= resignWithin, "tried again")
		ctx, cancel := context.WithTimeout(t.Context(), resignWithin/2)
		defer cancel()
		check(t, errors.Is(a.Resign(ctx), errCut), "Resign within its context")
		check(t, time.Since(began) < 2*resignWithin, "not beyond its context")
		time.AfterFunc(resignWithin/2, func() { a.set(func() { a.cut = false }) })
		check(t, a.Resign(t.Context()) == nil, "Resign with a Redis that comes back")
	})
}

// The time limit holds for short leases and a distant Redis.
func TestShortLeases(t *testing.T) {
	for _, short := range []time.Duration{time.Second, 2 * time.Second, 5 * time.Second} {
		for _, latency := range []time.Duration{0, 5 * time.Millisecond, 30 * time.Millisecond} {
			t.Run(fmt.Sprint(short, " ", latency), func(t *testing.T) {
				sim(t, func(t *testing.T, r *redis) {
					with := func(c *Config) { c.TTL = short }
					a, b := newServer(t, r, "a", with), newServer(t, r, "b", with)
					a.set(func() { a.latency = latency })
					b.set(func() { b.latency = latency })
					a.start()
					b.start()
					defer a.kill()
					pass(4*short + short/7)
					nobodyDeclaredDead(t, r, "a1", "b1")
					r.own(0, "b1", 500)
					last := time.Now().Add(-b.Stats().LastRenewal)
					b.kill()
					time.Sleep(time.Until(last.Add(short + time.Second)))
					endedOnce(t, r, 0, "b1", 500)
				})
			})
		}
	}
}

// Many servers that start, stall, lose Redis and stop at random never declare one dead
// that renewed in time. The entries of dead servers leave once.
func TestRandomLives(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) { randomLives(t, r, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func randomLives(t *testing.T, r *redis, rnd *rand.Rand) {
	r.onDeclareDead = func(inc string, late int64) {
		check(t, late >= 0, "%s was declared dead %d ms early", inc, -late)
	}
	var all []*server
	for i := range 5 {
		s := newServer(t, r, fmt.Sprint("s", i, "-")).start()
		r.own(0, s.Incarnation(), 20)
		all = append(all, s)
	}
	for range 40 {
		s := all[rnd.IntN(len(all))]
		span := time.Duration(rnd.Int64N(int64(2 * ttl)))
		switch rnd.IntN(4) {
		case 0:
			s.set(func() { s.cut = true })
			pass(span)
			s.set(func() { s.cut = false })
		case 1:
			s.set(func() { s.hang = true })
			pass(span)
			s.set(func() { s.hang = false })
		case 2:
			s.stop()
			pass(span)
			s.cont()
		case 3:
			pass(span)
		}
	}
	pass(3 * ttl)
	for _, s := range all {
		s.kill()
		check(t, s.Resign(t.Context()) == nil, "Resign")
	}
	r.do(func() {
		check(t, len(r.instances) == 0 && len(r.dead) == 0, "left over: %v %v", r.instances, r.dead)
		for entry, n := range r.left {
			check(t, n == 1, "%s left %d times", entry, n)
		}
		for inc, n := range r.declaredDead {
			check(t, n == 1, "%s was declared dead %d times", inc, n)
		}
		for key, set := range r.owned {
			check(t, len(set) == 0, "%s still owns %d", key, len(set))
		}
	})
}

// An entry that Redis refuses to end keeps the incarnation on the list of dead servers,
// and keeps nothing else from ending.
func TestRefusedEntries(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(ttl + time.Second)
		r.own(0, "old", 1000)
		bad := "old/0/7"
		r.do(func() { r.dead["old"], r.refuse = 1, bad })
		pass(2 * ttl)
		r.do(func() {
			check(t, len(r.left) == 999, "%d left", len(r.left))
			check(t, len(r.dead) == 1, "off the dead list")
			r.refuse = ""
		})
		pass(3 * ttl)
		endedOnce(t, r, 0, "old", 1000)
	})
}

// A list of dead servers that is lost during a cleanup comes back within two heartbeats.
// If the cleaning server dies too, others must find it.
func TestListOfTheDeadLost(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		r.own(0, "old", 10)
		r.do(func() { r.dead["old"] = 1 })
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(time.Second) // it waits for contact
		r.do(func() { clear(r.dead) })
		pass(2*ttl/3 + 100*time.Millisecond)
		r.do(func() {
			check(t, len(r.left) == 0, "cleaned up already")
			check(t, r.dead["old"] > 0, "not listed again: %v", r.dead)
		})
		pass(3 * ttl)
		endedOnce(t, r, 0, "old", 10)
		r.do(func() { check(t, len(r.dead) == 0, "still listed: %v", r.dead) })
	})
}

var _ Store = (*store.Store)(nil)
