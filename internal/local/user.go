package local

import "sync"

// connUser is the user of a connection. It exists only if there is Config.UserOf.
type connUser struct {
	asking sync.Mutex // held while UserOf runs, without Conn.mu, so once for each version of the metadata
	id     string     // "": none; guarded by Conn.mu
}

// User returns the user of the connection, "" if it has none.
func (c *Conn) User() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.userID()
}

// userID is User with the lock held.
func (c *Conn) userID() string {
	if c.user == nil {
		return ""
	}
	return c.user.id
}

// setUser gives the connection a user, and moves its entries to it. It reports whether
// the connection belonged to another user before. c.mu is held.
func (c *Conn) setUser(id string) (moved bool) {
	if c.user == nil || c.user.id == id {
		return false
	}
	moved = c.user.id != ""
	c.user.id = id
	for _, e := range c.entries {
		if e.wanted() {
			e.setGrace(e.ruleGrace())
			e.personal = true
		}
	}
	return moved
}
