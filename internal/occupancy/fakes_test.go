package occupancy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

var errAway = errors.New("redis is away")

// fakeRoom is a room in fakeRedis.
type fakeRoom struct {
	pos        store.Position
	conns      map[string]string // connection -> user; empty: none
	users      map[string]int    // user -> connections
	rebuilding bool
}

func (r *fakeRoom) join(conn, user string) {
	r.leave(conn)
	r.conns[conn] = user
	r.users[user]++
}

func (r *fakeRoom) leave(conn string) {
	user, ok := r.conns[conn]
	if !ok {
		return
	}
	delete(r.conns, conn)
	if r.users[user]--; r.users[user] == 0 {
		delete(r.users, user)
	}
}

func (r *fakeRoom) clone() *fakeRoom {
	return &fakeRoom{pos: r.pos, conns: maps.Clone(r.conns), users: maps.Clone(r.users), rebuilding: r.rebuilding}
}

func (r *fakeRoom) reading() Reading {
	n := Reading{Position: r.pos, Connections: len(r.conns), Users: len(r.users), Rebuilding: r.rebuilding}
	if alone := r.users[""]; alone > 0 {
		n.Users += alone - 1 // each connection without a user counts as one
	}
	return n
}

// emptyReading is the beginning of the first of the last readings that showed an empty
// room, all at one position.
type emptyReading struct {
	pos store.Position
	at  time.Time
}

// fakeRedis is a Redis with rooms. It notes its calls, and which numbers a room had at
// which position.
type fakeRedis struct {
	mu      sync.Mutex
	rooms   map[string]*fakeRoom
	epochs  int
	latency time.Duration
	away    map[int]bool    // buckets whose calls fail
	hangs   map[int]bool    // buckets whose calls are not answered
	poison  map[string]bool // rooms whose calls fail
	bucket  func(room string) int

	calls   [][]string
	reads   map[string][]time.Time // beginnings of the calls by room
	history map[string]map[string]bool
	empty   map[string]emptyReading
}

func newFakeRedis() *fakeRedis {
	return &fakeRedis{
		rooms: map[string]*fakeRoom{}, away: map[int]bool{}, hangs: map[int]bool{}, poison: map[string]bool{},
		bucket: func(string) int { return 0 }, reads: map[string][]time.Time{}, history: map[string]map[string]bool{},
		empty: map[string]emptyReading{}, latency: time.Millisecond,
	}
}

// change changes a room, as a script does: with the next seq.
func (f *fakeRedis) change(room string, do func(*fakeRoom)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.rooms[room]
	if r == nil {
		f.epochs++
		r = &fakeRoom{pos: store.Position{Epoch: fmt.Sprint("e", f.epochs)}, conns: map[string]string{}, users: map[string]int{}}
		f.rooms[room] = r
	}
	do(r)
	r.pos.Seq++
	f.note(room)
}

// note adds the present numbers to the history.
func (f *fakeRedis) note(room string) {
	n := f.rooms[room].reading()
	if f.history[room] == nil {
		f.history[room] = map[string]bool{}
	}
	f.history[room][fmt.Sprint(n.Position.Epoch, n.Position.Seq, n.Connections, n.Users)] = true
}

func (f *fakeRedis) set(do func(*fakeRedis)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do(f)
}

// truth returns the present numbers.
func (f *fakeRedis) truth(room string) Reading {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.rooms[room]; r != nil {
		return r.reading()
	}
	return Reading{}
}

// copyOf returns a copy of a room, or nil.
func (f *fakeRedis) copyOf(room string) *fakeRoom {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.rooms[room]
	if r == nil {
		return nil
	}
	return r.clone()
}

// replace puts a copy in the place of a room; nil: Redis loses the room.
func (f *fakeRedis) replace(room string, with *fakeRoom) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if with == nil {
		delete(f.rooms, room)
		return
	}
	f.rooms[room] = with.clone()
}

// begin notes a call. It returns whether the call fails or is not answered.
func (f *fakeRedis) begin(rooms []string) (latency time.Duration, fails, hangs bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, slices.Clone(rooms))
	for _, room := range rooms {
		f.reads[room] = append(f.reads[room], time.Now())
		b := f.bucket(room)
		fails = fails || f.away[b] || f.poison[room]
		hangs = hangs || f.hangs[b]
	}
	return f.latency, fails, hangs
}

// Occupancy implements Store. Redis reads in the middle of the call.
func (f *fakeRedis) Occupancy(ctx context.Context, rooms ...string) ([]store.Occupancy, error) {
	began := time.Now()
	latency, fails, hangs := f.begin(rooms)
	if hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if err := sleep(ctx, latency/2); err != nil {
		return nil, err
	}
	if fails {
		return nil, errAway
	}
	list := f.read(rooms)
	if err := sleep(ctx, latency/2); err != nil {
		return nil, err
	}
	f.noteEmpty(rooms, list, began)
	return stored(list), nil
}

// stored converts readings to the form of the store.
func stored(list []Reading) []store.Occupancy {
	out := make([]store.Occupancy, len(list))
	for i, r := range list {
		out[i] = store.Occupancy{
			Position: r.Position, Numbers: store.Numbers{Connections: r.Connections, Users: r.Users, Rebuilding: r.Rebuilding},
		}
	}
	return out
}

func (f *fakeRedis) read(rooms []string) []Reading {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := make([]Reading, len(rooms))
	for i, room := range rooms {
		if r := f.rooms[room]; r != nil {
			list[i] = r.reading()
		}
	}
	return list
}

// noteEmpty notes which rooms a reading that has arrived showed as empty. Readings of
// rooms that are rebuilding do not count.
func (f *fakeRedis) noteEmpty(rooms []string, list []Reading, began time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, room := range rooms {
		last, ok := f.empty[room]
		switch {
		case list[i].Rebuilding:
		case list[i].Connections > 0:
			delete(f.empty, room)
		case !ok || last.pos != list[i].Position:
			f.empty[room] = emptyReading{list[i].Position, began}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// readings returns the beginnings of the readings of a room.
func (f *fakeRedis) readings(room string) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.reads[room])
}

// takeCalls returns the calls since the last takeCalls.
func (f *fakeRedis) takeCalls() [][]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

// fakeListener confirms every subscription a moment later, unless it is disconnected.
type fakeListener struct {
	to *Rooms

	mu        sync.Mutex
	down      bool
	confirmed map[string]bool // rooms that are added; true: ever confirmed
	added     int
	removed   int
}

func (l *fakeListener) Add(room string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.added++
	l.confirmed[room] = false
	time.AfterFunc(time.Millisecond, func() { l.confirm(room) })
}

func (l *fakeListener) Remove(room string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.removed++
	delete(l.confirmed, room)
}

func (l *fakeListener) confirm(room string) {
	l.mu.Lock()
	again, ok := l.confirmed[room]
	if ok = ok && !l.down; ok {
		l.confirmed[room] = true
	}
	l.mu.Unlock()
	if ok {
		l.to.HandleSubscribed(room, again)
	}
}

func (l *fakeListener) disconnect() {
	l.mu.Lock()
	l.down = true
	l.mu.Unlock()
	l.to.HandleDisconnect()
}

func (l *fakeListener) reconnect() {
	l.mu.Lock()
	l.down = false
	rooms := slices.Sorted(maps.Keys(l.confirmed))
	l.mu.Unlock()
	for _, room := range rooms {
		l.confirm(room)
	}
}

func (l *fakeListener) isDown() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.down
}

// send hands an event to Rooms, unless it is lost because of the connection.
func (l *fakeListener) send(room string) {
	l.mu.Lock()
	arrives := l.confirmed[room] && !l.down
	l.mu.Unlock()
	if arrives {
		l.to.HandleEvent(room, "an event")
	}
}

// fakeWatcher checks and notes what it is given. While Watch runs, it holds updates back,
// as a socket does that has to send the answer first.
type fakeWatcher struct {
	h     *harness
	busy  atomic.Bool // in Watch, with these rooms
	asked []string

	mu    sync.Mutex
	has   map[string]*Update
	seqs  map[string]map[string]uint64 // by room and epoch
	holds bool
	held  []*Update
	lines []string
	got   []*Update
}

// hold holds updates back until start.
func (w *fakeWatcher) hold() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.holds = true
}

// start takes the results of Watch, and then the updates that are later.
func (w *fakeWatcher) start(results []Result) {
	w.mu.Lock()
	defer w.mu.Unlock()
	answers := map[string]*Update{}
	for _, result := range results {
		if u := result.Update; u != nil {
			w.checkPosition(u)
			w.has[u.Room] = u
			answers[u.Room] = u
		}
	}
	for _, u := range w.held {
		if answer := answers[u.Room]; answer == nil || u.After(answer) {
			w.accept(u)
		}
	}
	w.holds, w.held = false, nil
}

// unwatch ends the watch of a room. Until it has returned, updates may come.
func (w *fakeWatcher) unwatch(room string) {
	w.h.Unwatch(w, room)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forget(room)
}

func (w *fakeWatcher) unwatchAll() {
	w.h.UnwatchAll(w)
	w.mu.Lock()
	defer w.mu.Unlock()
	for room := range w.has {
		w.forget(room)
	}
}

// forget forgets a room, and the updates of it that are held back.
func (w *fakeWatcher) forget(room string) {
	delete(w.has, room)
	delete(w.seqs, room)
	w.held = slices.DeleteFunc(w.held, func(u *Update) bool { return u.Room == room })
}

// all returns the last update of each room.
func (w *fakeWatcher) all() map[string]*Update {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.has)
}

// checkPosition checks the position of an update, and that a room that is not stale had
// these numbers there.
func (w *fakeWatcher) checkPosition(u *Update) {
	t := w.h.t
	if w.seqs[u.Room] == nil {
		w.seqs[u.Room] = map[string]uint64{}
	}
	assert.GreaterOrEqual(t, u.Seq, w.seqs[u.Room][u.Epoch], "seq of %s in epoch %s", u.Room, u.Epoch)
	w.seqs[u.Room][u.Epoch] = u.Seq
	if !u.Stale && u.Epoch != "" && !w.h.lossy {
		w.h.redis.mu.Lock()
		defer w.h.redis.mu.Unlock()
		assert.True(t, w.h.redis.history[u.Room][fmt.Sprint(u.Epoch, u.Seq, u.Connections, u.Users)], "%s", text(u))
	}
}

func (w *fakeWatcher) Deliver(u *Update) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.h.checkPush(u, w.has[u.Room])
	if w.holds {
		w.held = append(w.held, u)
		return
	}
	w.accept(u)
}

// accept takes one update.
func (w *fakeWatcher) accept(u *Update) {
	w.checkPosition(u)
	if last := w.has[u.Room]; assert.NotNil(w.h.t, last, "an update of %s before its answer", u.Room) {
		assert.False(w.h.t, last.same(u), "equal numbers again: %s", text(u))
		assert.True(w.h.t, u.After(last))
	}
	w.has[u.Room] = u
	w.lines = append(w.lines, text(u))
	w.got = append(w.got, u)
}

func (w *fakeWatcher) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	lines := w.lines
	w.lines = nil
	return lines
}

// text returns an update as connections/users, with a sign if it is stale.
func text(u *Update) string {
	s := fmt.Sprintf("%s %d/%d", u.Room, u.Connections, u.Users)
	if u.Stale {
		s += " stale"
	}
	return s
}

// harness is Rooms with their fake surroundings.
type harness struct {
	*Rooms
	t        *testing.T
	redis    *fakeRedis
	listener *fakeListener
	lossy    bool // Redis loses data, so a position may have had other numbers

	mu       sync.Mutex
	pushes   map[string][]time.Time // by room
	every    map[string]time.Duration
	interval time.Duration // of all other rooms
}

func (h *harness) intervalOf(room string) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d := h.every[room]; d > 0 {
		return d
	}
	return h.interval
}

// checkPush checks the times of a push of a room, of which each watcher has a part.
func (h *harness) checkPush(u, last *Update) {
	interval := h.intervalOf(u.Room)
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	times := h.pushes[u.Room]
	if n := len(times); n == 0 || !times[n-1].Equal(now) {
		if n > 0 {
			assert.GreaterOrEqual(h.t, now.Sub(times[n-1]), interval, "two pushes of %s within an interval", u.Room)
		}
		h.pushes[u.Room] = append(times, now)
	}
	if u.Connections == 0 && last != nil && last.Connections > 0 {
		h.redis.mu.Lock()
		defer h.redis.mu.Unlock()
		assert.GreaterOrEqual(h.t, now.Sub(h.redis.empty[u.Room].at), interval, "the empty room %s was pushed early", u.Room)
	}
}
