package mesh

// What tests ask that nobody else does.

// known returns the verdict in force without asking anybody: known is false
// where there is none yet, or where it is under way.
func (v *verdicts) known(conn string, member memberFunc, room string) (allowed, known bool) {
	r := v.rules.match(room)
	if !r.tracked || len(r.guards) == 0 {
		return r.tracked, true
	}
	_, version := member()
	c := v.of(conn)
	if c == nil {
		return false, true
	}
	q := question{rule: r, meta: version}
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.kept[room]
	if a == nil || a.void || !q.answeredBy(a) || !a.call.done() || a.stale() {
		return false, false
	}
	return a.call.err == nil && a.ok, true
}

// left returns how many callbacks are running.
func (c *callbacks) left() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.running
}
