package lease

import (
	"testing"
	"time"
)

func TestOutageBuriesNobody(t *testing.T) {
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
				nobodyBuried(t, r, "a1", "b1")
				s := a.Stats()
				check(t, s.Failures > 3 && s.Reborn == 0 && s.Patient, "%+v", s)
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

func TestClockStepBuriesNobody(t *testing.T) {
	for name, step := range map[string]time.Duration{
		"forward": 30 * time.Second, "back": -30 * time.Second, "a bit": 2 * time.Second,
	} {
		t.Run(name, func(t *testing.T) {
			sim(t, func(t *testing.T, r *redis) {
				a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
				defer a.kill()
				defer b.kill()
				pass(25 * time.Second)
				check(t, a.Stats().Patient, "not patient in time")
				r.step(step)
				pass(ttl / 2)
				s := a.Stats()
				check(t, s.ClockSteps > 0 && !s.Patient, "step not seen: %+v", s)
				pass(2 * ttl)
				nobodyBuried(t, r, "a1", "b1")
				check(t, a.Stats().Patient, "patience did not come back")
			})
		})
	}
}

// A judgment meets a clock that stepped after it was given: the script refuses.
func TestClockStepBeforeBurial(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a, b := newServer(t, r, "a").start(), newServer(t, r, "b").start()
		defer a.kill()
		pass(25 * time.Second)
		last := time.Now().Add(-b.Stats().LastRenewal)
		b.kill()
		time.Sleep(time.Until(last.Add(ttl - 5*time.Millisecond)))
		r.step(30 * time.Second)
		pass(ttl / 2)
		r.do(func() { check(t, len(r.burials) == 0, "buried by a stepped clock") })
		check(t, a.Stats().ClockSteps > 0, "step not seen")
		pass(ttl)
		r.do(func() { check(t, r.burials["b1"] == 1, "never buried") })
	})
}

func TestSlowedClockJudgesNobody(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(25 * time.Second)
		r.do(func() { r.slowedAt = time.Now() })
		pass(ttl)
		for range 100 {
			pass(ttl / 10)
			check(t, !a.Stats().Patient, "patient with a clock at half speed")
		}
	})
}

func TestOneFailureRestartsPatience(t *testing.T) {
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
		check(t, !a.Stats().Patient, "patient within one TTL of a failure")
		pass(2 * time.Second)
		check(t, a.Stats().Patient, "patience did not come back")
	})
}

func TestDistrust(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(ttl + time.Second)
		_, ok := a.Judge()
		check(t, ok, "not patient in time")
		a.Distrust()
		pass(ttl - 10*time.Millisecond)
		_, ok = a.Judge()
		check(t, !ok, "patient too early")
		pass(20 * time.Millisecond)
		_, ok = a.Judge()
		check(t, ok, "not patient after one TTL")
	})
}

func TestClockRefused(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		pass(ttl + time.Second)
		a.ClockRefused(900 * time.Millisecond) // the call dawdled: nothing is proved
		pass(time.Millisecond)
		check(t, a.Stats().Patient && a.Stats().LastRenewal < time.Second, "%+v", a.Stats())
		a.ClockRefused(100 * time.Millisecond)
		a.ClockRefused(100 * time.Millisecond) // another script met the same step
		check(t, !a.Stats().Patient && a.Stats().ClockSteps == 1, "%+v", a.Stats())
	})
}

// What a lost patience interrupts goes on when it is back.
func TestCleaningIsSuspended(t *testing.T) {
	sim(t, func(t *testing.T, r *redis) {
		a := newServer(t, r, "a").start()
		defer a.kill()
		b := newServer(t, r, "b").start()
		pass(25 * time.Second)
		r.own(0, "b1", 2000)
		b.kill()
		a.set(func() { a.reaps = 5 })
		pass(ttl + time.Second)
		a.set(func() { a.cut = false })
		r.step(-20 * time.Second)
		pass(ttl / 2)
		before := 0
		r.do(func() { before = len(r.left) })
		check(t, before > 0 && before < 2000, "%d left", before)
		pass(ttl)
		endedOnce(t, r, 0, "b1", 2000)
		check(t, a.Stats().Reaped == 2000, "%+v", a.Stats())
	})
}

func TestPatience(t *testing.T) {
	t.Parallel()
	base := time.Now()
	at := func(sec float64) time.Time { return base.Add(time.Duration(sec * float64(time.Second))) }
	// read is a renewal that was sent at a second, took a while, and found the
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
		judge    float64
		ok       bool
		steps    uint64
	}{
		"none":              {judge: 100},
		"too young":         {readings: regular(9, 0), judge: 9.9},
		"old enough":        {readings: regular(13, 0), judge: 13.5, ok: true},
		"clock far away":    {readings: regular(13, 5e9), off: 5e9, judge: 13.5, ok: true},
		"last one too old":  {readings: regular(13, 0), judge: 18.5},
		"a gap":             {readings: append(regular(7, 0), read(12, 0.01, 0)), judge: 12.5},
		"a step":            {readings: append(regular(10, 0), read(13, 0.01, 1200)), judge: 13.5, steps: 1},
		"within tolerance":  {readings: append(regular(10, 0), read(13, 0.01, 900)), judge: 13.5, ok: true},
		"creeping":          {readings: append(regular(4, 0), read(6, 0.01, 700), read(10, 0.01, 1400)), judge: 10.5, steps: 1},
		"slow one":          {readings: append(regular(10, 0), read(11, 1.9, 900)), judge: 13.5, ok: true},
		"slow one, a step":  {readings: append(regular(10, 0), read(11, 1.9, -2900)), judge: 13.5, steps: 1},
		"slow ones only":    {readings: []reading{read(0, 1.9, 0), read(4, 1.9, 0), read(8, 1.9, 0)}, judge: 10.5},
		"slow ones at last": {readings: append(regular(10, 0), read(11, 1.9, 0), read(14, 1.9, 0)), judge: 16},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPatience(ttl)
			for _, r := range c.readings {
				p.note(r)
			}
			j, ok := p.judge(at(c.judge))
			check(t, ok == c.ok, "judge: %v", ok)
			check(t, p.stepCount() == c.steps, "%d steps", p.stepCount())
			if ok {
				off := j.Now - at(c.judge).UnixMilli() - c.off
				check(t, max(off, -off) <= 1000, "expects the clock %d ms off", off)
				check(t, j.Tolerance == time.Second, "tolerance %v", j.Tolerance)
			}
		})
	}
}
