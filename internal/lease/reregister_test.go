package lease

import (
	"fmt"
	"testing"
	"time"
)

// A server that stalls past its lease, during a call or between two, is declared dead,
// and goes on under one new incarnation.
func TestStalledServerReregistersOnce(t *testing.T) {
	for name, stop := range map[string]func(s *server){
		"between calls": func(s *server) { s.stop() },
		// The answer says that it is alive, and is 30 s old when it is read.
		"in a call": func(s *server) {
			s.set(func() { s.latency = 400 * time.Millisecond })
			s.await()
			s.stop()
			s.set(func() { s.latency = 2 * time.Millisecond })
		},
		// The call fails because its deadline has passed.
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
					if len(b.reregistrations) != 1 || b.reregistrations[0].old != "b1" || b.reregistrations[0].new != "b2" || !b.reregistrations[0].stalled {
						t.Fatalf("reregistrations: %+v", b.reregistrations)
					}
					late := b.reregistrations[0].at.Sub(woke)
					check(t, late < 100*time.Millisecond, "reregistered after %v", late)
				})
				check(t, b.Incarnation() == "b2", "lives as %s", b.Incarnation())
				r.do(func() {
					check(t, r.declaredDead["b1"] == 1 && len(r.declaredDead) == 1, "declared dead: %v", r.declaredDead)
					check(t, len(r.dead) == 0, "dead list: %v", r.dead)
				})
			})
		})
	}
}

// A server stalls while it reregisters. The new incarnation is dead too after the stall,
// and is never reported.
func TestStallWhileReregistering(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(25 * time.Second)
		b.set(func() { b.latency = 400 * time.Millisecond })
		b.Fenced("b1")
		pass(time.Second) // declared dead and fenced; registering
		b.stop()
		pass(3 * ttl)
		r.do(func() { check(t, r.declaredDead["b2"] == 1, "declared dead: %v", r.declaredDead) })
		b.cont()
		pass(time.Minute)
		b.view(func() {
			check(t, len(b.reregistrations) == 1 && b.reregistrations[0].old == "b1" && b.reregistrations[0].new == "b3" && b.reregistrations[0].stalled,
				"reregistrations: %+v", b.reregistrations)
		})
	})
}

func TestStalledServersDeclareNobodyDead(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		b := newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(25 * time.Second)
		a.stop()
		b.stop()
		pass(3 * ttl)
		_, ok := a.ClockProof()
		check(t, !ok, "contact after a stall")
		a.cont()
		pass(ttl / 2)
		b.cont()
		pass(time.Minute)
		nobodyDeclaredDead(t, r, "a1", "b1")
		check(t, a.Stats().Reregistered+b.Stats().Reregistered == 0, "reregistered")
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
				check(t, len(s.reregistrations) == 1 && !s.reregistrations[0].stalled, "reregistrations: %+v", s.reregistrations)
			})
			check(t, !s.Stats().InContact, "contact at once")
		}
		pass(time.Minute)
		nobodyDeclaredDead(t, r, "a2", "b2")
		r.do(func() { check(t, len(r.dead) == 0, "dead list: %v", r.dead) })
	})
}

func TestFenced(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(time.Second)
		a.Fenced("another")
		pass(time.Second)
		check(t, a.Incarnation() == "a1", "reregistered for another incarnation")
		a.Fenced("a1")
		a.Fenced("a1")
		pass(10 * time.Millisecond)
		check(t, a.Incarnation() == "a2", "not reregistered at once")
		a.Fenced("a1")
		pass(time.Minute)
		check(t, a.Incarnation() == "a2" && a.Stats().Reregistered == 1, "reregistered again")
		r.do(func() {
			_, listed := r.instances["a1"]
			check(t, !listed && len(r.dead) == 0, "a1 is still listed")
		})
	})
}

// A server that was cut off but did not stall reregisters as soon as Redis is back.
func TestPartitionedServer(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		defer b.kill()
		pass(25 * time.Second)
		b.set(func() { b.hang = true })
		pass(2 * ttl)
		r.do(func() { check(t, r.declaredDead["b1"] == 1, "declared dead: %v", r.declaredDead) })
		check(t, b.Incarnation() == "b1", "reregistered without Redis")
		b.set(func() { b.hang = false })
		pass(5 * time.Second)
		b.view(func() {
			check(t, len(b.reregistrations) == 1 && !b.reregistrations[0].stalled, "reregistrations: %+v", b.reregistrations)
		})
	})
}

// Redis goes away while a server reregisters.
func TestReregistrationIsRepeated(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(time.Second)
		a.set(func() { a.cut = true })
		a.Fenced("a1")
		pass(time.Minute)
		check(t, a.Incarnation() == "a1", "reregistered without Redis")
		a.set(func() { a.cut = false })
		pass(2 * time.Second)
		a.view(func() {
			check(t, len(a.reregistrations) == 1 && a.reregistrations[0].old == "a1", "reregistrations: %+v", a.reregistrations)
		})
		pass(time.Minute)
		r.do(func() { check(t, len(r.instances) == 1 && len(r.dead) == 0, "%v %v", r.instances, r.dead) })
	})
}

func TestSilentListener(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		a.view(func() { a.watching = true })
		pass(time.Minute)
		a.view(func() { check(t, a.resets == 0, "%d listener resets", a.resets); a.deaf = true })
		pass(3*time.Second + 100*time.Millisecond)
		a.view(func() { check(t, a.resets == 1, "%d listener resets", a.resets) })
		pass(time.Minute) // reported again while it stays silent, more and more rarely
		a.view(func() { check(t, a.resets > 2 && a.resets < 7, "%d listener resets", a.resets); a.deaf = false })
		pass(10 * time.Second)
		n := a.Stats().ListenerResets
		pass(time.Minute)
		check(t, a.Stats().ListenerResets == n, "another listener reset")
		a.EchoReceived("something else")
		a.EchoReceived(echoPrefix + "x")
		a.EchoReceived(fmt.Sprint(echoPrefix, 1<<40))
		check(t, IsEcho(echoPrefix+"1") && !IsEcho("x"), "IsEcho")
	})
}

// After a failover commands find the new master while the listener stays at the old one.
// The first echo without a receiver that does not come back is reported, and there is no
// contact until it is known which Redis this is.
func TestListenerAtAnotherRedis(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		a.view(func() { a.watching = true })
		pass(time.Minute)
		_, ok := a.ClockProof()
		check(t, ok, "no contact after a minute")
		r.do(func() { delete(r.hear, "a1") })
		pass(echoInterval + unheardTimeout + 10*time.Millisecond)
		a.view(func() { check(t, a.resets == 1, "%d listener resets", a.resets) })
		_, ok = a.ClockProof()
		check(t, !ok, "contact with what may be another Redis")
		a.listen("a1")
		pass(echoTimeout)
		_, ok = a.ClockProof()
		check(t, ok, "it was the same")
		pass(time.Minute)
		a.view(func() { check(t, a.resets == 1, "%d listener resets", a.resets) })

		// A listener that is known to be disconnected is not reset.
		a.Suspend()
		r.do(func() { delete(r.hear, "a1") })
		pass(echoInterval + unheardTimeout + 10*time.Millisecond)
		a.view(func() { check(t, a.resets == 1, "%d listener resets", a.resets) })
		check(t, a.Stats().ListenerResets == 1, "%d listener resets", a.Stats().ListenerResets)
		pass(2*echoInterval + echoTimeout) // but not forever
		a.view(func() { check(t, a.resets == 2, "%d listener resets", a.resets) })
	})
}

// If Redis or a proxy never counts receivers, a count of zero means nothing.
func TestListenersNotCounted(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		r.uncounted = true
		a := newServer(t, r, "a").start()
		defer a.kill()
		a.view(func() { a.watching = true })
		pass(time.Minute)
		a.view(func() { check(t, a.resets == 0, "%d listener resets", a.resets) })
	})
}

func TestEchoEachSecondWhileWatching(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(30 * time.Second)
		r.do(func() { check(t, r.calls["publish"] == 0, "an idle server sends echoes") })
		a.view(func() { a.watching = true })
		pass(30 * time.Second)
		r.do(func() { check(t, r.calls["publish"] >= 18, "%d extra echoes", r.calls["publish"]) })
	})
}
