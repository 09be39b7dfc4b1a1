package owner

import "time"

// Rooms returns the rooms that connections of this server are in.
func (o *Owner) Rooms() []string {
	o.roomsMu.RLock()
	defer o.roomsMu.RUnlock()
	list := make([]string, 0, len(o.rooms))
	for room := range o.rooms {
		list = append(list, room)
	}
	return list
}

// Retime asks the rules again about the entries in some rooms: they have changed.
func (o *Owner) Retime(rooms []string) {
	about := make(map[*Conn][]string)
	for _, room := range rooms {
		for _, c := range o.InRoom(room) {
			about[c] = append(about[c], room)
		}
	}
	for c, rooms := range about {
		c.retime(rooms)
	}
}

func (c *Conn) retime(rooms []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, room := range rooms {
		e := c.entries[room]
		if e == nil || !e.want {
			continue // it asks the rules when it is joined again
		}
		e.repace(c.o.cfg.StateInterval(e.room))
		if ttl := c.o.cfg.TTL(e.room); ttl != e.ttl {
			if e.ttl == 0 {
				e.since = time.Since(c.o.born)
			}
			e.ttl, e.refresh = ttl, true
			e.armLife()
			e.changed(e.restoring())
		}
	}
	c.ttlChanged()
}
