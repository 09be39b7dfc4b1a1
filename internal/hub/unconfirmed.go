package hub

import "time"

// askAfter is the time between two questions to the owners of unconfirmed members,
// and before the first one. Most members are written again before it.
const askAfter = time.Second

// unconfirmed is the set of unconfirmed members of a mirror. The zero value is
// empty.
type unconfirmed struct {
	until   map[string]time.Time // connection id -> end of its time; nil: empty
	checkAt time.Time            // the earliest of them; zero: none
	askAt   time.Time            // when to ask the owners next; zero: never
}

func (u *unconfirmed) empty() bool { return u.until == nil }

// has reports whether the member is unconfirmed, and the end of its time.
func (u *unconfirmed) has(conn string) (until time.Time, ok bool) {
	until, ok = u.until[conn]
	return until, ok
}

// mark adds a member for the time d. The caller calls schedule afterwards.
func (u *unconfirmed) mark(conn string, now time.Time, d time.Duration) {
	if u.until == nil {
		u.until = make(map[string]time.Time)
	}
	u.until[conn] = now.Add(d)
	if u.askAt.IsZero() {
		u.askAt = now.Add(askAfter)
	}
}

// remove removes a member. If others remain, the caller calls schedule afterwards
// or accepts that checkAt is too early.
func (u *unconfirmed) remove(conn string) {
	if u.until == nil {
		return
	}
	delete(u.until, conn)
	if len(u.until) == 0 {
		*u = unconfirmed{}
	}
}

// extend gives every member the time d from now on.
func (u *unconfirmed) extend(now time.Time, d time.Duration) {
	end := now.Add(d)
	for conn := range u.until {
		u.until[conn] = end
	}
	u.schedule()
}

// schedule sets checkAt.
func (u *unconfirmed) schedule() {
	u.checkAt = time.Time{}
	for _, until := range u.until {
		if u.checkAt.IsZero() || until.Before(u.checkAt) {
			u.checkAt = until
		}
	}
}
