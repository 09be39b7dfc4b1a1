package sim

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/testhook"
)

// simStream is one subscription, with the updates that it received.
type simStream struct {
	s      *sim
	server *simServer
	room   string
	name   string
	early  bool // like a socket's subscription: if Redis is away, its snapshot may be stale
	cancel context.CancelFunc

	// Guarded by sim.mu.
	live    bool // has its snapshot
	over    bool
	began   time.Time
	seen    map[string]string // state by connection; "" without a state
	seqs    map[string]uint64
	used    map[*simReason]bool
	history []string
}

func (st *simStream) run(ctx context.Context) {
	for ev, err := range st.events(ctx) {
		st.s.mu.Lock()
		switch {
		case st.server.dead || st.over:
		case err != nil:
			unavailable := !st.early && errors.Is(err, mesh.ErrUnavailable)
			if !st.live && !unavailable && ctx.Err() == nil || st.live && ctx.Err() == nil && !errors.Is(err, mesh.ErrClosed) {
				st.fail("ended with %v", err)
			}
			st.over = true
		default:
			st.take(ev)
		}
		st.s.mu.Unlock()
	}
	st.s.mu.Lock()
	st.over = true
	st.s.mu.Unlock()
}

func (st *simStream) events(ctx context.Context) iter.Seq2[mesh.Event, error] {
	p := st.server.p
	if !st.early {
		return p.Subscribe(ctx, st.room, mesh.SubscribeOptions{})
	}
	return func(yield func(mesh.Event, error) bool) {
		testhook.SubscribeEarly(ctx, p, st.room, func(e any, err error) bool { return yield(e.(mesh.Event), err) })
	}
}

func (st *simStream) fail(format string, args ...any) {
	st.s.fail("%s of %s: %s", st.name, st.room, fmt.Sprintf(format, args...))
	for _, line := range st.history[max(0, len(st.history)-40):] {
		st.s.trace = append(st.s.trace, "    received "+line)
	}
}

// take checks the next update. s.mu is held.
func (st *simStream) take(ev mesh.Event) {
	now := time.Now()
	line := fmt.Sprintf("[%v] %s %s %s %s/%d repair=%v", st.s.at(), ev.Type, ev.ConnectionID, ev.State, ev.Epoch, ev.Seq, ev.Repair)
	st.history = append(st.history, line)
	if ev.Type != mesh.EventSnapshot && !st.live {
		st.fail("first event is %s", line)
		return
	}
	if ev.Seq < st.seqs[ev.Epoch] {
		st.fail("seq went back from %d: %s", st.seqs[ev.Epoch], line)
	}
	st.seqs[ev.Epoch] = ev.Seq
	st.s.counts[string(ev.Type)]++
	if ev.Repair {
		st.s.counts["repairs"]++
	}
	st.checkTime(ev, now, line)
	state, present := st.seen[ev.ConnectionID]
	switch ev.Type {
	case mesh.EventSnapshot:
		st.snapshot(ev, now)
	case mesh.EventJoin:
		if present {
			st.fail("join of a member: %s", line)
		}
		st.seen[ev.ConnectionID] = ""
		st.checkPresent(ev.ConnectionID, now)
	case mesh.EventLeave:
		if !present {
			st.fail("leave of an absent connection: %s", line)
		}
		delete(st.seen, ev.ConnectionID)
		st.checkLeave(ev.ConnectionID, now, line)
	case mesh.EventState:
		e := st.s.entry(simKey{st.room, ev.ConnectionID})
		switch {
		case !present:
			st.fail("state of an absent connection: %s", line)
		case ev.State == nil && state == "" && !e.hadSilentState:
			st.fail("state null twice: %s", line)
		case string(ev.State) == state && !e.hadSilentState: // no two states are the same
			st.fail("the same state twice: %s", line)
		}
		st.seen[ev.ConnectionID] = string(ev.State)
	}
}

// checkTime checks the time of an update, which must be that of Redis, whatever the
// clocks of servers show.
func (st *simStream) checkTime(ev mesh.Event, now time.Time, line string) {
	s := st.s
	if ev.Type == mesh.EventSnapshot || now.Sub(s.stepped) < s.recovery() || !st.server.outSince.IsZero() {
		return
	}
	if ev.Repair && ev.Type == mesh.EventJoin && !s.stepped.IsZero() {
		return // its time is that of the join, by the clock before the step
	}
	at := ev.Time.Sub(now.Add(s.ahead))
	if at > 500*time.Millisecond { // the error of a clock reading may be that large
		st.fail("an update from the future, %v: %s", at, line)
	}
	if ev.Repair && ev.Type != mesh.EventJoin && at < -s.lease && now.Sub(s.lastOutage) > s.lease {
		st.fail("a repair from the past, %v: %s", at, line)
	}
}

func (st *simStream) snapshot(ev mesh.Event, now time.Time) {
	if st.live {
		st.fail("a second snapshot")
	}
	st.live = true
	if ev.Snapshot.Stale {
		st.s.counts["stale snapshots"]++
	}
	if ev.Snapshot.Epoch == "" && ev.Snapshot.Stale {
		st.s.counts["snapshots of rooms not read"]++
	}
	if took := now.Sub(st.began); took > simAnswered && st.server.resume == nil {
		st.fail("has its snapshot after %v", took)
	}
	for _, m := range ev.Snapshot.Members {
		if _, twice := st.seen[m.ID]; twice {
			st.fail("%s twice in a snapshot", m.ID)
		}
		st.history = append(st.history, "    with "+m.ID+" "+string(m.State))
		st.seen[m.ID] = string(m.State)
		if !ev.Snapshot.Stale {
			st.checkPresent(m.ID, now)
		}
	}
}

// checkLeave looks for a reason for a leave.
func (st *simStream) checkLeave(conn string, now time.Time, line string) {
	e := st.s.entry(simKey{st.room, conn})
	for _, t := range e.reasons {
		if !st.used[t] && !now.Before(t.from) && (t.until.IsZero() || !now.After(t.until)) {
			st.used[t] = true
			return
		}
	}
	st.fail("leave of %s without a reason: %s", conn, line)
	for _, t := range e.reasons {
		st.s.trace = append(st.s.trace, fmt.Sprintf("    reason %s from %v until %v used %v", t.text,
			t.from.Sub(st.s.start), t.until.Sub(st.s.start), st.used[t]))
	}
}

// checkPresent checks that a member has not left long ago.
func (st *simStream) checkPresent(conn string, now time.Time) {
	s := st.s
	c := s.clients[conn]
	if c == nil {
		st.fail("unknown connection %q", conn)
		return
	}
	f := s.fact(simKey{st.room, conn}, now)
	if f.present {
		return
	}
	known := f.since
	for _, t := range []time.Time{c.server.lastOut, st.server.lastOut, s.lastOutage, s.restored} {
		if t.After(known) {
			known = t
		}
	}
	if now.Sub(known) > s.lease+5*time.Second {
		st.fail("%s is reported as a member, but left %v ago", conn, now.Sub(f.since))
	}
}

// differs compares the updates of the subscriber with the truth, except for changes
// within the last forSome. It returns the first difference, or "".
func (st *simStream) differs(now time.Time, forSome time.Duration) string {
	for conn := range st.s.clients {
		f := st.s.fact(simKey{st.room, conn}, now)
		state, present := st.seen[conn]
		switch {
		case forSome > 0 && (now.Sub(f.since) < forSome || f.present && now.Sub(f.stated) < forSome):
		case present != f.present:
			return fmt.Sprintf("%s: received present=%v, should be %v since %v", conn, present, f.present, f.since.Sub(st.s.start))
		case present && !f.silentState && !f.has(state):
			return fmt.Sprintf("%s: received state %q, should be %q since %v", conn, state, f.state, f.stated.Sub(st.s.start))
		}
	}
	return ""
}
