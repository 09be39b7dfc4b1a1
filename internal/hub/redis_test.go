package hub

import (
	"cmp"
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
	_, present := f.record(room, rec.Conn)
	switch {
	case t == store.Joined && present:
		t = store.Replaced
	case t != store.Joined && !present:
		return ""
	}
	return f.change(t, room, rec, ".")
}

// record returns a record of the room. The caller holds the lock.
func (f *fakeRedis) record(room, conn string) (rec store.Record, present bool) {
	if r := f.rooms[room]; r != nil {
		rec, present = r.members[conn]
	}
	return rec, present
}

// change makes one change of kind t, which must be possible, and returns its message.
// cause is the field of the message. The caller holds the lock.
func (f *fakeRedis) change(t store.EventType, room string, rec store.Record, cause string) string {
	old, present := f.record(room, rec.Conn)
	r, prev := f.advance(room)
	now := time.Now().UnixMilli()
	written := old
	switch t {
	case store.Joined, store.Replaced:
		written = rec
		written.JoinedAt = now
		if present {
			written.JoinedAt = old.JoinedAt
		}
		if written.Entry == "" {
			written.Entry = "e"
		}
	case store.State:
		written.State, written.StateSilent = rec.State, rec.StateSilent
	case store.Meta:
		written.Meta = rec.Meta
		if rec.User != "" {
			written.User = rec.User
		}
	case store.Disconnected:
		written.State, written.StateSilent = nil, false
		written.Incarnation, written.KeptUntil, written.KeptCause = "~", now+5000, rec.KeptCause
	}
	written.Seq = r.pos.Seq
	if t == store.Left {
		delete(r.members, rec.Conn)
	} else {
		r.members[rec.Conn] = written
	}
	// As in the scripts, some records of messages lack fields.
	switch {
	case t == store.Left && f.count%2 == 0:
		written = store.Record{Conn: rec.Conn, Entry: old.Entry, Incarnation: old.Incarnation, Seq: r.pos.Seq}
	case t == store.State, t == store.Disconnected && f.count%2 == 0:
		written.Meta = nil
	}
	return encodeEventWith(t, r.pos, prev, now, cause, written)
}

func (f *fakeRedis) join(room, conn string, more ...func(*store.Record)) string {
	return f.write(store.Joined, room, newRecord(conn, more))
}

// newRecord returns the record of a connection that joins.
func newRecord(conn string, more []func(*store.Record)) store.Record {
	rec := store.Record{Conn: conn, Entry: "e-" + conn, Incarnation: "inc", Meta: []byte(`{"n":"` + conn + `"}`)}
	for _, m := range more {
		m(&rec)
	}
	return rec
}

// joinAs joins a connection of a user ("": none) like a server whose rule has a grace
// period. It takes the place of a connection of the same user: of replaces, or else of
// the one whose place is kept.
func (f *fakeRedis) joinAs(room, conn, user, replaces string, more ...func(*store.Record)) (messages []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec := newRecord(conn, more)
	rec.User = user
	kind, taken := store.Joined, f.taken(room, user, replaces)
	if old, present := f.record(room, conn); present {
		kind = store.Replaced
		switch {
		case old.User == user && old.Kept():
			taken, kind = conn, f.either(store.Joined, store.Replaced)
		case taken == conn:
			taken = ""
		case old.User != user && old.User != "" && f.either(0, 1) == 0:
			kind = store.Joined
			messages = append(messages, f.change(store.Left, room, old, string(rune(f.cause(&old, store.CauseLeft)))))
		}
	}
	messages = append(messages, f.change(kind, room, rec, "."+taken))
	if taken != "" && taken != conn {
		messages = append(messages, f.replaced(room, taken))
	}
	return messages
}

// replaced ends an entry whose place another connection has taken. The caller holds the
// lock.
func (f *fakeRedis) replaced(room, conn string) string {
	return f.change(store.Left, room, store.Record{Conn: conn}, string(rune(store.CauseReplaced)))
}

// taken returns the connection whose place a new one of the user takes, or "". The
// caller holds the lock.
func (f *fakeRedis) taken(room, user, replaces string) string {
	if r := f.rooms[room]; r != nil && user != "" {
		if rec, ok := r.members[replaces]; ok && rec.User == user {
			return replaces
		}
		for conn, rec := range r.members {
			if rec.Kept() && rec.User == user {
				return conn
			}
		}
	}
	return ""
}

// either returns one of two kinds in turn, so that both ways to say something occur.
func (f *fakeRedis) either(a, b store.EventType) store.EventType {
	if f.count%2 == 0 {
		return a
	}
	return b
}

// cause returns the cause of the leave of an entry: that of its kept place, or cause.
func (f *fakeRedis) cause(rec *store.Record, cause store.Cause) store.Cause {
	if rec.Kept() {
		return rec.KeptCause
	}
	return cause
}

// end ends an entry.
func (f *fakeRedis) end(room, conn string, cause store.Cause) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, present := f.record(room, conn)
	if !present {
		return ""
	}
	return f.change(store.Left, room, rec, string(rune(f.cause(&rec, cause))))
}

// disconnect ends a connection that did not ask to leave. If it is the last one of its
// user, its place is kept.
func (f *fakeRedis) disconnect(room, conn string, cause store.Cause) (messages []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, present := f.record(room, conn)
	if !present || rec.Kept() {
		return nil
	}
	last := rec.User != ""
	for other, r := range f.rooms[room].members {
		last = last && (other == conn || r.User != rec.User)
	}
	if !last {
		return []string{f.change(store.Left, room, rec, string(rune(cause)))}
	}
	if rec.State != nil && f.count%2 == 0 {
		messages = append(messages, f.change(store.State, room, store.Record{Conn: conn}, "."))
	}
	return append(messages, f.change(store.Disconnected, room, store.Record{Conn: conn, KeptCause: cause}, string(rune(cause))))
}

// metaAs sets the metadata of a connection, which give it its user. A connection that
// has another user leaves and joins.
func (f *fakeRedis) metaAs(room, conn, user, meta string) (messages []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec, present := f.record(room, conn)
	if !present || rec.Kept() {
		return nil
	}
	kept := f.taken(room, user, "")
	if rec.User == "" || rec.User == user {
		messages = append(messages, f.change(store.Meta, room, store.Record{Conn: conn, Meta: []byte(meta), User: user}, "."))
	} else {
		rec.User, rec.Meta, rec.Entry = user, []byte(meta), rec.Entry+"2"
		messages = append(messages, f.change(store.Left, room, store.Record{Conn: conn}, string(rune(store.CauseLeft))),
			f.change(store.Joined, room, rec, "."+kept))
	}
	if kept != "" { // a user has a connection or a kept place, never both
		messages = append(messages, f.replaced(room, kept))
	}
	return messages
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

// withMeta is a record option of join.
func withMeta(meta string) func(*store.Record) {
	return func(r *store.Record) { r.Meta = []byte(meta) }
}

// encodeEvent encodes a message like the scripts.
func encodeEvent(t store.EventType, p store.Position, prev string, at int64, r store.Record) string {
	return encodeEventWith(t, p, prev, at, ".", r)
}

// encodeEventWith is encodeEvent with a cause or a connection that was replaced.
func encodeEventWith(t store.EventType, p store.Position, prev string, at int64, cause string, r store.Record) string {
	flag, more := ".", ""
	if r.StateSilent {
		flag = "s"
	}
	if r.User != "" || r.KeptUntil != 0 {
		more = fmt.Sprintf(" %d 5000 0", len(r.User))
	}
	if r.KeptUntil != 0 { // not in the short record of a leave
		more += fmt.Sprintf(" %d %c", r.KeptUntil, r.KeptCause)
	}
	return fmt.Sprintf("%c %s %s %s %d %s %s %s %s 0 %d 1 %s 1 %d 0 %d %d%s\n%s%s%s", t, p.Epoch, p.Tag, prev, at, cause, r.Conn, r.Entry,
		cmp.Or(r.Incarnation, "inc"), len(r.State), flag, len(r.Meta), r.JoinedAt, p.Seq, more, r.User, r.Meta, r.State)
}
