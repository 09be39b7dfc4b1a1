package sim

import (
	"slices"
	"strings"
	"time"
)

// deleteKeys deletes one or two keys, as an operator might. Everything must be restored
// within two heartbeats, without an update to subscribers. Facts that only Redis had
// are lost with their key: metadata that another server has just set, and, for a server
// with an expired hint, that an entry or a state has not run out.
func (s *sim) deleteKeys() bool {
	keys := s.admin.Keys(s.ctx, "mesh:*").Val()
	slices.Sort(keys)
	picked := 1 + s.rng.IntN(2)
	for range picked {
		if len(keys) == 0 {
			return false
		}
		// Choose the kind first, because most keys are keys of connections.
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

// kindOfKey returns the part of a key's name before the room, connection or
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
		// These keys list what has to be cleaned up after a server. The server restores
		// them, unless it dies or loses touch first. Then Redis has no trace of it.
		if s.active > 0 || now.Sub(s.killed) < s.recovery() {
			return
		}
		s.noKills, s.restoring = now.Add(s.recovery()), now.Add(s.lease)
	case "conn", "state":
		rest := strings.SplitN(key, ":", 4)[3]
		i := strings.LastIndexByte(rest, ':')
		if s.clients[rest[i+1:]] == nil {
			return // of a connection with a user
		}
		e := s.entry(simKey{rest[:i], rest[i+1:]})
		if kind == "conn" {
			e.reasons = append(e.reasons, &simReason{from: now, until: now.Add(s.lease), text: "the key was deleted"})
		} else {
			e.unsure = true
		}
	case "seq", "members":
		s.users.lost()
		// Members that are unconfirmed become so again, for the whole time.
		if now.After(s.restored) {
			s.restored = now
		}
	case "users", "kept", "recount":
		s.users.lost()
	case "connection-meta":
		if c := s.clients[key[strings.LastIndexByte(key, ':')+1:]]; c != nil {
			c.metaBad = true
		}
	}
	s.noted("an operator deletes %s", key)
	s.admin.Del(s.ctx, key)
}
