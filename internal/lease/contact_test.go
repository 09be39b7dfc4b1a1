package lease

import (
	"testing"
	"time"
)

func TestOutageDeclaresNobodyDead(t *testing.T) {
	for name, outage := range map[string]func(k *link, away bool){
		"refused": func(k *link, away bool) { k.set(func() { k.cut = away }) },
		"hanging": func(k *link, away bool) { k.set(func() { k.hang = away }) },
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
				defer a.kill()
				defer b.kill()
				pass(25 * time.Second)
				outage(&a.link, true)
				outage(&b.link, true)
				pass(3 * ttl)
				outage(&a.link, false) // a comes back first
				pass(ttl / 2)
				outage(&b.link, false)
				pass(time.Minute)
				nobodyDeclaredDead(t, r, "a1", "b1")
				s := a.Stats()
				check(t, s.Failures > 3 && s.Reregistered == 0 && s.InContact, "%+v", s)
				a.view(func() {
					n := 0
					for _, renewed := range a.renewed {
						if renewed.Recovered {
							n++
						}
					}
					check(t, n == 1, "Recovered %d times", n)
				})
			})
		})
	}
}

func TestClockStepDeclaresNobodyDead(t *testing.T) {
	for name, step := range map[string]time.Duration{
		"forward": 30 * time.Second, "back": -30 * time.Second, "a bit": 2 * time.Second,
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
				defer a.kill()
				defer b.kill()
				pass(25 * time.Second)
				check(t, a.Stats().InContact, "no contact in time")
				r.step(step)
				pass(ttl / 2)
				s := a.Stats()
				check(t, s.ClockSteps > 0 && !s.InContact, "step not seen: %+v", s)
				pass(2 * ttl)
				nobodyDeclaredDead(t, r, "a1", "b1")
				check(t, a.Stats().InContact, "contact did not come back")
			})
		})
	}
}

// The script refuses a clock proof that was given before a clock step.
func TestClockStepBeforeDeclaringDead(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		pass(25 * time.Second)
		last := time.Now().Add(-b.Stats().LastRenewal)
		b.kill()
		time.Sleep(time.Until(last.Add(ttl - 5*time.Millisecond)))
		r.step(30 * time.Second)
		pass(ttl / 2)
		r.do(func() { check(t, len(r.declaredDead) == 0, "declared dead after a clock step") })
		check(t, a.Stats().ClockSteps > 0, "step not seen")
		pass(ttl)
		r.do(func() { check(t, r.declaredDead["b1"] == 1, "never declared dead") })
	})
}

func TestNoContactWithASlowedClock(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(25 * time.Second)
		r.do(func() { r.slowedAt = time.Now() })
		pass(ttl)
		for range 100 {
			pass(ttl / 10)
			check(t, !a.Stats().InContact, "contact with a clock at half speed")
		}
	})
}

func TestOneFailureEndsContact(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(25 * time.Second)
		a.set(func() { a.cut = true })
		for a.Stats().Failures == 0 {
			pass(10 * time.Millisecond)
		}
		a.set(func() { a.cut = false })
		pass(time.Second)
		check(t, a.Stats().Failures == 1 && a.Stats().LastRenewal < time.Second, "%+v", a.Stats())
		pass(ttl - 2*time.Second)
		check(t, !a.Stats().InContact, "contact within one TTL of a failure")
		pass(2 * time.Second)
		check(t, a.Stats().InContact, "contact did not come back")
	})
}

func TestResetContact(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(ttl + time.Second)
		_, ok := a.ClockProof()
		check(t, ok, "no contact in time")
		a.ResetContact()
		pass(ttl - 10*time.Millisecond)
		_, ok = a.ClockProof()
		check(t, !ok, "contact too early")
		pass(20 * time.Millisecond)
		_, ok = a.ClockProof()
		check(t, ok, "no contact after one TTL")
	})
}

func TestClockRefused(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(ttl + time.Second)
		a.ClockRefused(900 * time.Millisecond) // the call was slow: nothing is proved
		pass(time.Millisecond)
		check(t, a.Stats().InContact && a.Stats().LastRenewal < time.Second, "%+v", a.Stats())
		a.ClockRefused(100 * time.Millisecond)
		a.ClockRefused(100 * time.Millisecond) // another script met the same step
		check(t, !a.Stats().InContact && a.Stats().ClockSteps == 1, "%+v", a.Stats())
	})
}

// A lost contact interrupts a cleanup, which goes on after the contact is back.
func TestCleaningIsSuspended(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		b := newServer(t, r, "b").start()
		pass(25 * time.Second)
		r.own(0, "b1", 2000)
		b.kill()
		a.set(func() { a.cutAfterCleanUps = 5 })
		pass(ttl + time.Second)
		a.set(func() { a.cut = false })
		r.step(-20 * time.Second)
		pass(ttl / 2)
		before := 0
		r.do(func() { before = len(r.left) })
		check(t, before > 0 && before < 2000, "%d left", before)
		pass(ttl)
		endedOnce(t, r, 0, "b1", 2000)
		check(t, a.Stats().CleanedUp == 2000, "%+v", a.Stats())
	})
}

func TestContact(t *testing.T) {
	t.Parallel()
	base := time.Now()
	at := func(sec float64) time.Time { return base.Add(time.Duration(sec * float64(time.Second))) }
	// read is a renewal that was sent at the given second, took a while, and found the
	// clock off by some ms.
	read := func(sec, took float64, off int64) reading {
		return reading{sent: at(sec), got: at(sec + took), redis: at(sec+took/2).UnixMilli() + off}
	}
	regular := func(to float64, off int64) (rs []reading) {
		for sec := 0.0; sec <= to; sec += 3.3 {
			rs = append(rs, read(sec, 0.01, off))
		}
		return rs
	}
	for name, c := range map[string]struct {
		readings []reading
		off      int64 // of the clock in the end, ms
		at       float64
		ok       bool
		steps    uint64
	}{
		"none":              {at: 100},
		"too young":         {readings: regular(9, 0), at: 9.9},
		"old enough":        {readings: regular(13, 0), at: 13.5, ok: true},
		"clock far away":    {readings: regular(13, 5e9), off: 5e9, at: 13.5, ok: true},
		"last one too old":  {readings: regular(13, 0), at: 18.5},
		"a gap":             {readings: append(regular(7, 0), read(12, 0.01, 0)), at: 12.5},
		"a step":            {readings: append(regular(10, 0), read(13, 0.01, 1200)), at: 13.5, steps: 1},
		"within tolerance":  {readings: append(regular(10, 0), read(13, 0.01, 900)), at: 13.5, ok: true},
		"creeping":          {readings: append(regular(4, 0), read(6, 0.01, 700), read(10, 0.01, 1400)), at: 10.5, steps: 1},
		"slow one":          {readings: append(regular(10, 0), read(11, 1.9, 900)), at: 13.5, ok: true},
		"slow one, a step":  {readings: append(regular(10, 0), read(11, 1.9, -2900)), at: 13.5, steps: 1},
		"slow ones only":    {readings: []reading{read(0, 1.9, 0), read(4, 1.9, 0), read(8, 1.9, 0)}, at: 10.5},
		"slow ones at last": {readings: append(regular(10, 0), read(11, 1.9, 0), read(14, 1.9, 0)), at: 16},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			contact := newContact(ttl)
			for _, r := range c.readings {
				contact.note(r)
			}
			proof, ok := contact.proof(at(c.at))
			check(t, ok == c.ok, "contact: %v", ok)
			check(t, contact.stepCount() == c.steps, "%d steps", contact.stepCount())
			if ok {
				off := proof.Now - at(c.at).UnixMilli() - c.off
				check(t, max(off, -off) <= 1000, "expects the clock %d ms off", off)
				check(t, proof.Tolerance == time.Second, "tolerance %v", proof.Tolerance)
			}
		})
	}
}
