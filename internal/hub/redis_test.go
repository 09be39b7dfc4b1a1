package hub

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

var errAway = errors.New("redis is away")

// fakeRoom is a room as Redis holds it.
type fakeRoom struct {
	pos     store.Position
	members map[string]store.Record
}

func (r *fakeRoom) clone() *fakeRoom {
	c := &fakeRoom{pos: r.pos, members: make(map[string]store.Record)}
	for k, v := range r.members {
		c.members[k] = v
	}
	return c
}

// fakeRedis is a Store, and what owners do to it. Every change returns the
// message that it would publish.
type fakeRedis struct {
	mu    sync.Mutex
	rooms map[string]*fakeRoom
	count int // for tags and epochs

	generation string // empty: cannot be learned
	away       bool
	paged      bool
	bereft     bool                   // counts more members than it has
	lost       func(room string) bool // cannot be asked for its position
	delay      time.Duration
	swallowed  func(room string) bool // reading it takes as long as a call may
	asking     time.Duration          // that long it takes to ask for the generation, in vain
	// between is called without the lock after the position was read and
	// before the records are, where paged.
	between func(room string)
	// snapped is called without the lock once all has been read.
	snapped func(room string)

	snapshots   int
	reading     int
	mostReading int
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
	f.mostReading = max(f.mostReading, f.reading)
	delay, between, snapped := f.delay, f.between, f.snapped
	swallowed := f.swallowed != nil && f.swallowed(room)
	f.mu.Unlock()
	if swallowed {
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
	if f.away || swallowed {
		f.mu.Unlock()
		return store.Snapshot{}, errAway
	}
	var s store.Snapshot
	s.Paged, s.Lost = f.paged, f.bereft
	if r := f.rooms[room]; r != nil {
		s.Position = r.pos
	}
	f.mu.Unlock()
	if s.Paged && between != nil {
		between(room)
	}
	f.mu.Lock()
	if r := f.rooms[room]; r != nil {
		for _, rec := range r.members {
			s.Records = append(s.Records, rec)
		}
	}
	f.mu.Unlock()
	slices.SortFunc(s.Records, func(a, b store.Record) int { return int(a.Seq) - int(b.Seq) })
	if snapped != nil {
		snapped(room)
	}
	return s, nil
}

func (f *fakeRedis) Positions(_ context.Context, rooms []string) ([]store.Position, error) {
	time.Sleep(time.Millisecond)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.positions++
	if f.away || f.lost != nil && slices.ContainsFunc(rooms, f.lost) {
		return nil, errAway
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
	asking := f.asking
	f.mu.Unlock()
	time.Sleep(max(asking, time.Millisecond))
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.generation, f.generation != "" && !f.away && asking == 0
}

// set changes settings under the lock.
func (f *fakeRedis) set(change func(*fakeRedis)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// calls returns how many calls of each kind there have been.
func (f *fakeRedis) calls() (snapshots, positions, generations int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.snapshots, f.positions, f.generations
}

// wipe makes Redis forget the room; with a copy from before, go back to it.
func (f *fakeRedis) wipe(room string, back *fakeRoom) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.rooms, room)
	if back != nil {
		f.rooms[room] = back.clone()
	}
}

// copy returns the room as it is.
func (f *fakeRedis) copy(room string) *fakeRoom {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.rooms[room]; r != nil {
		return r.clone()
	}
	return &fakeRoom{members: map[string]store.Record{}}
}

// advance moves a room one event on, under the lock.
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

// write does one change of kind t and returns its message; empty: there was
// nothing to change.
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
	told := rec
	switch t {
	case store.Joined, store.Replaced:
		told.JoinedAt = now
		if present {
			told.JoinedAt = old.JoinedAt
		}
	case store.State:
		next := old
		next.State, next.StateSilent = rec.State, rec.StateSilent
		told = next
	case store.Meta:
		next := old
		next.Meta = rec.Meta
		told = next
	}
	told.Seq = r.pos.Seq
	if t == store.Left {
		delete(r.members, rec.Conn)
		told = store.Record{Conn: rec.Conn, Entry: old.Entry, Seq: r.pos.Seq}
	} else {
		if told.Entry == "" {
			told.Entry = "e"
		}
		r.members[rec.Conn] = told
	}
	if t == store.State {
		told.Meta = nil // as the scripts have it
	}
	return encodeEvent(t, r.pos, prev, now, told)
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

// encodeEvent writes a message as the scripts do.
func encodeEvent(t store.EventType, p store.Position, prev string, at int64, r store.Record) string {
	flag := "."
	if r.StateSilent {
		flag = "s"
	}
	return fmt.Sprintf("%c %s %s %s %d . %s %s inc 0 %d 1 %s 1 %d 0 %d %d\n%s%s",
		t, p.Epoch, p.Tag, prev, at, r.Conn, r.Entry, len(r.State), flag, len(r.Meta), r.JoinedAt, p.Seq, r.Meta, r.State)
}
