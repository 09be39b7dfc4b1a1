package lease

import (
	"fmt"
	"testing"
	"time"
)

// A process that stands still past its lease, here in the middle of a call,
// there between two, is buried, and lives again under one new name.
func TestPausedServerIsRebornOnce(t *testing.T) {
	for name, stop := range map[string]func(s *server){
		"between calls": func(s *server) { s.stop() },
		// The answer says that it lives, and is 30 s old when it is read.
		"in a call": func(s *server) {
			s.set(func() { s.latency = 400 * time.Millisecond })
			s.await()
			s.stop()
			s.set(func() { s.latency = 2 * time.Millisecond })
		},
		// The call fails for its deadline has passed.
		"in a failing call": func(s *server) {
			s.set(func() { s.latency = 5 * time.Second })
			s.await()
			s.stop()
			s.set(func() { s.latency = 2 * time.Millisecond })
		},
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
				defer a.kill()
				defer b.kill()
				r.own(0, "b1", 50)
				pass(25 * time.Second)
				stop(b)
				pass(3 * ttl)
				endedOnce(t, r, 0, "b1", 50)
				woke := time.Now()
				b.cont()
				pass(time.Minute)
				b.view(func() {
					if len(b.births) != 1 || b.births[0].old != "b1" || b.births[0].new != "b2" || !b.births[0].stalled {
						t.Fatalf("births: %+v", b.births)
					}
					late := b.births[0].at.Sub(woke)
					check(t, late < 100*time.Millisecond, "reborn after %v", late)
				})
				check(t, b.Incarnation() == "b2", "lives as %s", b.Incarnation())
				r.do(func() {
					check(t, r.burials["b1"] == 1 && len(r.burials) == 1, "burials: %v", r.burials)
					check(t, len(r.dead) == 0, "dead list: %v", r.dead)
				})
			})
		})
	}
}

// It stands still while it registers anew: that incarnation is dead, too, when
// it wakes, and the owner never hears of it.
func TestPausedWhileBeingReborn(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(25 * time.Second)
		b.set(func() { b.latency = 400 * time.Millisecond })
		b.Fenced("b1")
		pass(time.Second) // declared dead and locked out; registering
		b.stop()
		pass(3 * ttl)
		r.do(func() { check(t, r.burials["b2"] == 1, "burials: %v", r.burials) })
		b.cont()
		pass(time.Minute)
		b.view(func() {
			check(t, len(b.births) == 1 && b.births[0].old == "b1" && b.births[0].new == "b3" && b.births[0].stalled,
				"births: %+v", b.births)
		})
	})
}

func TestPausedJudgeJudgesNobody(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		b := newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(25 * time.Second)
		a.stop()
		b.stop()
		pass(3 * ttl)
		_, ok := a.Judge()
		check(t, !ok, "may judge after standing still")
		a.cont()
		pass(ttl / 2)
		b.cont()
		pass(time.Minute)
		nobodyBuried(t, r, "a1", "b1")
		check(t, a.Stats().Reborn+b.Stats().Reborn == 0, "reborn")
	})
}

func TestFlushedRedis(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(25 * time.Second)
		r.flush()
		pass(ttl/3 + 200*time.Millisecond)
		for _, s := range []*server{a, b} {
			s.view(func() {
				check(t, len(s.births) == 1 && !s.births[0].stalled, "births: %+v", s.births)
			})
			check(t, !s.Stats().Patient, "patient at once")
		}
		pass(time.Minute)
		nobodyBuried(t, r, "a2", "b2")
		r.do(func() { check(t, len(r.dead) == 0, "dead list: %v", r.dead) })
	})
}

func TestFenced(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(time.Second)
		a.Fenced("somebody else")
		pass(time.Second)
		check(t, a.Incarnation() == "a1", "reborn for somebody else")
		a.Fenced("a1")
		a.Fenced("a1")
		pass(10 * time.Millisecond)
		check(t, a.Incarnation() == "a2", "not reborn at once")
		a.Fenced("a1")
		pass(time.Minute)
		check(t, a.Incarnation() == "a2" && a.Stats().Reborn == 1, "reborn again")
		r.do(func() {
			_, listed := r.instances["a1"]
			check(t, !listed && len(r.dead) == 0, "a1 is still listed")
		})
	})
}

// A server that was cut off, while it ran, joins its sockets anew at once.
func TestPartitionedServer(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(25 * time.Second)
		b.set(func() { b.hang = true })
		pass(2 * ttl)
		r.do(func() { check(t, r.burials["b1"] == 1, "burials: %v", r.burials) })
		check(t, b.Incarnation() == "b1", "reborn without Redis")
		b.set(func() { b.hang = false })
		pass(5 * time.Second)
		b.view(func() { check(t, len(b.births) == 1 && !b.births[0].stalled, "births: %+v", b.births) })
	})
}

// Redis goes away while a server is being reborn.
func TestRebirthIsRepeated(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(time.Second)
		a.set(func() { a.cut = true })
		a.Fenced("a1")
		pass(time.Minute)
		check(t, a.Incarnation() == "a1", "reborn without Redis")
		a.set(func() { a.cut = false })
		pass(2 * time.Second)
		a.view(func() { check(t, len(a.births) == 1 && a.births[0].old == "a1", "births: %+v", a.births) })
		pass(time.Minute)
		r.do(func() { check(t, len(r.instances) == 1 && len(r.dead) == 0, "%v %v", r.instances, r.dead) })
	})
}

func TestDeafListener(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		a.view(func() { a.busy = true })
		pass(time.Minute)
		a.view(func() { check(t, a.deafs == 0, "deaf %d times", a.deafs); a.deaf = true })
		pass(3*time.Second + 100*time.Millisecond)
		a.view(func() { check(t, a.deafs == 1, "deaf %d times", a.deafs) })
		pass(time.Minute) // it stays deaf: told again, ever more rarely
		a.view(func() { check(t, a.deafs > 2 && a.deafs < 7, "deaf %d times", a.deafs); a.deaf = false })
		pass(10 * time.Second)
		n := a.Stats().Deaf
		pass(time.Minute)
		check(t, a.Stats().Deaf == n, "deaf again")
		a.Heard("something else")
		a.Heard(beatPrefix + "x")
		a.Heard(fmt.Sprint(beatPrefix, 1<<40))
		check(t, IsBeat(beatPrefix+"1") && !IsBeat("x"), "IsBeat")
	})
}

// After a failover commands find the new master while the listener stays at the
// old one: the first beat that finds nobody, and does not come back, tells, and
// nobody is judged until it is known which Redis this is.
func TestListenerAtAnotherRedis(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		a.view(func() { a.busy = true })
		pass(time.Minute)
		_, ok := a.Judge()
		check(t, ok, "no judgment after a minute")
		r.do(func() { delete(r.hear, "a1") })
		pass(beatEvery + doubtAfter + 10*time.Millisecond)
		a.view(func() { check(t, a.deafs == 1, "deaf %d times", a.deafs) })
		_, ok = a.Judge()
		check(t, !ok, "judges what may be another Redis")
		a.listen("a1")
		pass(deafAfter)
		_, ok = a.Judge()
		check(t, ok, "it was the same")
		pass(time.Minute)
		a.view(func() { check(t, a.deafs == 1, "deaf %d times", a.deafs) })

		// A listener that is known to be without connection is left alone.
		a.Suspend()
		r.do(func() { delete(r.hear, "a1") })
		pass(beatEvery + doubtAfter + 10*time.Millisecond)
		a.view(func() { check(t, a.deafs == 1, "deaf %d times", a.deafs) })
		check(t, a.Stats().Deaf == 1, "counted as deaf %d times", a.Stats().Deaf)
		pass(2*beatEvery + deafAfter) // but not for ever
		a.view(func() { check(t, a.deafs == 2, "deaf %d times", a.deafs) })
	})
}

// Where Redis, or what stands before it, never counts listeners, that it says
// none means nothing.
func TestListenersNotCounted(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		r.uncounted = true
		a := newServer(t, r, "a").start()
		defer a.kill()
		a.view(func() { a.busy = true })
		pass(time.Minute)
		a.view(func() { check(t, a.deafs == 0, "deaf %d times", a.deafs) })
	})
}

func TestBusyServerBeatsEachSecond(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(30 * time.Second)
		r.do(func() { check(t, r.calls["publish"] == 0, "an idle server beats") })
		a.view(func() { a.busy = true })
		pass(30 * time.Second)
		r.do(func() { check(t, r.calls["publish"] >= 18, "%d extra beats", r.calls["publish"]) })
	})
}
