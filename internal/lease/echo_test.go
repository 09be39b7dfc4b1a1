package lease

import (
	"testing"
	"time"
)

// The nodes of a cluster take echoes in turn. Only one of them has the listener, and
// echoes that the others take come back from there.
func TestEchoesOfACluster(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		r.roundRobin = true
		a := newServer(t, r, "a").start()
		defer a.kill()
		back := 5 * time.Millisecond
		r.do(func() {
			r.hear["a1"] = func(echo string) { time.AfterFunc(back, func() { a.EchoReceived(echo) }) }
		})
		a.view(func() { a.watching = true })
		expectContact := func() {
			for range 60 {
				pass(time.Second)
				check(t, a.Stats().ListenerResets == 0, "%d listener resets", a.Stats().ListenerResets)
				_, ok := a.ClockProof()
				check(t, ok, "no contact")
			}
		}
		pass(ttl)
		expectContact()
		r.do(func() { back = unheardTimeout + 100*time.Millisecond }) // the counts are known to be wrong by now
		expectContact()
		r.do(func() { delete(r.hear, "a1") }) // a lost echo is still noticed
		pass(echoInterval + echoTimeout + 10*time.Millisecond)
		check(t, a.Stats().ListenerResets == 1, "%d listener resets", a.Stats().ListenerResets)
	})
}

// A new connection of the listener begins without a receiver.
func TestEchoesAfterADisconnect(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		a.view(func() { a.watching = true })
		pass(time.Minute)
		r.do(func() { delete(r.hear, "a1") })
		a.Suspend()
		a.Resume()
		sent := func() (n int) { r.do(func() { n = r.calls["publish"] }); return n }
		for before := sent(); sent() == before; {
			pass(time.Millisecond)
		}
		pass(unheardTimeout + 10*time.Millisecond)
		a.listen("a1")
		pass(time.Minute)
		check(t, a.Stats().ListenerResets == 0, "%d listener resets", a.Stats().ListenerResets)
	})
}

// The renewal that named the candidate may have reached another Redis than before. No
// server is declared dead before that is known.
func TestDeclaringDeadWaitsForAnEcho(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		pass(25 * time.Second)
		last := time.Now().Add(-b.Stats().LastRenewal)
		b.kill()
		time.Sleep(time.Until(last.Add(ttl - 50*time.Millisecond)))
		r.do(func() { delete(r.hear, "a1") })
		a.RenewNow()
		pass(unheardTimeout + echoTimeout - 10*time.Millisecond)
		r.do(func() { check(t, len(r.declaredDead) == 0, "declared dead: %v", r.declaredDead) })
		check(t, a.Stats().ListenerResets == 1, "%d listener resets", a.Stats().ListenerResets)
		a.listen("a1")
		pass(2 * time.Second)
		r.do(func() { check(t, r.declaredDead["b1"] == 1, "never declared dead") })
	})
}
