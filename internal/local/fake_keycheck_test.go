package local

import (
	"context"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// Check implements Store. Rooms have the count of their entries, unless a test has put
// another number into miscounted.
func (f *fakeStore) Check(ctx context.Context, bucket int, inc string, list store.CheckList) (store.Checked, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.checks++
	if err := ctx.Err(); err != nil {
		return store.Checked{}, err
	}
	if f.unreadable != nil && f.unreadable(bucket) {
		return store.Checked{}, errLost
	}
	w := ownerKey{bucket, inc}
	c := store.Checked{Owned: int64(len(f.owned[w])), Fenced: f.number[w] > 0 || f.dead[inc]}
	for _, room := range list.Rooms {
		c.Rooms = append(c.Rooms, store.RoomCheck{
			Members: len(f.rooms[room]) > 0, Listed: !list.Index || !f.unlisted[room], Entries: f.counted(room, inc),
		})
	}
	for i, k := range list.Keys {
		if !f.hasKey(k) {
			c.Missing = append(c.Missing, i)
		}
	}
	return c, nil
}

func (f *fakeStore) counted(room, inc string) int {
	if n, ok := f.miscounted[room]; ok {
		return n
	}
	n := 0
	for _, h := range f.rooms[room] {
		if h.inc == inc {
			n++
		}
	}
	return n
}

func (f *fakeStore) hasKey(k store.KeyRef) bool {
	switch k.Kind {
	case store.KeyConn:
		return f.rooms[k.Room][k.Conn].until.After(time.Now())
	case store.KeyState:
		return f.rooms[k.Room][k.Conn].state != ""
	}
	_, ok := f.conns[k.Conn]
	return ok
}

// recount runs an OpRecount.
func (f *fakeStore) recount(w ownerKey, op store.Op) store.OpResult {
	delete(f.unlisted, op.Room)
	delete(f.miscounted, op.Room)
	f.recounts++
	if f.counted(op.Room, w.inc) != op.Entries {
		f.wrongRecounts++
	}
	return store.OpResult{Status: store.Done}
}
