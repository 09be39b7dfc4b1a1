package local

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
	"github.com/meshpresence/mesh/internal/wait"
)

var (
	errLost    = errors.New("no reply")
	errRefused = errors.New("refused")
)

// storedEntry is an entry in Redis.
type storedEntry struct {
	entry, inc   string
	ttl          time.Duration
	until        time.Time // end of the per-connection key; zero: none
	metaVersion  uint64
	meta         string
	stateVersion uint64
	state        string
	silent       bool

	user  string
	grace time.Duration
	took  string // conn:incarnation of the entry whose place the join took

	keptUntil time.Time // of a kept place, whose inc is store.NoOwner
	keptCause store.Cause
}

func (h storedEntry) kept() bool { return h.inc == store.NoOwner }

// event is an event that Redis has published.
type event struct {
	at                time.Time
	kind              store.EventType
	room, conn, entry string
	cause             store.Cause
	state             string
	back              bool // a join of a connection at its own kept place
}

// fault is what happens to one call.
type fault struct {
	before time.Duration // until it runs
	after  time.Duration // until the reply
	never  bool          // it does not run
	late   time.Duration // it runs this long after the caller has heard of the loss
	half   bool          // the first of two script calls runs, and the caller gets no reply
	lost   bool          // the caller gets no reply
	err    error         // the caller gets this error instead
}

// ownerKey identifies the index and fence of an incarnation in a bucket.
type ownerKey struct {
	bucket int
	inc    string
}

// fakeStore is a Redis as a registry sees it, with the rule of batch numbers.
type fakeStore struct {
	mu     sync.Mutex // guards the fields below
	rooms  map[string]map[string]storedEntry
	conns  map[string]store.MetaValue
	owned  map[ownerKey]map[store.EntryRef]bool
	number map[ownerKey]uint64
	dead   map[string]bool
	seq    map[string]uint64
	events []event

	batches       [][]store.Op // in the order of arrival
	late          int
	inFlight      int
	overlapped    bool // two batches were in flight in one bucket
	sizes         int  // calls of OwnedSize
	checks        int  // calls of Check
	recounts      int
	wrongRecounts int            // OpRecounts with another number than that of the entries
	metaReads     map[string]int // times that the metadata of a connection was read

	plan       func(call int, ops []store.Op) fault // nil: none
	refuse     func(op store.Op) bool               // refuses a single op
	refusal    error                                // the error of refuse; nil: errRefused
	unreadable func(bucket int) bool                // reads of this bucket fail; nil: none
	bucket     func(conn string) int                // of a connection; nil: 0
	work       sync.WaitGroup

	unlisted   map[string]bool // rooms that the index of rooms lacks
	miscounted map[string]int  // wrong counts of rooms
	numbered   map[string]bool // rooms that had a user
}

func newFakeStore() *fakeStore {
	return &fakeStore{
		rooms: make(map[string]map[string]storedEntry), conns: make(map[string]store.MetaValue),
		owned: make(map[ownerKey]map[store.EntryRef]bool), number: make(map[ownerKey]uint64),
		unlisted: make(map[string]bool), miscounted: make(map[string]int), numbered: make(map[string]bool),
		dead: make(map[string]bool), seq: make(map[string]uint64), metaReads: make(map[string]int),
	}
}

// Commit implements Store.
func (f *fakeStore) Commit(
	ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op,
) ([]store.OpResult, error) {
	f.mu.Lock()
	if f.inFlight++; f.inFlight > 1 {
		f.overlapped = true
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
		f.inFlight--
	}()
	var results []store.OpResult
	err := wait.For(ctx, x.before)
	if err == nil && x.half {
		_, err = f.run(ownerKey{bucket, inc}, number, known, firstOf(ops))
		x.never = true
	}
	if err == nil && !x.never && x.late == 0 {
		results, err = f.run(ownerKey{bucket, inc}, number, known, ops)
	}
	if e := wait.For(ctx, x.after); e != nil {
		err = e
	}
	if x.late > 0 {
		f.work.Go(func() {
			time.Sleep(x.late)
			_, _ = f.run(ownerKey{bucket, inc}, number, known, ops)
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

// firstOf returns the ops of the first of two script calls if leaves need a second one.
// Ops that follow a leave in its room wait with it.
func firstOf(ops []store.Op) (first []store.Op) {
	waits := make(map[string]bool)
	for _, op := range ops {
		if waits[op.Room] = waits[op.Room] || op.Kind == store.OpLeave; !waits[op.Room] {
			first = append(first, op)
		}
	}
	return first
}

func (f *fakeStore) run(w ownerKey, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
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
		return nil, store.ErrForgotten
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

// OwnedPage implements Store, in a few pages.
func (f *fakeStore) OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) ([]store.EntryRef, uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, 0, err
	}
	if f.unreadable != nil && f.unreadable(bucket) {
		return nil, 0, errLost
	}
	all := slices.SortedFunc(maps.Keys(f.owned[ownerKey{bucket, inc}]), func(a, b store.EntryRef) int {
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
	if f.unreadable != nil && f.unreadable(bucket) {
		return 0, errLost
	}
	return int64(len(f.owned[ownerKey{bucket, inc}])), nil
}

// ConnMetas implements Store.
func (f *fakeStore) ConnMetas(_ context.Context, conns []string) ([]store.MetaValue, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	values := make([]store.MetaValue, len(conns))
	for i, c := range conns {
		f.metaReads[c]++
		if f.unreadable != nil && f.unreadable(f.bucket(c)) {
			return nil, errLost
		}
		values[i] = f.conns[c]
	}
	return values, nil
}

// do changes or reads the data of Redis.
func (f *fakeStore) do(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// causeCleanedUp marks the leaves that cleanUpExpired made.
const causeCleanedUp = store.Cause('r')

// cleanUpExpired ends entries with an expired key, as other servers do.
func (f *fakeStore) cleanUpExpired() {
	for room, members := range f.rooms {
		for conn, h := range members {
			if h.ttl > 0 && !h.until.After(time.Now()) && !f.handOver(room, conn, store.CauseSilent) {
				f.remove(room, conn, causeCleanedUp)
			}
		}
	}
}

// cleanUpDead cleans up after a dead incarnation, as other servers do.
func (f *fakeStore) cleanUpDead(inc string) {
	f.dead[inc] = true
	for room, members := range f.rooms {
		for conn, h := range members {
			if h.inc == inc && !f.handOver(room, conn, store.CauseServerLost) {
				f.remove(room, conn, store.CauseServerLost)
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

// flush removes everything.
func (f *fakeStore) flush() {
	clear(f.rooms)
	clear(f.conns)
	clear(f.owned)
	clear(f.number)
	clear(f.dead)
}
