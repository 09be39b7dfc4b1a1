package local

import "time"

// Rooms returns the rooms that connections of this server are in.
func (r *Registry) Rooms() []string {
	r.roomsMu.RLock()
	defer r.roomsMu.RUnlock()
	list := make([]string, 0, len(r.rooms))
	for room := range r.rooms {
		list = append(list, room)
	}
	return list
}

// ApplyRules applies changed rules to the entries in some rooms.
func (r *Registry) ApplyRules(rooms []string) {
	about := make(map[*Conn][]string)
	for _, room := range rooms {
		for _, c := range r.InRoom(room) {
			about[c] = append(about[c], room)
		}
	}
	for c, rooms := range about {
		c.applyRules(rooms)
	}
}

func (c *Conn) applyRules(rooms []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, room := range rooms {
		e := c.entries[room]
		if e == nil || !e.wanted() {
			continue // the next join applies the rules
		}
		e.setInterval(c.registry.cfg.StateInterval(e.room))
		if ttl := c.registry.cfg.TTL(e.room); ttl != e.ttl {
			if e.ttl == 0 {
				e.idleFrom = time.Since(c.registry.madeAt)
			}
			e.ttl, e.refresh = ttl, true
			e.armTTL()
			e.changed(e.restoring())
		}
		if grace := e.ruleGrace(); grace != e.grace() {
			e.setGrace(grace)
			e.personal = true
			e.changed(background)
		}
	}
	c.ttlChanged()
}
