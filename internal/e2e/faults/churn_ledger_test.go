//go:build unix

package faults

import (
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// ledger is what one watcher has been told of all rooms. Unlike stream it goes
// on from where it stopped.
type ledger struct {
	where string
	p     *harness.Peer
	rooms map[string]*account
	read  int // updates
}

// account is a ledger's view of one room.
type account struct {
	now    harness.Sight
	last   map[string]uint64 // seq, by epoch
	leaves map[string]int    // told, by connection
	err    error             // the first thing that must not be
}

func newLedger(where string, p *harness.Peer, rooms []string) *ledger {
	l := &ledger{where: where, p: p, rooms: make(map[string]*account)}
	for _, room := range rooms {
		first := follow(p, room).first
		a := &account{now: harness.Sight{}, last: map[string]uint64{first.Epoch: first.Seq}, leaves: make(map[string]int)}
		for _, id := range first.IDs(p.T) {
			a.now[id] = string(first.States[id])
		}
		l.rooms[room] = a
	}
	return l
}

// catchUp takes in what has come since, and returns how much it was.
func (l *ledger) catchUp() int {
	l.p.Mu.Lock()
	news := slices.Clone(l.p.Updates[l.read:])
	l.p.Mu.Unlock()
	for i, u := range news {
		if a := l.rooms[u.RoomName]; a != nil && a.err == nil {
			a.err = a.take(u)
			if a.err != nil {
				a.err = fmt.Errorf("%s: update %d, %v (repair %v): %w", l.where, l.read+i, u, u.Repair, a.err)
			}
		}
	}
	l.read += len(news)
	return len(news)
}

func (a *account) take(u harness.Update) error {
	if u.Seq < a.last[u.Epoch] {
		return fmt.Errorf("seq %d after %d", u.Seq, a.last[u.Epoch])
	}
	a.last[u.Epoch] = u.Seq
	if u.Type == "leave" {
		a.leaves[u.ConnectionID]++
	}
	return a.now.Take(u)
}

// note keeps what is wanted after a call.
func (st *storm) note(room, id string, w harness.Wish) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.tell(id, fmt.Sprintf("is to be in %s: %v %s", room, w.In, w.State))
	if w.In {
		st.truth[room][id] = w.State
	} else {
		delete(st.truth[room], id)
	}
}

// departing notes that everybody may be told once more that a connection left.
func (st *storm) departing(id string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.departs[id]++
	st.tell(id, "may be told to have left")
	if st.since != nil {
		st.since[id] = struct{}{}
	}
}

// goesBack begins to note who departs after what Redis will go back to.
func (st *storm) goesBack() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.since = make(map[string]struct{})
}

// rollback: where acknowledged writes were lost, whoever departed after them
// was there again, and had to be told to have left once more.
func (st *storm) rollback() {
	st.mu.Lock()
	defer st.mu.Unlock()
	for id := range st.since {
		st.departs[id]++
		st.tell(id, "may be told to have left once more, since Redis went back")
	}
	st.since = nil
}

// wrong notes what must not be.
func (st *storm) wrong(format string, args ...any) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.faulty = append(st.faulty, fmt.Sprintf("%.1fs ", time.Since(st.began).Seconds())+fmt.Sprintf(format, args...))
}

// compare says what does not fit: Redis, and what every watcher has been told,
// must be what is wanted. What no time can mend ends the test.
func (st *storm) compare() string {
	st.mu.Lock()
	want := make(map[string]harness.Sight, len(st.truth))
	for room, s := range st.truth {
		want[room] = maps.Clone(s)
	}
	faulty := slices.Clone(st.faulty)
	st.mu.Unlock()
	require.Empty(st.T, faulty, "what must not be")
	for _, room := range st.rooms {
		records, _, err := st.reads.Some(st.T.Context(), room, -1)
		if err != nil {
			return err.Error()
		}
		now := harness.Sight{}
		for _, r := range records {
			now[r.Conn] = string(r.State)
		}
		if diff := now.Differs(want[room]); diff != "" {
			return fmt.Sprintf("Redis, %s: %s", room, diff)
		}
	}
	for _, l := range st.ledgers() {
		st.report.updates += l.catchUp()
		for _, room := range st.rooms {
			a := l.rooms[room]
			require.NoError(st.T, a.err, "what a watcher is told")
			if diff := a.now.Differs(want[room]); diff != "" {
				return fmt.Sprintf("%s, %s: %s", l.where, room, diff)
			}
		}
	}
	return ""
}

func (st *storm) ledgers() []*ledger {
	var list []*ledger
	for _, p := range st.posts {
		list = append(list, p.ledgers...)
	}
	return list
}

// once checks that no watcher was told of a leave more often than there was
// reason to, and that the watchers' own connections stand.
func (st *storm) once(what string) {
	st.T.Helper()
	st.mu.Lock()
	departs := maps.Clone(st.departs)
	st.mu.Unlock()
	for _, l := range st.ledgers() {
		select {
		case <-l.p.Ended:
			require.FailNow(st.T, "a connection has ended after "+what, "%s: %v", l.where, l.p.Err)
		default:
		}
		for room, a := range l.rooms {
			for id, n := range a.leaves {
				require.LessOrEqual(st.T, n, departs[id], "after %q: %s was told so often that %s left %s:\n%s\nit was told:\n%s",
					what, l.where, id, room, st.story(id), l.about(st, id))
			}
		}
	}
}

// report is what a storm comes to.
type report struct {
	schedule []string
	took     map[string][]time.Duration // by fault
	updates  int                        // told to watchers, all checked
	calls    atomic.Int64
	slow     atomic.Int64 // times that the machine was
}

func (r *report) recovered(fault string, took time.Duration) {
	if r.took == nil {
		r.took = make(map[string][]time.Duration)
	}
	r.took[fault] = append(r.took[fault], took)
}

// log says what happened, and how long after each kind of fault everything was
// as it should be.
func (r *report) log(st *storm) {
	faults := 0
	for _, name := range slices.Sorted(maps.Keys(r.took)) {
		took := slices.Sorted(slices.Values(r.took[name]))
		faults += len(took)
		st.T.Logf("%-28s %2d times, as it should be after %6d ms, at worst %6d ms", name, len(took),
			took[len(took)/2].Milliseconds(), took[len(took)-1].Milliseconds())
	}
	st.T.Logf("seed %d: %d faults, %d calls of %d connections, %d updates checked in %v, held up %d times", st.seed, faults,
		r.calls.Load(), len(st.souls), r.updates, time.Since(st.began).Round(time.Second), r.slow.Load())
}
