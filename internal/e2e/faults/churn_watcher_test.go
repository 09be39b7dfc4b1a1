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

// watcher applies the updates of all rooms that one connection received. Unlike a
// stream, it processes each update only once.
type watcher struct {
	name  string
	p     *harness.Peer
	rooms map[string]*roomLog
	read  int // number of processed updates
}

// roomLog is a watcher's view of one room.
type roomLog struct {
	now    harness.MemberStates
	last   map[string]uint64 // last seq, by epoch
	leaves map[string]int    // number of leaves, by connection
	err    error             // the first violation
}

func newWatcher(name string, p *harness.Peer, rooms []string) *watcher {
	w := &watcher{name: name, p: p, rooms: make(map[string]*roomLog)}
	for _, room := range rooms {
		first := follow(p, room).first
		a := &roomLog{now: harness.MemberStates{}, last: map[string]uint64{first.Epoch: first.Seq}, leaves: make(map[string]int)}
		for _, id := range first.IDs(p.T) {
			a.now[id] = string(first.States[id])
		}
		w.rooms[room] = a
	}
	return w
}

// catchUp applies the new updates and returns their number.
func (w *watcher) catchUp() int {
	w.p.Mu.Lock()
	unread := slices.Clone(w.p.Updates[w.read:])
	w.p.Mu.Unlock()
	for i, u := range unread {
		if a := w.rooms[u.RoomName]; a != nil && a.err == nil {
			a.err = a.take(u)
			if a.err != nil {
				a.err = fmt.Errorf("%s: update %d, %v (repair %v): %w", w.name, w.read+i, u, u.Repair, a.err)
			}
		}
	}
	w.read += len(unread)
	return len(unread)
}

func (a *roomLog) take(u harness.Update) error {
	if u.Seq < a.last[u.Epoch] {
		return fmt.Errorf("seq %d after %d", u.Seq, a.last[u.Epoch])
	}
	a.last[u.Epoch] = u.Seq
	if u.Type == "leave" {
		a.leaves[u.ConnectionID]++
	}
	return a.now.Apply(u)
}

// note records the entry that is expected after a call.
func (ct *churnTest) note(room, id string, w harness.WantedEntry) {
	ct.mu.Lock()
	defer ct.mu.Unlock()
	ct.record(id, fmt.Sprintf("expected in %s: %v %s", room, w.In, w.State))
	if w.In {
		ct.expected[room][id] = w.State
	} else {
		delete(ct.expected[room], id)
	}
}

// allowLeave allows every watcher one more leave of a connection.
func (ct *churnTest) allowLeave(id string) {
	ct.mu.Lock()
	defer ct.mu.Unlock()
	ct.allowedLeaves[id]++
	ct.record(id, "a leave is allowed")
	if ct.afterSave != nil {
		ct.afterSave[id] = struct{}{}
	}
}

// beginRollback starts to collect the connections that leave after the state to which
// Redis will return.
func (ct *churnTest) beginRollback() {
	ct.mu.Lock()
	defer ct.mu.Unlock()
	ct.afterSave = make(map[string]struct{})
}

// endRollback allows one more leave of each connection that left after the state to
// which Redis returned. Redis had its entry again, so the connection left a second
// time.
func (ct *churnTest) endRollback() {
	ct.mu.Lock()
	defer ct.mu.Unlock()
	for id := range ct.afterSave {
		ct.allowedLeaves[id]++
		ct.record(id, "one more leave is allowed, because Redis returned to an earlier state")
	}
	ct.afterSave = nil
}

// violation records a violation, which ends the test.
func (ct *churnTest) violation(format string, args ...any) {
	ct.mu.Lock()
	defer ct.mu.Unlock()
	ct.violations = append(ct.violations, fmt.Sprintf("%.1fs ", time.Since(ct.began).Seconds())+fmt.Sprintf(format, args...))
}

// compare returns the first difference between the expected entries and those in Redis
// or of a watcher. A violation, which waiting cannot repair, ends the test.
func (ct *churnTest) compare() string {
	ct.mu.Lock()
	want := make(map[string]harness.MemberStates, len(ct.expected))
	for room, s := range ct.expected {
		want[room] = maps.Clone(s)
	}
	violations := slices.Clone(ct.violations)
	ct.mu.Unlock()
	require.Empty(ct.T, violations, "violations")
	for _, room := range ct.rooms {
		records, _, err := ct.reads.Some(ct.T.Context(), room, -1)
		if err != nil {
			return err.Error()
		}
		now := harness.MemberStates{}
		for _, r := range records {
			now[r.Conn] = string(r.State)
		}
		if diff := now.Diff(want[room]); diff != "" {
			return fmt.Sprintf("Redis, %s: %s", room, diff)
		}
	}
	for _, w := range ct.watchers() {
		ct.report.updates += w.catchUp()
		for _, room := range ct.rooms {
			a := w.rooms[room]
			require.NoError(ct.T, a.err, "a watcher received an invalid update")
			if diff := a.now.Diff(want[room]); diff != "" {
				return fmt.Sprintf("%s, %s: %s", w.name, room, diff)
			}
		}
	}
	return ""
}

func (ct *churnTest) watchers() []*watcher {
	var list []*watcher
	for _, p := range ct.slots {
		list = append(list, p.watchers...)
	}
	return list
}

// checkLeaves checks that no watcher received more leaves than allowed, and that the
// watchers are still connected.
func (ct *churnTest) checkLeaves(what string) {
	ct.T.Helper()
	ct.mu.Lock()
	allowed := maps.Clone(ct.allowedLeaves)
	ct.mu.Unlock()
	for _, w := range ct.watchers() {
		select {
		case <-w.p.Ended:
			require.FailNow(ct.T, "a connection has ended after "+what, "%s: %v", w.name, w.p.Err())
		default:
		}
		for room, a := range w.rooms {
			for id, n := range a.leaves {
				require.LessOrEqual(ct.T, n, allowed[id], "after %q: %s received too many leaves of %s from %s:\n%s\nit received:\n%s",
					what, w.name, id, room, ct.historyOf(id), w.about(ct, id))
			}
		}
	}
}

// report contains the results of a run.
type report struct {
	schedule []string
	took     map[string][]time.Duration // recovery times, by fault
	updates  int                        // updates of all watchers, all checked
	calls    atomic.Int64
	slow     atomic.Int64 // delays of this process that detectStalls has found
}

func (r *report) recovered(fault string, took time.Duration) {
	if r.took == nil {
		r.took = make(map[string][]time.Duration)
	}
	r.took[fault] = append(r.took[fault], took)
}

// log logs the number of faults and the recovery times for each kind of fault.
func (r *report) log(ct *churnTest) {
	faults := 0
	for _, name := range slices.Sorted(maps.Keys(r.took)) {
		took := slices.Sorted(slices.Values(r.took[name]))
		faults += len(took)
		ct.T.Logf("%-28s %2d times, recovered after %6d ms, at worst %6d ms", name, len(took),
			took[len(took)/2].Milliseconds(), took[len(took)-1].Milliseconds())
	}
	ct.T.Logf("seed %d: %d faults, %d calls of %d connections, %d updates checked in %v, %d stalls of this process", ct.seed, faults,
		r.calls.Load(), len(ct.clients), r.updates, time.Since(ct.began).Round(time.Second), r.slow.Load())
}
