package sim

import (
	"slices"
	"strings"
	"time"
)

// deleteKeys is an operator who deletes one or two keys. Everything is as it was
// within two heartbeats, and subscribers get no event. Facts that only Redis knew
// are lost with their key: metadata that another server has just set, and that an entry or a
// state is still alive, to a server that has heard it has run out.
func (s *sim) deleteKeys() bool {
	keys := s.admin.Keys(s.ctx, "mesh:*").Val()
	slices.Sort(keys)
	picked := 1 + s.rng.IntN(2)
	for range picked {
		if len(keys) == 0 {
			return false
		}
		// A kind of key first: there are many more keys of connections than others.
		kinds := make(map[string][]string)
		var names []string
		for _, key := range keys {
			kind := kindOfKey(key)
			if kinds[kind] == nil {
				names = append(names, kind)
			}
			kinds[kind] = append(kinds[kind], key)
		}
		list := kinds[names[s.rng.IntN(len(names))]]
		key := list[s.rng.IntN(len(list))]
		keys = slices.DeleteFunc(keys, func(k string) bool { return k == key })
		s.deleteKey(key)
	}
	s.disturb(s.recovery(), nil)
	return true
}

// kindOfKey is what stands in a key's name before the room, connection or
// incarnation.
func kindOfKey(key string) string {
	parts := strings.SplitN(key, ":", 4)
	if parts[1] == "presence" {
		return parts[2]
	}
	return parts[1]
}

func (s *sim) deleteKey(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	kind, now := kindOfKey(key), time.Now()
	switch kind {
	case "instances", "owned", "dead":
		// These say what has to be cleaned up after a server. It restores them, unless
		// it dies or loses touch first: then nothing in Redis tells of it any more.
		if s.active > 0 || now.Sub(s.killed) < s.recovery() {
			return
		}
		s.noKills, s.restoring = now.Add(s.recovery()), now.Add(s.lease)
	case "conn", "state":
		rest := strings.SplitN(key, ":", 4)[3]
		i := strings.LastIndexByte(rest, ':')
		e := s.entry(simKey{rest[:i], rest[i+1:]})
		if kind == "conn" {
			e.tickets = append(e.tickets, &simTicket{from: now, until: now.Add(s.lease), why: "its key was deleted"})
		} else {
			e.unsure = true
		}
	case "seq", "members":
		// Members that mirrors are in doubt about are in doubt for once more as long.
		if now.After(s.ghosts) {
			s.ghosts = now
		}
	case "connection-meta":
		if c := s.clients[key[strings.LastIndexByte(key, ':')+1:]]; c != nil {
			c.metaBad = true
		}
	}
	s.noted("an operator deletes %s", key)
	s.admin.Del(s.ctx, key)
}
