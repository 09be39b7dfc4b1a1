package watch

import (
	"errors"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/wire"
)

// Output receives the snapshot and the updates of a subscription. Its methods are called
// one at a time, in order, and must not block.
type Output interface {
	Snapshot(v hub.View)
	Update(u *wire.Update)
	// Ended is called last. It may be called without a call of Snapshot before it.
	Ended(err error)
}

// Subscription is the request of a viewer to see a room. It is a hub.Sink that holds
// updates back while its guards are asked again. The exported fields must not be changed
// after Access.Watch.
type Subscription struct {
	Room   string
	Viewer string // id of a connection; empty: the app itself, about which no guard is asked
	Out    Output
	// MaxBytes limits the bytes that are held back. Negative: no limit.
	MaxBytes int
	// Early says that the subscription begins with the known members if Redis does
	// not answer.
	Early bool

	before func() // see Config.Before; nil: not added yet

	mu       sync.Mutex // guards the fields below, and calls of Out
	paused   bool
	buffered []bufferedUpdate
	bytes    int
	over     bool

	rechecked time.Time // when a recheck last asked the guards; guarded by Access.mu
}

// bufferedUpdate is a snapshot, an update or a call between updates.
type bufferedUpdate struct {
	view   *hub.View
	update *wire.Update
	call   func(ok bool)
}

// ErrBufferFull ends a subscription if more than MaxBytes came while a guard was asked.
var ErrBufferFull = errors.New("mesh: too much happened while a guard was asked")

// ready takes the snapshot, before any update.
func (s *Subscription) ready(v hub.View) { s.take(bufferedUpdate{view: &v}, 0) }

// Deliver implements hub.Sink.
func (s *Subscription) Deliver(u *wire.Update) {
	if s.before != nil {
		s.before()
	}
	s.take(bufferedUpdate{update: u}, 128+len(u.Metadata)+len(u.State))
}

func (s *Subscription) take(p bufferedUpdate, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.over:
		if p.call != nil {
			p.call(false)
		}
	case !s.paused:
		s.deliver(p)
	case p.call == nil && s.MaxBytes >= 0 && s.bytes+size > s.MaxBytes:
		s.finishLocked(ErrBufferFull)
	default:
		s.buffered = append(s.buffered, p)
		s.bytes += size
	}
}

func (s *Subscription) deliver(p bufferedUpdate) {
	switch {
	case p.view != nil:
		s.Out.Snapshot(*p.view)
	case p.call != nil:
		p.call(true)
	default:
		s.Out.Update(p.update)
	}
}

// between calls f once, between two calls of the output, in the order in which it was
// called itself. So f may be called later. If the subscription has ended by then, f gets
// false. f must not block.
func (s *Subscription) between(f func(ok bool)) { s.take(bufferedUpdate{call: f}, 0) }

// drop ends the subscription. mu is held.
func (s *Subscription) drop() {
	buffered := s.buffered
	s.over, s.buffered, s.bytes = true, nil, 0
	for _, p := range buffered {
		if p.call != nil {
			p.call(false)
		}
	}
}

// pause holds back what comes from now on, until resume or Finish.
func (s *Subscription) pause() {
	s.mu.Lock()
	s.paused = true
	s.mu.Unlock()
}

// resume delivers what was held back.
func (s *Subscription) resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = false
	for _, p := range s.buffered {
		s.deliver(p)
	}
	s.buffered, s.bytes = nil, 0
}

// Finish ends the subscription for its output, which gets err. It returns false if the
// subscription had ended already.
func (s *Subscription) Finish(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.finishLocked(err)
}

func (s *Subscription) finishLocked(err error) bool {
	if s.over {
		return false
	}
	s.drop()
	s.Out.Ended(err)
	return true
}

// EndQuietly ends the subscription without a call of its output.
func (s *Subscription) EndQuietly() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop()
}

// IsOver reports whether the subscription has ended.
func (s *Subscription) IsOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over
}

// Exclusively calls f while no method of the output is called.
func (s *Subscription) Exclusively(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}
