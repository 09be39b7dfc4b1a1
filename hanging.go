package mesh

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
)

// hanging counts, for each rule, the calls of its guards that go on after their
// verdict was given or called off. A rule whose guards hang has a budget of its
// own, so it does not affect the guards of other rules.
type hanging struct {
	all atomic.Int64 // of all rules

	mu     sync.Mutex // guards byRule
	byRule map[string]int
}

func (h *hanging) add(rule string, by int) {
	h.all.Add(int64(by))
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.byRule == nil {
		h.byRule = make(map[string]int)
	}
	if h.byRule[rule] += by; h.byRule[rule] == 0 {
		delete(h.byRule, rule)
	}
}

func (h *hanging) of(rule string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.byRule[rule]
}

// budgetError says that a guard was not asked because too many calls of its
// rule's guards hang. It is an ErrBusy.
type budgetError struct {
	rule   string
	ofConn bool // too many of them are about this connection
}

func (e *budgetError) Error() string {
	return fmt.Sprintf("%v: too many guards of the rule %s hang", ErrBusy, e.rule)
}

func (e *budgetError) Unwrap() error { return ErrBusy }

// admit returns a *budgetError if too many guards of one of the rules hang. The
// caller holds c.mu and calls exhausted later, without it.
func (v *verdicts) admit(c *connVerdicts, rules []string) *budgetError {
	all := v.hanging.all.Load()
	if all == 0 {
		return nil
	}
	for _, rule := range rules {
		switch {
		case v.hanging.of(rule) >= straysAll, all >= straysTotal:
			return &budgetError{rule: rule}
		case c.strays[rule] >= straysPerConn:
			return &budgetError{rule: rule, ofConn: true}
		}
	}
	return nil
}

// exhausted logs that a rule's budget is used up. A line about one connection is
// logged at Debug.
func (v *verdicts) exhausted(e *budgetError) {
	level, text := slog.LevelWarn, "mesh: guards are not asked: too many calls of the rule's guards hang"
	if e.ofConn {
		level, text = slog.LevelDebug, "mesh: guards are not asked: too many calls about the connection hang"
	}
	v.calls.log.As(level, text+e.rule, text, slog.String("rule", e.rule))
}

// noteStray counts guards that go on although no caller waits for them, for the
// rule of the guard that runs now. The caller holds c.mu.
func (v *verdicts) noteStray(c *connVerdicts, a *verdict) {
	if a.ended || a.stray {
		return
	}
	a.stray, a.rule = true, a.of[a.at.Load()]
	if c.strays == nil {
		c.strays = make(map[string]int)
	}
	c.strays[a.rule]++
	v.hanging.add(a.rule, 1)
}

// guardsEnded accounts for guards that have returned.
func (v *verdicts) guardsEnded(c *connVerdicts, a *verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a.ended = true
	if !a.stray {
		return
	}
	a.stray = false
	if c.strays[a.rule]--; c.strays[a.rule] == 0 {
		delete(c.strays, a.rule)
	}
	v.hanging.add(a.rule, -1)
}
