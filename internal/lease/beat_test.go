package lease

import (
	"testing"
	"time"
)

// The nodes of a cluster take beats in turn. Only one of them has the listener;
// what the others take comes back from there.
func TestBeatsOfACluster(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		r.robin = true
		a := newServer(t, r, "a").start()
		defer a.kill()
		back := 5 * time.Millisecond
		r.do(func() {
			r.hear["a1"] = func(beat string) { time.AfterFunc(back, func() { a.Heard(beat) }) }
		})
		a.view(func() { a.busy = true })
		judging := func() {
			for range 60 {
				pass(time.Second)
				check(t, a.Stats().Deaf == 0, "deaf %d times", a.Stats().Deaf)
				_, ok := a.Judge()
				check(t, ok, "may not judge")
			}
		}
		pass(ttl)
		judging()
		r.do(func() { back = doubtAfter + 100*time.Millisecond }) // it is known by now what the counts are worth
		judging()
		r.do(func() { delete(r.hear, "a1") }) // and still it is noticed where none comes back
		pass(beatEvery + deafAfter + 10*time.Millisecond)
		check(t, a.Stats().Deaf == 1, "deaf %d times", a.Stats().Deaf)
	})
}

// A new connection is where nobody listens yet.
func TestBeatsAfterALoss(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		a.view(func() { a.busy = true })
		pass(time.Minute)
		r.do(func() { delete(r.hear, "a1") })
		a.Suspend()
		a.Trust()
		sent := func() (n int) { r.do(func() { n = r.calls["publish"] }); return n }
		for before := sent(); sent() == before; {
			pass(time.Millisecond)
		}
		pass(doubtAfter + 10*time.Millisecond)
		a.listen("a1")
		pass(time.Minute)
		check(t, a.Stats().Deaf == 0, "deaf %d times", a.Stats().Deaf)
	})
}

// The renewal that says whose lease is about to run out may have come from
// another Redis than before: nobody is buried before that is known.
func TestBurialWaitsForABeat(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		pass(25 * time.Second)
		last := time.Now().Add(-b.Stats().LastRenewal)
		b.kill()
		time.Sleep(time.Until(last.Add(ttl - 50*time.Millisecond)))
		r.do(func() { delete(r.hear, "a1") })
		a.Doubt()
		pass(doubtAfter + deafAfter - 10*time.Millisecond)
		r.do(func() { check(t, len(r.burials) == 0, "buried: %v", r.burials) })
		check(t, a.Stats().Deaf == 1, "deaf %d times", a.Stats().Deaf)
		a.listen("a1")
		pass(2 * time.Second)
		r.do(func() { check(t, r.burials["b1"] == 1, "never buried") })
	})
}
