package guards

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/errs"
)

// hanging counts the guards that hang, for each rule. A rule whose guards hang has its own
// budget, so it does not affect the guards of other rules.
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

// budgetError says that a guard was not asked because too many guards of its rule hang.
type budgetError struct {
	rule   string
	ofConn bool // too many of them are about this connection
}

func (e *budgetError) Error() string {
	return fmt.Sprintf("%v: too many guards of the rule %s hang", errs.Busy, e.rule)
}

func (e *budgetError) Unwrap() error { return errs.Busy }

// admit returns an error if too many guards of one of the rules hang. The caller holds
// answers.mu, and calls logBudget later, without it.
func (c *Cache) admit(answers *connAnswers, rules []string) *budgetError {
	all := c.hanging.all.Load()
	if all == 0 {
		return nil
	}
	for _, rule := range rules {
		switch {
		case c.hanging.of(rule) >= maxHangingPerRule, all >= maxHanging:
			return &budgetError{rule: rule}
		case answers.hanging[rule] >= maxHangingPerConn:
			return &budgetError{rule: rule, ofConn: true}
		}
	}
	return nil
}

// logBudget logs that the budget of a rule is used up. A line about one connection has
// level Debug.
func (c *Cache) logBudget(e *budgetError) {
	level, text := slog.LevelWarn, "mesh: guards are not asked: too many calls of the rule's guards hang"
	if e.ofConn {
		level, text = slog.LevelDebug, "mesh: guards are not asked: too many calls about the connection hang"
	}
	c.calls.Log().As(level, text+e.rule, text, slog.String("rule", e.rule))
}

// noteHanging counts guards that go on although no caller waits for them, for the rule of
// the guard that runs now. The caller holds answers.mu.
func (c *Cache) noteHanging(answers *connAnswers, a *Answer) {
	if a.ended || a.hanging {
		return
	}
	a.hanging, a.rule = true, a.of[a.at.Load()]
	if answers.hanging == nil {
		answers.hanging = make(map[string]int)
	}
	answers.hanging[a.rule]++
	c.hanging.add(a.rule, 1)
}

// guardsEnded notes that guards have returned.
func (c *Cache) guardsEnded(answers *connAnswers, a *Answer) {
	answers.mu.Lock()
	defer answers.mu.Unlock()
	a.ended = true
	if !a.hanging {
		return
	}
	a.hanging = false
	if answers.hanging[a.rule]--; answers.hanging[a.rule] == 0 {
		delete(answers.hanging, a.rule)
	}
	c.hanging.add(a.rule, -1)
}
