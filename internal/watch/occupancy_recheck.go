package watch

import (
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/wait"
)

// maxAsking is the number of rooms of one OccupancySubscription about which guards are
// asked at the same time. A connection may have a thousand rooms.
const maxAsking = 16

// recheckOccupancyIn asks again about the numbers of a room ("": of all rooms) that a viewer
// knows. The caller holds mu, and Access is not closed.
func (a *Access) recheckOccupancyIn(viewer, room string) {
	for s := range a.counted.byViewer[viewer] {
		if room != "" {
			a.recheckOccupancy(s, room)
			continue
		}
		s.mu.Lock()
		list := make([]*countedRoom, 0, len(s.rooms))
		for _, r := range s.rooms {
			list = append(list, r)
		}
		s.mu.Unlock()
		for _, r := range list {
			a.recheckOccupancyOf(s, r)
		}
	}
}

// recheckOccupancy asks again about the numbers of a room, if they are subscribed to. The
// caller holds mu, and Access is not closed.
func (a *Access) recheckOccupancy(s *OccupancySubscription, room string) {
	s.mu.Lock()
	r := s.rooms[room]
	s.mu.Unlock()
	if r != nil {
		a.recheckOccupancyOf(s, r)
	}
}

// recheckOccupancyOf asks again about the numbers of a room. Until there is an answer, they
// are held back. The caller holds mu, and Access is not closed.
func (a *Access) recheckOccupancyOf(s *OccupancySubscription, r *countedRoom) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.again, r.paused = true, true
	if r.over || r.asking {
		return
	}
	r.asking = true
	s.due = append(s.due, r)
	if s.workers < maxAsking {
		s.workers++
		a.work.Go(func() { a.recheckDue(s) })
	}
}

// recheckDue carries out rechecks until none is due.
func (a *Access) recheckDue(s *OccupancySubscription) {
	for r := s.nextDue(nil); r != nil; {
		later := a.runOccupancyRecheck(s, r)
		if !later {
			r = nil
		}
		r = s.nextDue(r)
	}
}

// nextDue adds a room, unless it is nil, to those for which a recheck is due, and takes the
// first one. If there is none, the goroutine must end.
func (s *OccupancySubscription) nextDue(add *countedRoom) *countedRoom {
	s.mu.Lock()
	defer s.mu.Unlock()
	if add != nil {
		s.due = append(s.due, add)
	}
	if len(s.due) == 0 {
		s.due = nil
		s.workers--
		return nil
	}
	r := s.due[0]
	s.due = s.due[1:]
	return r
}

// runOccupancyRecheck asks the guards until there is an answer that is up to date. later
// says that they could not be asked, so that they must be asked again.
func (a *Access) runOccupancyRecheck(s *OccupancySubscription, r *countedRoom) (later bool) {
	asking := a.cfg.Cache.NewRetry()
	defer asking.End()
	for {
		if !a.spaceOutOccupancy(s, r) {
			return false
		}
		d, err := a.decide(a.life, s.Viewer, guards.Question{Room: r.name, Occupancy: true})
		again := s.finishRecheck(r, d.RecheckDue, err)
		if again {
			err = asking.Again(a.life)
		}
		if a.life.Err() != nil {
			err = errs.Closed // the guard has not decided
		}
		switch {
		case err != nil:
			a.endOccupancy(s, r, err)
			return false
		case again:
		case !d.RecheckDue:
			return false
		default: // the guards could not be asked a second ago
			return wait.For(a.life, guards.FailedFor) == nil
		}
	}
}

// finishRecheck delivers the numbers that were held back if the guards have said yes and
// nothing has changed since they were asked. It reports whether something has changed.
func (s *OccupancySubscription) finishRecheck(r *countedRoom, due bool, err error) (again bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case r.over:
	case r.again:
		return true
	case err == nil:
		r.asking = due
		s.resume(r, nil)
	}
	return false
}

// spaceOutOccupancy keeps guards.RecheckPause between the rechecks of a room. The recheck
// that follows covers what changes until it returns. It returns false if the subscription
// has ended.
func (a *Access) spaceOutOccupancy(s *OccupancySubscription, r *countedRoom) bool {
	s.mu.Lock()
	left := guards.RecheckPause - time.Since(r.rechecked)
	s.mu.Unlock()
	q := guards.Question{Room: r.name, Occupancy: true}
	if left > 0 && s.Viewer != "" && !a.cfg.Cache.Current(s.Viewer, a.cfg.Member(s.Viewer), q) {
		_ = wait.For(a.life, left)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r.rechecked, r.again = time.Now(), false
	return !r.over
}
