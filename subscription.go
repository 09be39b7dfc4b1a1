package mesh

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/wire"
)

// outlet is where a subscription's events go: a socket or an iterator. Its
// methods are called one at a time, in order, and must not block.
type outlet interface {
	snapshot(v hub.View)
	update(u *wire.Update)
	// ended comes last: nothing follows it. It may come without a snapshot
	// before it.
	ended(err error)
}

// subscription is one connection's (or the app's own) watching of one room. It
// is a hub.Sink that holds events back while its guards are asked again.
type subscription struct {
	room   string
	viewer string // connection id; empty: the app itself, about which no guard is asked
	out    outlet
	most   int    // bytes that may be held back; negative: no bound
	before func() // is called before each event; nil: not yet added to watchers

	mu      sync.Mutex // guards the fields below, and calls of out
	holding bool
	held    []parcel
	bytes   int
	over    bool

	rechecked time.Time // when its guards were last asked by a recheck; guarded by watchers.mu
}

// parcel is a snapshot or an update.
type parcel struct {
	view   *hub.View
	update *wire.Update
}

// errHeldTooMuch ends a subscription whose guard thought for so long that too
// much came meanwhile.
var errHeldTooMuch = errors.New("mesh: too much happened while a guard was asked")

// ready takes the snapshot, before any update.
func (s *subscription) ready(v hub.View) { s.take(parcel{view: &v}, 0) }

// Deliver implements hub.Sink.
func (s *subscription) Deliver(u *wire.Update) {
	if s.before != nil {
		s.before()
	}
	s.take(parcel{update: u}, 128+len(u.Metadata)+len(u.State))
}

func (s *subscription) take(p parcel, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.over:
	case !s.holding:
		s.pass(p)
	case s.most >= 0 && s.bytes+size > s.most:
		s.finishLocked(errHeldTooMuch)
	default:
		s.held = append(s.held, p)
		s.bytes += size
	}
}

func (s *subscription) pass(p parcel) {
	if p.view != nil {
		s.out.snapshot(*p.view)
		return
	}
	s.out.update(p.update)
}

// hold keeps back what comes from now on, until release or finish.
func (s *subscription) hold() {
	s.mu.Lock()
	s.holding = true
	s.mu.Unlock()
}

// release passes on what was held back.
func (s *subscription) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holding = false
	for _, p := range s.held {
		s.pass(p)
	}
	s.held, s.bytes = nil, 0
}

// finish ends the subscription for its watcher; true: by this call.
func (s *subscription) finish(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.finishLocked(err)
}

func (s *subscription) finishLocked(err error) bool {
	if s.over {
		return false
	}
	s.over, s.held, s.bytes = true, nil, 0
	s.out.ended(err)
	return true
}

func (s *subscription) isOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// watchers are the subscriptions on this server. They ask the guards of each again
// if something changes that guards look at (recheck.go).
type watchers struct {
	n    *node
	work sync.WaitGroup // rechecks under way

	life context.Context // of the askers
	quit context.CancelFunc

	mu       sync.Mutex // guards the fields below
	closed   bool
	byViewer map[string]map[*subscription]*recheck // nil: no recheck is under way
	byRoom   map[string]map[*subscription]struct{}
}

func newWatchers(n *node) *watchers {
	w := &watchers{n: n, byViewer: make(map[string]map[*subscription]*recheck), byRoom: make(map[string]map[*subscription]struct{})}
	w.life, w.quit = context.WithCancel(n.life)
	return w
}

// watch starts a subscription: guard, snapshot, events. Until it has returned
// nil the outlet has got nothing but perhaps the snapshot and what follows it;
// after an error it will get nothing.
func (w *watchers) watch(ctx context.Context, s *subscription) error {
	// Known before its guard is asked: metadata that changes from now on asks
	// again.
	if err := w.add(s); err != nil {
		return err
	}
	err := w.n.watcher(s.viewer)
	var d decision
	if err == nil {
		d, err = w.n.sees(ctx, s.viewer, fresh(s.room))
	}
	if err == nil {
		err = w.mirror(ctx, s)
	}
	if err != nil {
		s.silence()
		w.remove(s)
		return w.n.errorFor(ctx, err)
	}
	if s.isOver() { // a recheck has ended it; the outlet has been told
		w.n.hub.Unwatch(s.room, s)
	} else if d.owed {
		w.recheckRoom(s.viewer, s.room)
	}
	return nil
}

// mirror has the hub deliver to the subscription. It gives up when Redis has
// not answered for as long as any call may take.
func (w *watchers) mirror(ctx context.Context, s *subscription) error {
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	err := w.n.hub.Watch(limited, s.room, s, s.ready)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

// silence ends the subscription without a word.
func (s *subscription) silence() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.over
	s.over, s.held = true, nil
	return !was
}

// unwatch ends a subscription that its watcher does not want any more.
func (w *watchers) unwatch(s *subscription) {
	s.silence()
	w.remove(s)
	w.n.hub.Unwatch(s.room, s)
}

// end ends a subscription and tells the watcher why.
func (w *watchers) end(s *subscription, err error) {
	s.finish(err)
	w.remove(s)
	w.n.hub.Unwatch(s.room, s)
}

func (w *watchers) add(s *subscription) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return ErrClosed
	}
	set := w.byViewer[s.viewer]
	if set == nil {
		set = make(map[*subscription]*recheck)
		w.byViewer[s.viewer] = set
	}
	set[s] = nil
	s.before = w.n.beforeEvent
	w.enterRoom(s)
	return nil
}

func (w *watchers) remove(s *subscription) {
	w.mu.Lock()
	defer w.mu.Unlock()
	set := w.byViewer[s.viewer]
	delete(set, s)
	if len(set) == 0 {
		delete(w.byViewer, s.viewer)
	}
	w.leaveRoom(s)
}

// of returns a viewer's subscriptions.
func (w *watchers) of(viewer string) []*subscription {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := make([]*subscription, 0, len(w.byViewer[viewer]))
	for s := range w.byViewer[viewer] {
		list = append(list, s)
	}
	return list
}

// forget ends all subscriptions of a connection that has gone. They are told:
// an iterator on behalf of the connection would wait for ever otherwise.
func (w *watchers) forget(viewer string) {
	for _, s := range w.of(viewer) {
		w.end(s, ErrClosed)
	}
}

// close ends every subscription and waits for the askers.
func (w *watchers) close() {
	w.mu.Lock()
	w.closed = true
	var all []*subscription
	for _, set := range w.byViewer {
		for s := range set {
			all = append(all, s)
		}
	}
	w.mu.Unlock()
	for _, s := range all {
		w.end(s, ErrClosed)
	}
	w.quit() // guards that are being asked
	w.work.Wait()
}
