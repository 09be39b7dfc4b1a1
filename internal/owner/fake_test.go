package owner

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

var (
	errLost    = errors.New("no reply")
	errRefused = errors.New("refused")
)

// held is an entry as Redis holds it.
type held struct {
	entry, inc   string
	ttl          time.Duration
	until        time.Time // end of the per-connection key; zero: none
	metaVersion  uint64
	meta         string
	stateVersion uint64
	state        string
	silent       bool
}

// told is an event.
type told struct {
	at                time.Time
	kind              store.EventType
	room, conn, entry string
	cause             store.Cause
	state             string
}

// fault is what befalls one call.
type fault struct {
	before time.Duration // until it runs
	after  time.Duration // until the reply
	never  bool          // it does not run
	late   time.Duration // it runs that long after the caller has heard of the loss
	half   bool          // the first of two calls runs, and the caller hears of no reply
	lost   bool          // the caller hears of no reply
	err    error         // what the caller hears instead
}

// where a bucket's things of an incarnation are.
type where struct {
	bucket int
	inc    string
}

// fakeStore is a Redis as owners see it, with the rule of batch numbers.
type fakeStore struct {
	mu     sync.Mutex // guards the fields below
	rooms  map[string]map[string]held
	conns  map[string]store.MetaValue
	owned  map[where]map[store.OwnedRef]bool
	number map[where]uint64
	dead   map[string]bool
	seq    map[string]uint64
	events []told

	batches  [][]store.Op // in the order of arrival
	late     int
	flying   int
	together bool // two batches were under way in one bucket
	sizes    int  // calls of OwnedSize
	checks   int  // calls of Check
	recounts int
	wrong    int            // of these with another number than that of the entries there
	asked    map[string]int // times that the metadata of a connection was read

	plan    func(call int, ops []store.Op) fault // nil: none
	refuse  func(op store.Op) bool               // of one op
	refusal error                                // the error with which refuse refuses; nil: errRefused
	mute    func(bucket int) bool                // reads nothing from there; nil: all is read
	bucket  func(conn string) int                // of a connection; nil: 0
	work    sync.WaitGroup

	unlisted   map[string]bool // rooms that the index lacks
	miscounted map[string]int  // what positions count wrongly
}

func newFakeStore() *fakeStore {
	return &fakeStore{
		rooms: make(map[string]map[string]held), conns: make(map[string]store.MetaValue),
		owned: make(map[where]map[store.OwnedRef]bool), number: make(map[where]uint64),
		unlisted: make(map[string]bool), miscounted: make(map[string]int),
		dead: make(map[string]bool), seq: make(map[string]uint64), asked: make(map[string]int),
	}
}

// Commit implements Store.
func (f *fakeStore) Commit(
	ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op,
) ([]store.OpResult, error) {
	f.mu.Lock()
	if f.flying++; f.flying > 1 {
		f.together = true
	}
	call := len(f.batches)
	f.batches = append(f.batches, ops)
	var x fault
	if f.plan != nil {
		x = f.plan(call, ops)
	}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.flying--
	}()
	var results []store.OpResult
	err := wait(ctx, x.before)
	if err == nil && x.half {
		_, err = f.run(where{bucket, inc}, number, known, firstOf(ops))
		x.never = true
	}
	if err == nil && !x.never && x.late == 0 {
		results, err = f.run(where{bucket, inc}, number, known, ops)
	}
	if e := wait(ctx, x.after); e != nil {
		err = e
	}
	if x.late > 0 {
		f.work.Go(func() {
			time.Sleep(x.late)
			_, _ = f.run(where{bucket, inc}, number, known, ops)
		})
	}
	switch {
	case err != nil:
		return nil, err
	case x.err != nil:
		return nil, x.err
	case x.lost || x.never || x.late > 0:
		return nil, errLost
	}
	return results, nil
}

// firstOf is what the first of two calls does, where leaves need a second one:
// what comes after one in its room waits with it.
func firstOf(ops []store.Op) (first []store.Op) {
	waits := make(map[string]bool)
	for _, op := range ops {
		if waits[op.Room] = waits[op.Room] || op.Kind == store.OpLeave; !waits[op.Room] {
			first = append(first, op)
		}
	}
	return first
}

func wait(ctx context.Context, d time.Duration) error {
	if d > 0 {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

func (f *fakeStore) run(w where, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead[w.inc] {
		return nil, store.ErrFenced
	}
	if f.number[w] > number {
		f.late++
		return nil, store.ErrLate
	}
	if f.number[w] < known {
		return nil, store.ErrLost
	}
	f.number[w] = number
	results := make([]store.OpResult, len(ops))
	for i, op := range ops {
		if f.refuse != nil && f.refuse(op) {
			results[i] = store.OpResult{Err: cmp.Or(f.refusal, errRefused)}
			continue
		}
		results[i] = f.execute(w, op)
	}
	return results, nil
}

func (f *fakeStore) execute(w where, op store.Op) store.OpResult {
	switch op.Kind {
	case store.OpConnect:
		return f.connect(w, op)
	case store.OpDisconnect:
		delete(f.owned[w], store.OwnedRef{Conn: op.Conn})
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
		h, ok := f.rooms[op.Room][op.Conn]
		delete(f.owned[w], store.OwnedRef{Conn: op.Conn, Entry: op.Entry, Room: op.Room})
		switch {
		case !ok:
			return store.OpResult{Status: store.Gone}
		case h.entry != op.Entry:
			return store.OpResult{Status: store.Other}
		}
		f.remove(op.Room, op.Conn, op.Cause)
		return store.OpResult{Status: store.Done}
	}
	return f.update(w, op)
}

func (f *fakeStore) connect(w where, op store.Op) store.OpResult {
	if f.owned[w] == nil {
		f.owned[w] = make(map[store.OwnedRef]bool)
	}
	f.owned[w][store.OwnedRef{Conn: op.Conn}] = true
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

func (f *fakeStore) join(w where, op store.Op) store.OpResult {
	old, replaced := f.rooms[op.Room][op.Conn]
	if replaced && old.entry == op.Entry {
		f.update(w, op)
		return store.OpResult{Status: store.Done, Position: f.position(op.Room), Total: len(f.rooms[op.Room])}
	}
	h := held{
		entry: op.Entry, inc: w.inc, ttl: op.TTL, metaVersion: op.MetaVersion, meta: string(op.Meta),
		stateVersion: op.StateVersion, state: string(op.State), silent: op.StateSilent,
	}
	if op.TTL > 0 {
		h.until = time.Now().Add(op.Left)
	}
	if f.rooms[op.Room] == nil {
		f.rooms[op.Room] = make(map[string]held)
	}
	f.rooms[op.Room][op.Conn] = h
	if f.owned[w] == nil {
		f.owned[w] = make(map[store.OwnedRef]bool)
	}
	if replaced && old.inc == w.inc {
		delete(f.owned[w], store.OwnedRef{Conn: op.Conn, Entry: old.entry, Room: op.Room})
	}
	f.owned[w][store.OwnedRef{Conn: op.Conn, Entry: op.Entry, Room: op.Room}] = true
	kind := store.Joined
	if replaced {
		kind = store.Replaced
	}
	f.tell(told{kind: kind, room: op.Room, conn: op.Conn, entry: op.Entry, state: h.state})
	return store.OpResult{Status: store.Done, Position: f.position(op.Room), Total: len(f.rooms[op.Room])}
}

func (f *fakeStore) update(w where, op store.Op) store.OpResult {
	h, ok := f.rooms[op.Room][op.Conn]
	switch {
	case !ok:
		return store.OpResult{Status: store.Gone}
	case h.entry != op.Entry && h.inc == w.inc:
		return store.OpResult{Status: store.Gone}
	case h.entry != op.Entry:
		return store.OpResult{Status: store.Other}
	}
	if op.MetaVersion > h.metaVersion {
		h.metaVersion, h.meta = op.MetaVersion, string(op.Meta)
		f.tell(told{kind: store.Meta, room: op.Room, conn: op.Conn, entry: op.Entry})
	}
	if op.StateVersion > h.stateVersion {
		h.stateVersion = op.StateVersion
		if h.state != "" || op.State != nil {
			h.state, h.silent = string(op.State), op.StateSilent
			f.tell(told{kind: store.State, room: op.Room, conn: op.Conn, entry: op.Entry, state: h.state})
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

func (f *fakeStore) remove(room, conn string, cause store.Cause) {
	h := f.rooms[room][conn]
	for w, set := range f.owned {
		if w.inc == h.inc {
			delete(set, store.OwnedRef{Conn: conn, Entry: h.entry, Room: room})
		}
	}
	delete(f.rooms[room], conn)
	if len(f.rooms[room]) == 0 {
		delete(f.rooms, room)
	}
	f.tell(told{kind: store.Left, room: room, conn: conn, entry: h.entry, cause: cause})
}

func (f *fakeStore) tell(e told) {
	e.at = time.Now()
	f.seq[e.room]++
	f.events = append(f.events, e)
}

func (f *fakeStore) position(room string) store.Position {
	return store.Position{Epoch: "E", Seq: f.seq[room], Tag: fmt.Sprint(f.seq[room])}
}

// OwnedPage implements Store, in a few pages.
func (f *fakeStore) OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) ([]store.OwnedRef, uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	if f.mute != nil && f.mute(bucket) {
		return nil, 0, errLost
	}
	all := slices.SortedFunc(maps.Keys(f.owned[where{bucket, inc}]), func(a, b store.OwnedRef) int {
		if fmt.Sprint(a) < fmt.Sprint(b) {
			return -1
		}
		return 1
	})
	page := max(3, len(all)/4)
	rest := all[min(int(cursor), len(all)):]
	if len(rest) <= page {
		return rest, 0, nil
	}
	return rest[:page], cursor + uint64(page), nil
}

// OwnedSize implements Store.
func (f *fakeStore) OwnedSize(_ context.Context, bucket int, inc string) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sizes++
	if f.mute != nil && f.mute(bucket) {
		return 0, errLost
	}
	return int64(len(f.owned[where{bucket, inc}])), nil
}

// ConnMetas implements Store.
func (f *fakeStore) ConnMetas(_ context.Context, conns []string) ([]store.MetaValue, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	values := make([]store.MetaValue, len(conns))
	for i, c := range conns {
		f.asked[c]++
		if f.mute != nil && f.mute(f.bucket(c)) {
			return nil, errLost
		}
		values[i] = f.conns[c]
	}
	return values, nil
}

// do changes or reads what Redis holds.
func (f *fakeStore) do(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// reaped marks, in the tests, the leaves that came of reap.
const reaped = store.Cause('r')

// reap is what the other servers do on the expired key of an entry.
func (f *fakeStore) reap() {
	for room, members := range f.rooms {
		for conn, h := range members {
			if h.ttl > 0 && !h.until.After(time.Now()) {
				f.remove(room, conn, reaped)
			}
		}
	}
}

// bury is what the other servers do with a dead one.
func (f *fakeStore) bury(inc string) {
	f.dead[inc] = true
	for room, members := range f.rooms {
		for conn, h := range members {
			if h.inc == inc {
				f.remove(room, conn, store.CauseLost)
			}
		}
	}
	for conn, m := range f.conns {
		if m.Owner == inc {
			delete(f.conns, conn)
		}
	}
	for w := range f.owned {
		if w.inc == inc {
			delete(f.owned, w)
		}
	}
}

// flush loses everything.
func (f *fakeStore) flush() {
	clear(f.rooms)
	clear(f.conns)
	clear(f.owned)
	clear(f.number)
	clear(f.dead)
}
