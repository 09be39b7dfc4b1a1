package watch

import (
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/wait"
)

// recheck is a recheck of one subscription.
type recheck struct{ again bool } // something has changed since the guards were asked; guarded by Access.mu

// RecheckViewer asks again about the subscriptions of a viewer, whose metadata has changed.
// It does not block.
func (a *Access) RecheckViewer(viewer string) { a.recheckViewerIn(viewer, "") }

// recheckViewerIn asks again about the subscriptions of a viewer to a room ("": to all
// rooms). Each subscription delivers nothing until it has an answer. It does not block.
func (a *Access) recheckViewerIn(viewer, room string) {
	if viewer == "" {
		return // no guard is asked about the app itself
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return
	}
	for s := range a.byViewer[viewer] {
		if room == "" || s.Room == room {
			a.recheckOne(s)
		}
	}
	a.recheckOccupancyIn(viewer, room)
}

// RecheckRooms asks again about the subscriptions to some rooms. This includes those of the
// app itself, because the rooms may not be tracked any more. It does not block.
func (a *Access) RecheckRooms(rooms []string) {
	for _, room := range rooms {
		a.mu.Lock()
		if !a.closed {
			for s := range a.byRoom[room] {
				a.recheckOne(s)
			}
			for s := range a.counted.byRoom[room] {
				a.recheckOccupancy(s, room)
			}
		}
		a.mu.Unlock()
	}
}

// recheckOne asks again about a subscription. The caller holds mu, and Access is not closed.
func (a *Access) recheckOne(s *Subscription) {
	s.pause()
	asking := a.byViewer[s.Viewer][s]
	if asking != nil {
		asking.again = true
		return
	}
	asking = &recheck{}
	a.byViewer[s.Viewer][s] = asking
	a.work.Go(func() { a.runRecheck(s, asking) })
}

// runRecheck runs until the subscription has an answer that is up to date.
func (a *Access) runRecheck(s *Subscription, r *recheck) {
	asking := a.cfg.Cache.NewRetry()
	defer asking.End()
	for {
		a.spaceOut(s, r)
		d, err := a.decide(a.life, s.Viewer, guards.Question{Room: s.Room})
		again := a.finishRecheck(s, r, d.RecheckDue, err)
		if again {
			err = asking.Again(a.life)
		}
		if a.life.Err() != nil {
			err = errs.Closed // the guard has not decided
		}
		switch {
		case err != nil:
			a.end(s, err)
			return
		case again:
		case !d.RecheckDue || s.IsOver() || wait.For(a.life, guards.FailedFor) != nil:
			return
		default: // the guards could not be asked a second ago
			asking.End()
		}
	}
}

// finishRecheck delivers the updates that were held back if the guards have said yes and
// nothing has changed since they were asked. It reports whether something has changed.
func (a *Access) finishRecheck(s *Subscription, r *recheck, due bool, err error) (again bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.again {
		return true
	}
	if ofViewer := a.byViewer[s.Viewer]; ofViewer[s] == r && !due {
		ofViewer[s] = nil
	}
	if err == nil {
		s.resume()
	}
	return false
}

// spaceOut keeps guards.RecheckPause between the rechecks of a subscription. The recheck
// that follows covers what changes until spaceOut returns.
func (a *Access) spaceOut(s *Subscription, r *recheck) {
	a.mu.Lock()
	left := guards.RecheckPause - time.Since(s.rechecked)
	a.mu.Unlock()
	if left > 0 && s.Viewer != "" && !a.cfg.Cache.Current(s.Viewer, a.cfg.Member(s.Viewer), guards.Question{Room: s.Room}) {
		_ = wait.For(a.life, left)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s.rechecked, r.again = time.Now(), false
}
