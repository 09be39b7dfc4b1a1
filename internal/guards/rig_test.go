package guards

import (
	"context"
)

// allowed returns the answer to a question about a room.
func (c *Cache) allowed(ctx context.Context, conn string, member MemberFunc, room string) (bool, error) {
	d, err := c.Decide(ctx, conn, member, Question{Room: room})
	return d.OK, err
}

// keptInAll returns the number of answers that are kept.
func (c *Cache) keptInAll() (n int) {
	for _, answers := range c.all() {
		answers.mu.Lock()
		n += len(answers.kept)
		answers.mu.Unlock()
	}
	return n
}

// known returns the answer in force without asking a guard. It is not known if there is
// none yet, or if it is awaited.
func (c *Cache) known(conn string, member MemberFunc, room string) (allowed, known bool) {
	r := c.rules.Match(room)
	if !r.Tracked || len(r.guards) == 0 {
		return r.Tracked, true
	}
	_, version := member()
	answers := c.of(conn)
	if answers == nil {
		return false, true
	}
	q := Question{rule: r, meta: version}
	answers.mu.Lock()
	defer answers.mu.Unlock()
	a := answers.kept[room]
	if a == nil || a.invalid || !q.answeredBy(a) || !a.call.Done() || a.stale() {
		return false, false
	}
	return a.call.Err() == nil && a.ok, true
}
