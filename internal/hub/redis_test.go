package hub

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

var errDown = errors.New("redis is down")

// fakeRoom is a room in Redis.
type fakeRoom struct {
	pos     store.Position
	members map[string]store.Record
}

func (r *fakeRoom) clone() *fakeRoom {
	c := &fakeRoom{pos: r.pos, members: make(map[string]store.Record)}
	maps.Copy(c.members, r.members)
	return c
}

// fakeRedis is a Store with methods for the changes of owners. Every change returns the
// message that it would publish.
type fakeRedis struct {
	mu    sync.Mutex
	rooms map[string]*fakeRoom
	count int // for tags and epochs

	generation      string // empty: unknown
	down            bool
	paged           bool
	incomplete      bool                   // counts more members than it has
	unreachable     func(room string) bool // its position cannot be read
	delay           time.Duration
	hangs           func(room string) bool // reading it takes as long as a call may take
	generationDelay time.Duration          // of questions for the generation, which then fail
	// betweenPages is called without the lock after the position was read and before
	// the records are read, if the room is read in pages.
	betweenPages func(room string)
	// afterRead is called without the lock after everything was read.
	afterRead func(room string)

	snapshots   int
	reading     int
	maxReading  int
	positions   int
	generations int
}

func newFakeRedis() *fakeRedis {
	return &fakeRedis{rooms: make(map[string]*fakeRoom), generation: "G1", delay: time.Millisecond}
}

func (f *fakeRedis) Snapshot(ctx context.Context, room string) (store.Snapshot, error) {
	f.mu.Lock()
	f.snapshots++
	f.reading++
	f.maxReading = max(f.maxReading, f.reading)
	delay, betweenPages, afterRead := f.delay, f.betweenPages, f.afterRead
	hangs := f.hangs != nil && f.hangs(room)
	f.mu.Unlock()
	if hangs {
		delay = 1800 * time.Millisecond
	}
	defer func() {
		f.mu.Lock()
		f.reading--
		f.mu.Unlock()
	}()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return store.Snapshot{}, ctx.Err()
	}
	f.mu.Lock()
	if f.down || hangs {
		f.mu.Unlock()
		return store.Snapshot{}, errDown
	}
	var s store.Snapshot
	s.Paged, s.Incomplete = f.paged, f.incomplete
	if r := f.rooms[room]; r != nil {
		s.Position = r.pos
	}
	f.mu.Unlock()
	if s.Paged && betweenPages != nil {
		betweenPages(room)
	}
	f.mu.Lock()
	if r := f.rooms[room]; r != nil {
		for _, rec := range r.members {
			s.Records = append(s.Records, rec)
		}
	}
	f.mu.Unlock()
	slices.SortFunc(s.Records, func(a, b store.Record) int { return int(a.Seq) - int(b.Seq) })
	if afterRead != nil {
		afterRead(room)
	}
	return s, nil
}

func (f *fakeRedis) Positions(_ context.Context, rooms []string) ([]store.Position, error) {
	time.Sleep(time.Millisecond)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.positions++
	if f.down || f.unreachable != nil && slices.ContainsFunc(rooms, f.unreachable) {
		return nil, errDown
	}
	list := make([]store.Position, len(rooms))
	for i, room := range rooms {
		if r := f.rooms[room]; r != nil {
			list[i] = r.pos
		}
	}
	return list, nil
}

func (f *fakeRedis) Generation(context.Context) (string, bool) {
	f.mu.Lock()
	f.generations++
	delay := f.generationDelay
	f.mu.Unlock()
	time.Sleep(max(delay, time.Millisecond))
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.generation, f.generation != "" && !f.down && delay == 0
}

// set changes settings under the lock.
func (f *fakeRedis) set(change func(*fakeRedis)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// calls returns the number of calls of each kind.
func (f *fakeRedis) calls() (snapshots, positions, generations int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.snapshots, f.positions, f.generations
}

// wipe deletes the room, or sets it back to an earlier copy.
func (f *fakeRedis) wipe(room string, back *fakeRoom) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.rooms, room)
	if back != nil {
		f.rooms[room] = back.clone()
	}
}

// copy returns a copy of the room.
func (f *fakeRedis) copy(room string) *fakeRoom {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.rooms[room]; r != nil {
		return r.clone()
	}
	return &fakeRoom{members: map[string]store.Record{}}
}

// advance moves a room to its next position. The caller holds the lock.
func (f *fakeRedis) advance(room string) (r *fakeRoom, prev string) {
	f.count++
	r = f.rooms[room]
	if r == nil {
		r = &fakeRoom{pos: store.Position{Epoch: fmt.Sprintf("E%d", f.count), Tag: "-"}, members: make(map[string]store.Record)}
		f.rooms[room] = r
	}
	prev = r.pos.Tag
	r.pos.Seq++
	r.pos.Tag = fmt.Sprintf("t%d", f.count)
	return r, prev
}

// write makes one change of kind t and returns its message, or an empty string if
// there was nothing to change.
func (f *fakeRedis) write(t store.EventType, room string, rec store.Record) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var old store.Record
	present := false
	if r := f.rooms[room]; r != nil {
		old, present = r.members[rec.Conn]
	}
	switch {
	case t == store.Joined && present:
		t = store.Replaced
	case t != store.Joined && !present:
		return ""
	}
	r, prev := f.advance(room)
	now := time.Now().UnixMilli()
	written := rec
	switch t {
	case store.Joined, store.Replaced:
		written.JoinedAt = now
		if present {
			written.JoinedAt = old.JoinedAt
		}
	case store.State:
		next := old
		next.State, next.StateSilent = rec.State, rec.StateSilent
		written = next
	case store.Meta:
		next := old
		next.Meta = rec.Meta
		written = next
	}
	written.Seq = r.pos.Seq
	if t == store.Left {
		delete(r.members, rec.Conn)
		written = store.Record{Conn: rec.Conn, Entry: old.Entry, Seq: r.pos.Seq}
	} else {
		if written.Entry == "" {
			written.Entry = "e"
		}
		r.members[rec.Conn] = written
	}
	if t == store.State {
		written.Meta = nil // as in the scripts
	}
	return encodeEvent(t, r.pos, prev, now, written)
}

func (f *fakeRedis) join(room, conn string, more ...func(*store.Record)) string {
	rec := store.Record{Conn: conn, Entry: "e-" + conn, Incarnation: "inc", Meta: []byte(`{"n":"` + conn + `"}`)}
	for _, m := range more {
		m(&rec)
	}
	return f.write(store.Joined, room, rec)
}

func (f *fakeRedis) leave(room, conn string) string {
	return f.write(store.Left, room, store.Record{Conn: conn})
}

func (f *fakeRedis) state(room, conn, state string, silent bool) string {
	rec := store.Record{Conn: conn, StateSilent: silent}
	if state != "" {
		rec.State = []byte(state)
	}
	return f.write(store.State, room, rec)
}

func (f *fakeRedis) meta(room, conn, meta string) string {
	return f.write(store.Meta, room, store.Record{Conn: conn, Meta: []byte(meta)})
}

// withState is a record option of join.
func withState(state string, silent bool) func(*store.Record) {
	return func(r *store.Record) { r.State, r.StateSilent = []byte(state), silent }
}

// withEntry is a record option of join.
func withEntry(entry string) func(*store.Record) {
	return func(r *store.Record) { r.Entry = entry }
}

// encodeEvent encodes a message like the scripts.
func encodeEvent(t store.EventType, p store.Position, prev string, at int64, r store.Record) string {
	flag := "."
	if r.StateSilent {
		flag = "s"
	}
	return fmt.Sprintf("%c %s %s %s %d . %s %s inc 0 %d 1 %s 1 %d 0 %d %d\n%s%s",
		t, p.Epoch, p.Tag, prev, at, r.Conn, r.Entry, len(r.State), flag, len(r.Meta), r.JoinedAt, p.Seq, r.Meta, r.State)
}
