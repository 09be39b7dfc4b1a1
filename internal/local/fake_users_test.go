package local

import (
	"fmt"
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// leave runs an OpLeave.
func (f *fakeStore) leave(w ownerKey, op store.Op) store.OpResult {
	h, ok := f.rooms[op.Room][op.Conn]
	delete(f.owned[w], store.EntryRef{Conn: op.Conn, Entry: op.Entry, Room: op.Room})
	switch {
	case !ok:
		return store.OpResult{Status: store.Gone}
	case h.entry != op.Entry:
		return store.OpResult{Status: store.Other}
	case h.kept() && (op.Keep || h.keptCause == op.Cause):
		return store.OpResult{Status: store.Done, KeptUntil: h.keptUntil.UnixMilli()}
	case !h.kept() && op.Keep && f.handOver(op.Room, op.Conn, op.Cause):
		return store.OpResult{Status: store.Done, KeptUntil: f.rooms[op.Room][op.Conn].keptUntil.UnixMilli()}
	}
	f.remove(op.Room, op.Conn, op.Cause)
	return store.OpResult{Status: store.Done}
}

// handOver makes a live entry a kept place, if its user has no other connection in the
// room.
func (f *fakeStore) handOver(room, conn string, cause store.Cause) bool {
	h := f.rooms[room][conn]
	if h.grace == 0 || f.live(room, h.user) != 1 {
		return false
	}
	for w, set := range f.owned {
		if w.inc == h.inc {
			delete(set, store.EntryRef{Conn: conn, Entry: h.entry, Room: room})
		}
	}
	h.inc, h.ttl, h.until, h.state = store.NoOwner, 0, time.Time{}, ""
	h.keptUntil, h.keptCause = time.Now().Add(h.grace), cause
	f.rooms[room][conn] = h
	f.tell(event{kind: store.Disconnected, room: room, conn: conn, entry: h.entry, cause: cause})
	return true
}

// live returns the number of connections of a user in a room.
func (f *fakeStore) live(room, user string) (n int) {
	for _, h := range f.rooms[room] {
		n += one(h.user == user && !h.kept())
	}
	return n
}

// keptPlace returns the connection of the kept place of a user, "" if there is none.
func (f *fakeStore) keptPlace(room, user string) string {
	if user == "" {
		return ""
	}
	for conn, h := range f.rooms[room] {
		if h.user == user && h.kept() {
			return conn
		}
	}
	return ""
}

// placeFor returns the connection whose place a join takes, and conn:incarnation of its
// entry.
func (f *fakeStore) placeFor(op store.Op) (place, took string) {
	h, ok := f.rooms[op.Room][op.Replaces]
	if ok && op.User != "" && h.user == op.User && op.Replaces != op.Conn && op.Rebuild == 0 {
		return op.Replaces, op.Replaces + ":" + h.inc
	}
	if place = f.keptPlace(op.Room, op.User); place == "" || place == op.Conn {
		return "", ""
	}
	return place, place + ":" + store.NoOwner
}

// vacate ends the entry of a connection whose place another one takes.
func (f *fakeStore) vacate(w ownerKey, room, conn string) {
	h := f.rooms[room][conn]
	if h.inc == w.inc {
		delete(f.owned[w], store.EntryRef{Conn: conn, Entry: h.entry, Room: room})
	}
	delete(f.rooms[room], conn)
	f.tell(event{kind: store.Left, room: room, conn: conn, entry: h.entry, cause: store.CauseReplaced})
}

// fullOf returns the bound that a join exceeds.
func (f *fakeStore) fullOf(op store.Op) store.Bound {
	members := f.rooms[op.Room]
	if op.Rebuild > 0 && op.User != "" {
		return ""
	}
	place, _ := f.placeFor(op)
	old, in := members[op.Conn]
	if op.MaxConnections > 0 && len(members) >= op.MaxConnections && !in && place == "" {
		return store.BoundConnections
	}
	if op.MaxUsers == 0 || f.users(op.Room) < op.MaxUsers {
		return ""
	}
	for _, h := range members {
		if op.User != "" && h.user == op.User {
			return ""
		}
	}
	if in && (old.user == op.User || old.user == "" || f.live(op.Room, old.user) == 1) {
		return ""
	}
	return store.BoundUsers
}

// users returns the number of users in a room.
func (f *fakeStore) users(room string) int {
	if !f.numbered[room] {
		return len(f.rooms[room])
	}
	users := make(map[string]bool)
	for conn, h := range f.rooms[room] {
		users[h.user+"/"+conn[:len(conn)*one(h.user == "")]] = true
	}
	return len(users)
}

// joined returns the answer to a join that has written the entry.
func (f *fakeStore) joined(op store.Op, took string) store.OpResult {
	r := store.OpResult{Status: store.Done, Position: f.position(op.Room), Total: len(f.rooms[op.Room]), Users: f.users(op.Room)}
	if op.Rebuild == 0 {
		r.Replaced, r.ReplacedOwner, _ = strings.Cut(took, ":")
	}
	return r
}

// endKept ends the kept places whose time is over, as servers do.
func (f *fakeStore) endKept() {
	for room, members := range f.rooms {
		for conn, h := range members {
			if h.kept() && !h.keptUntil.After(time.Now()) {
				f.remove(room, conn, causeCleanedUp)
			}
		}
	}
}

// unfair describes users that have a kept place beside a connection or another place.
func (f *fakeStore) unfair() (wrong []string) {
	for room, members := range f.rooms {
		places := make(map[string]int)
		for _, h := range members {
			places[h.user] += one(h.kept())
		}
		for user, n := range places {
			if n > 1 || n == 1 && f.live(room, user) > 0 {
				wrong = append(wrong, fmt.Sprintf("%s in %s: %d kept places and %d connections", user, room, n, f.live(room, user)))
			}
		}
	}
	return wrong
}
