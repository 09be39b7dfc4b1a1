package kept

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// searchEvery is the interval between two searches of one server.
	searchEvery = 10 * time.Minute
	// overdueBy is the time since its deadline after which a place counts as lost from the
	// index.
	overdueBy = time.Minute
)

// searchLocked begins a search if one is due. Servers do so at different times.
func (s *Sweeper) searchLocked() {
	now := time.Now()
	switch {
	case s.searching || s.stopped:
	case s.searchAt.IsZero():
		s.searchAt = now.Add(rand.N(searchEvery))
	case now.After(s.searchAt):
		s.searching = true
		s.work.Go(s.search)
	}
}

// search finds overdue places by the records of rooms, because the index may have lost
// them, if a person deleted it or Redis evicted it.
func (s *Sweeper) search() {
	now, ok := s.cfg.Clock()
	var err error
	if ok {
		ctx, cancel := context.WithTimeout(s.life, searchEvery)
		defer cancel()
		err = s.cfg.Store.OverduePlaces(ctx, now-overdueBy.Milliseconds(), func(p store.KeptPlace) {
			s.Add(p.Room, p.Conn, p.Entry, p.Until)
		})
	}
	if err != nil && s.life.Err() == nil {
		s.cfg.Logger.Debug("mesh: lost kept places not looked for", "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.searching, s.searchAt = false, time.Now().Add(searchEvery)
}
