package local

import (
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

func (f *fakeStore) execute(w ownerKey, op store.Op) store.OpResult {
	switch op.Kind {
	case store.OpConnect:
		return f.connect(w, op)
	case store.OpDisconnect:
		delete(f.owned[w], store.EntryRef{Conn: op.Conn})
		if f.conns[op.Conn].Owner == w.inc {
			delete(f.conns, op.Conn)
		}
		return store.OpResult{Status: store.Done}
	case store.OpJoin:
		return f.join(w, op)
	case store.OpRecount:
		return f.recount(w, op)
	case store.OpTouch:
		return store.OpResult{Status: store.Done}
	case store.OpLeave:
		return f.leave(w, op)
	}
	return f.update(w, op)
}

func (f *fakeStore) connect(w ownerKey, op store.Op) store.OpResult {
	if f.owned[w] == nil {
		f.owned[w] = make(map[store.EntryRef]bool)
	}
	f.owned[w][store.EntryRef{Conn: op.Conn}] = true
	old, ok := f.conns[op.Conn]
	if op.Fresh && ok && old.Owner != w.inc {
		f.conns[op.Conn] = store.MetaValue{Version: old.Version + 1, Data: op.Meta, Owner: w.inc}
		return store.OpResult{Status: store.Done, MetaVersion: old.Version + 1, Meta: op.Meta}
	}
	if old.Version > op.MetaVersion {
		old.Owner = w.inc
		f.conns[op.Conn] = old
		return store.OpResult{Status: store.Done, MetaVersion: old.Version, Meta: old.Data}
	}
	f.conns[op.Conn] = store.MetaValue{Version: op.MetaVersion, Data: op.Meta, Owner: w.inc}
	return store.OpResult{Status: store.Done}
}

func (f *fakeStore) join(w ownerKey, op store.Op) store.OpResult {
	f.numbered[op.Room] = f.numbered[op.Room] || op.User != ""
	if of := f.fullOf(op); of != "" {
		return store.OpResult{Status: store.Full, FullOf: of}
	}
	old, replaced := f.rooms[op.Room][op.Conn]
	if replaced && old.entry == op.Entry && !old.kept() {
		op.Person = true
		f.update(w, op)
		return f.joined(op, old.took)
	}
	if replaced && old.user != op.User {
		if old.inc == w.inc {
			delete(f.owned[w], store.EntryRef{Conn: op.Conn, Entry: old.entry, Room: op.Room})
		}
		f.remove(op.Room, op.Conn, causeCleanedUp)
		replaced = false
	}
	place, took := f.placeFor(op)
	back := replaced && old.kept()
	if back {
		took = op.Conn + ":" + store.NoOwner
	}
	if op.Rebuild > 0 {
		took = ""
	}
	h := storedEntry{
		user: op.User, grace: op.Grace, took: took,
		entry: op.Entry, inc: w.inc, ttl: op.TTL, metaVersion: op.MetaVersion, meta: string(op.Meta),
		stateVersion: op.StateVersion, state: string(op.State), silent: op.StateSilent,
	}
	if op.TTL > 0 {
		h.until = time.Now().Add(op.Left)
	}
	if f.rooms[op.Room] == nil {
		f.rooms[op.Room] = make(map[string]storedEntry)
	}
	f.rooms[op.Room][op.Conn] = h
	if f.owned[w] == nil {
		f.owned[w] = make(map[store.EntryRef]bool)
	}
	if replaced && old.inc == w.inc {
		delete(f.owned[w], store.EntryRef{Conn: op.Conn, Entry: old.entry, Room: op.Room})
	}
	f.owned[w][store.EntryRef{Conn: op.Conn, Entry: op.Entry, Room: op.Room}] = true
	kind := store.Joined
	if replaced && !back {
		kind = store.Replaced
	}
	f.tell(event{kind: kind, room: op.Room, conn: op.Conn, entry: op.Entry, state: h.state, back: back})
	if place != "" {
		f.vacate(w, op.Room, place)
	}
	return f.joined(op, took)
}

func (f *fakeStore) update(w ownerKey, op store.Op) store.OpResult {
	h, ok := f.rooms[op.Room][op.Conn]
	switch {
	case !ok:
		return store.OpResult{Status: store.Gone}
	case h.entry != op.Entry && h.inc == w.inc || h.kept():
		return store.OpResult{Status: store.Gone}
	case h.entry != op.Entry:
		return store.OpResult{Status: store.Other, Owner: h.inc}
	}
	user := h.user
	if op.Person {
		h.grace = op.Grace
		if op.MetaVersion >= h.metaVersion {
			h.user = op.User
		}
	}
	if op.MetaVersion > h.metaVersion || h.user != user {
		if place := f.keptPlace(op.Room, h.user); place != "" && place != op.Conn {
			defer f.vacate(w, op.Room, place)
		}
		if op.MetaVersion > h.metaVersion {
			h.metaVersion, h.meta = op.MetaVersion, string(op.Meta)
		}
		f.tell(event{kind: store.Meta, room: op.Room, conn: op.Conn, entry: op.Entry})
	}
	if op.StateVersion > h.stateVersion {
		h.stateVersion = op.StateVersion
		if h.state != "" || op.State != nil {
			h.state, h.silent = string(op.State), op.StateSilent
			f.tell(event{kind: store.State, room: op.Room, conn: op.Conn, entry: op.Entry, state: h.state})
		}
	}
	switch {
	case op.TTL == 0 && (op.Left > 0 || h.ttl > 0):
		h.until = time.Time{}
	case op.Left > 0:
		h.until = time.Now().Add(op.Left)
	}
	h.ttl = op.TTL
	f.rooms[op.Room][op.Conn] = h
	return store.OpResult{Status: store.Done}
}

// remove ends an entry.
func (f *fakeStore) remove(room, conn string, cause store.Cause) {
	h := f.rooms[room][conn]
	for w, set := range f.owned {
		if w.inc == h.inc {
			delete(set, store.EntryRef{Conn: conn, Entry: h.entry, Room: room})
		}
	}
	delete(f.rooms[room], conn)
	if len(f.rooms[room]) == 0 {
		delete(f.rooms, room)
	}
	f.tell(event{kind: store.Left, room: room, conn: conn, entry: h.entry, cause: cause})
}

func (f *fakeStore) tell(e event) {
	e.at = time.Now()
	f.seq[e.room]++
	f.events = append(f.events, e)
}

func (f *fakeStore) position(room string) store.Position {
	return store.Position{Epoch: "E", Seq: f.seq[room], Tag: fmt.Sprint(f.seq[room])}
}
