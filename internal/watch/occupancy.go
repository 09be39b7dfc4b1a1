package watch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/occupancy"
)

// Numbers is what Access needs of an *occupancy.Rooms.
type Numbers interface {
	Watch(ctx context.Context, w occupancy.Watcher, rooms []string) []occupancy.Result
	Unwatch(w occupancy.Watcher, rooms ...string) int
}

// OccupancyOutput receives the numbers of rooms. Its methods are called one at a time, and
// must not block.
type OccupancyOutput interface {
	Update(u *occupancy.Update)
	// Ended is called if the subscription to a room has ended by itself.
	Ended(room string, err error)
}

// OccupancySubscription is the request of a viewer to know the numbers of any number of
// rooms. It is an occupancy.Watcher that holds numbers back while the guards of their room
// are asked. The exported fields must not be changed after the first call of
// SubscribeOccupancy. Calls of SubscribeOccupancy and UnsubscribeOccupancy for one
// OccupancySubscription must follow each other.
type OccupancySubscription struct {
	Viewer string // id of a connection; empty: the app itself, about which no guard is asked
	Out    OccupancyOutput

	before func() // see Config.Before

	mu      sync.Mutex // guards the fields below, and calls of Out
	rooms   map[string]*countedRoom
	due     []*countedRoom // wait for a recheck
	workers int            // goroutines that carry out rechecks
}

// countedRoom is the subscription to one room. OccupancySubscription.mu guards its fields.
type countedRoom struct {
	name   string
	paused bool              // numbers are held back
	held   *occupancy.Update // the last of them
	asking bool              // the guards are asked, or will be soon
	again  bool              // something has changed since they were asked
	over   bool              // it has ended
	gone   chan struct{}     // closed when it is not in rooms any more; nil: no call waits for that

	rechecked time.Time // when a recheck last asked the guards
}

// OccupancyResult is the beginning of the subscription to one room.
type OccupancyResult struct {
	Room   string
	Update *occupancy.Update
	Err    error // the subscription has not begun
}

// occupancyIndex finds the OccupancySubscriptions of viewers and rooms.
type occupancyIndex struct {
	byViewer, byRoom map[string]map[*OccupancySubscription]struct{}
}

// Rooms returns the number of rooms.
func (s *OccupancySubscription) Rooms() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.rooms)
}

// With returns the number of rooms that there would be with these. It counts no room twice.
func (s *OccupancySubscription) With(rooms []string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.rooms)
	for _, name := range rooms {
		if s.rooms[name] == nil {
			n++
		}
	}
	return n
}

// Has reports whether the room is one of these.
func (s *OccupancySubscription) Has(room string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rooms[room] != nil
}

// Deliver implements occupancy.Watcher.
func (s *OccupancySubscription) Deliver(u *occupancy.Update) {
	s.before()
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.rooms[u.Room]
	switch {
	case r == nil || r.over:
	case !r.paused:
		s.Out.Update(u)
	default:
		r.held = u // later than those before
	}
}

// resume delivers the numbers that were held back, unless the viewer has later ones. The
// caller holds mu.
func (s *OccupancySubscription) resume(r *countedRoom, has *occupancy.Update) {
	u := r.held
	r.paused, r.held = false, nil
	if u != nil && (has == nil || u.After(has)) {
		s.Out.Update(u)
	}
}

// SubscribeOccupancy adds rooms, each given once. ready gets the results in the order of
// the rooms, before any later numbers. It must not block. A room that was subscribed to
// begins again, and is not subscribed to any more if its result has an error. Ended is not
// called for it. If SubscribeOccupancy returns an error, ready is not called.
func (a *Access) SubscribeOccupancy(ctx context.Context, s *OccupancySubscription, rooms []string, ready func([]OccupancyResult)) error {
	// As in Watch, the rooms are added first, so that every later change is noticed.
	list, err := a.addOccupancy(s, rooms)
	if err != nil {
		return err
	}
	if err := a.cfg.CheckViewer(s.Viewer); err != nil {
		for _, r := range list {
			a.endOccupancy(s, r, nil)
		}
		return a.cfg.ToError(ctx, err)
	}
	b := beginning{Access: a, s: s, list: list, results: make([]OccupancyResult, len(list)), answers: make([]guards.Decision, len(list))}
	b.ask(ctx, true)
	b.read(ctx)
	b.confirm(ctx)
	for i, result := range b.results {
		if result.Err != nil {
			a.endOccupancy(s, list[i], nil)
			b.results[i].Err = a.cfg.ToError(ctx, result.Err)
		}
	}
	b.open(ready)
	for _, result := range b.results {
		a.EndIfRefused(s.Viewer, result.Room, result.Err) // the viewer's other subscriptions
	}
	return nil
}

// beginning is the work of SubscribeOccupancy. A room whose result has an error is left
// out from then on.
type beginning struct {
	*Access
	s       *OccupancySubscription
	list    []*countedRoom
	results []OccupancyResult
	answers []guards.Decision
}

// ask asks the guards of all rooms. If fresh, old answers do not count. Otherwise the
// answer that was got before does, while it stands.
func (b *beginning) ask(ctx context.Context, fresh bool) {
	b.s.mu.Lock()
	for _, r := range b.list {
		r.again = false
	}
	b.s.mu.Unlock()
	next := make(chan int, len(b.list))
	for i := range b.list {
		next <- i
	}
	close(next)
	work := func() {
		for i := range next {
			if b.results[i].Err != nil {
				continue
			}
			q := guards.Question{Room: b.list[i].name}
			if q.Last = b.answers[i].By; fresh {
				q = guards.Fresh(q.Room)
			}
			q.Occupancy = true
			b.answers[i], b.results[i].Err = b.decide(ctx, b.s.Viewer, q)
		}
	}
	var others sync.WaitGroup
	for range min(len(b.list), maxAsking) - 1 {
		others.Go(work)
	}
	work()
	others.Wait()
}

// read reads the numbers of the rooms.
func (b *beginning) read(ctx context.Context) {
	var names []string
	var indexes []int
	var limit time.Duration
	for i, r := range b.list {
		b.results[i].Room = r.name
		if b.results[i].Err == nil {
			names, indexes = append(names, r.name), append(indexes, i)
			limit = max(limit, b.cfg.EarlyLimit(r.name))
		}
	}
	if len(names) == 0 {
		return
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for k, got := range b.cfg.Numbers.Watch(limited, b.s, names) {
		to := &b.results[indexes[k]]
		to.Update = got.Update
		switch {
		case got.Err == nil:
		case errors.Is(got.Err, occupancy.ErrStopped), errors.Is(got.Err, occupancy.ErrUnwatched):
			to.Err = errs.Closed
		case ctx.Err() == nil:
			to.Err = fmt.Errorf("%w: %w", errs.Unavailable, got.Err)
		default:
			to.Err = got.Err
		}
	}
	b.unwatchEnded(names)
}

// unwatchEnded ends the watch of rooms whose subscription ended before the watch began.
func (b *beginning) unwatchEnded(names []string) {
	var ended []string
	b.s.mu.Lock()
	for _, name := range names {
		if r := b.s.rooms[name]; r == nil || r.over {
			ended = append(ended, name)
		}
	}
	b.s.mu.Unlock()
	b.cfg.Numbers.Unwatch(b.s, ended...)
}

// confirm asks the guards until nothing has changed since. While the numbers were read,
// anything may have.
func (b *beginning) confirm(ctx context.Context) {
	asking := b.cfg.Cache.NewRetry()
	defer asking.End()
	for b.ask(ctx, false); b.changed(); b.ask(ctx, false) {
		if err := asking.Again(ctx); err != nil {
			b.fail(err)
		}
	}
}

// changed reports whether something has changed since the guards were asked.
func (b *beginning) changed() (changed bool) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	for i, r := range b.list {
		if r.over && b.results[i].Err == nil {
			b.results[i].Err = errs.Closed
		}
		changed = changed || r.again && b.results[i].Err == nil
	}
	return changed
}

// fail gives the rooms about which the guards have no lasting answer an error.
func (b *beginning) fail(err error) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	for i, r := range b.list {
		if r.again && b.results[i].Err == nil {
			b.results[i].Err = err
		}
	}
}

// open hands the results to ready, and then delivers the numbers that have come since.
func (b *beginning) open(ready func([]OccupancyResult)) {
	var due []*countedRoom
	b.s.mu.Lock()
	ready(b.results)
	for i, r := range b.list {
		switch {
		case b.results[i].Err != nil || r.over:
		case r.again: // the answer was about to be sent
			due = append(due, r)
		default:
			b.s.resume(r, b.results[i].Update)
			if b.answers[i].RecheckDue {
				due = append(due, r)
			}
		}
		r.asking = false
	}
	b.s.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	for _, r := range due {
		b.recheckOccupancyOf(b.s, r)
	}
}

// UnsubscribeOccupancy ends the subscription to rooms, and returns how many there were.
// Ended is not called.
func (a *Access) UnsubscribeOccupancy(s *OccupancySubscription, rooms ...string) (ended int) {
	for _, name := range rooms {
		s.mu.Lock()
		r := s.rooms[name]
		s.mu.Unlock()
		if r != nil && a.endOccupancy(s, r, nil) {
			ended++
		}
	}
	return ended
}

// CloseOccupancy ends the subscription to all rooms. Ended is called for each if err is
// not nil.
func (a *Access) CloseOccupancy(s *OccupancySubscription, err error) {
	s.mu.Lock()
	list := make([]*countedRoom, 0, len(s.rooms))
	for _, r := range s.rooms {
		list = append(list, r)
	}
	s.mu.Unlock()
	for _, r := range list {
		a.endOccupancy(s, r, err)
	}
}

// addOccupancy adds rooms, about which the caller asks the guards.
func (a *Access) addOccupancy(s *OccupancySubscription, rooms []string) ([]*countedRoom, error) {
	a.UnsubscribeOccupancy(s, rooms...)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, errs.Closed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.before == nil { // set once, because Deliver reads it without the lock
		s.before = a.cfg.Before
	}
	if s.rooms == nil {
		s.rooms = make(map[string]*countedRoom)
	}
	list := make([]*countedRoom, len(rooms))
	for i, name := range rooms {
		list[i] = &countedRoom{name: name, paused: true, asking: true}
		s.rooms[name] = list[i]
		put(&a.counted.byRoom, name, s)
	}
	if len(rooms) > 0 {
		put(&a.counted.byViewer, s.Viewer, s)
	}
	return list, nil
}

// endOccupancy ends the subscription to a room. Ended is called if err is not nil. It
// returns false if another call has ended the subscription. In any case it has ended when
// endOccupancy returns, so that another one may begin.
func (a *Access) endOccupancy(s *OccupancySubscription, r *countedRoom, err error) bool {
	if !s.beginEnd(r) {
		return false
	}
	a.cfg.Numbers.Unwatch(s, r.name) // without locks, because they are taken during deliveries
	a.mu.Lock()
	defer a.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	drop(a.counted.byRoom, r.name, s)
	if delete(s.rooms, r.name); len(s.rooms) == 0 {
		s.rooms = nil
		drop(a.counted.byViewer, s.Viewer, s)
	}
	if r.gone != nil {
		close(r.gone)
	}
	if err != nil {
		s.Out.Ended(r.name, err)
	}
	return true
}

// beginEnd marks a room as over. If another call has done so, beginEnd waits until that is
// done, and returns false.
func (s *OccupancySubscription) beginEnd(r *countedRoom) bool {
	s.mu.Lock()
	if !r.over {
		r.over, r.held = true, nil
		s.mu.Unlock()
		return true
	}
	if s.rooms[r.name] != r {
		s.mu.Unlock()
		return false
	}
	if r.gone == nil {
		r.gone = make(chan struct{})
	}
	gone := r.gone
	s.mu.Unlock()
	<-gone // soon: ending waits for nothing but locks
	return false
}

// forgetOccupancy ends the subscriptions of a connection that has gone.
func (a *Access) forgetOccupancy(viewer string) {
	a.mu.Lock()
	list := keysOf(a.counted.byViewer[viewer])
	a.mu.Unlock()
	for _, s := range list {
		a.CloseOccupancy(s, errs.Closed)
	}
}

// put adds a subscription to a map of an index.
func put(m *map[string]map[*OccupancySubscription]struct{}, key string, s *OccupancySubscription) {
	if *m == nil {
		*m = make(map[string]map[*OccupancySubscription]struct{})
	}
	of := (*m)[key]
	if of == nil {
		of = make(map[*OccupancySubscription]struct{})
		(*m)[key] = of
	}
	of[s] = struct{}{}
}

// drop removes a subscription from a map of an index.
func drop(m map[string]map[*OccupancySubscription]struct{}, key string, s *OccupancySubscription) {
	of := m[key]
	if delete(of, s); len(of) == 0 {
		delete(m, key)
	}
}

func keysOf(m map[*OccupancySubscription]struct{}) []*OccupancySubscription {
	list := make([]*OccupancySubscription, 0, len(m))
	for s := range m {
		list = append(list, s)
	}
	return list
}
