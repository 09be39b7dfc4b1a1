package watch

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/socket"
)

// Watch starts a subscription: it asks the guards, and the output gets a snapshot and then
// updates. The output may get them before Watch returns nil. It gets nothing after Watch
// has returned an error.
func (a *Access) Watch(ctx context.Context, s *Subscription) error {
	// The subscription is added before its guards are asked, so that every later change
	// of metadata asks them again.
	if err := a.add(s); err != nil {
		return err
	}
	err := a.cfg.CheckViewer(s.Viewer)
	var d guards.Decision
	if err == nil {
		d, err = a.decide(ctx, s.Viewer, guards.Fresh(s.Room))
	}
	if err == nil {
		err = a.mirror(ctx, s)
	}
	if err != nil {
		s.EndQuietly()
		a.remove(s)
		return a.cfg.ToError(ctx, err)
	}
	if s.IsOver() { // a recheck has ended it
		a.cfg.Hub.Unwatch(s.Room, s)
	} else if d.RecheckDue {
		a.recheckViewerIn(s.Viewer, s.Room)
	}
	return nil
}

// mirror makes the hub deliver to the subscription. If Redis does not answer in time, the
// subscription begins with the known members, or fails.
func (a *Access) mirror(ctx context.Context, s *Subscription) error {
	limit := a.cfg.Limit
	if s.Early {
		limit = a.cfg.EarlyLimit(s.Room)
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	release, settled, err := a.cfg.Hub.Load(limited, s.Room)
	defer release()
	switch {
	case err == nil:
	case limited.Err() == nil, ctx.Err() != nil:
		return err
	case !s.Early:
		return fmt.Errorf("%w: %w", errs.Unavailable, err)
	}
	// A client is about to be sent the members of the room. Only a few commands of each
	// client may do that at the same time, so none of them waits for Redis from here on.
	if err := socket.AwaitAnswerSlot(ctx); err != nil {
		return err
	}
	if settled {
		return a.cfg.Hub.Watch(ctx, s.Room, s, s.ready)
	}
	return a.cfg.Hub.WatchNow(s.Room, s, s.ready)
}

// Page calls deliver with a page of the room's members, in the order of the updates. It
// is called once and without waiting, unless the guards are being asked again: then it is
// called when they have answered. If the subscription has ended by then, deliver gets
// false, and the page must not be shown. Page returns false if deliver is not called,
// because the hub has no members to show.
func (a *Access) Page(s *Subscription, at hub.PageCursor, limit int, deliver func(p hub.Page, ok bool)) bool {
	return a.cfg.Hub.Page(s.Room, s, at, limit, func(p hub.Page) {
		s.between(func(ok bool) { deliver(p, ok) })
	})
}

// Unwatch ends a subscription without a call of its output.
func (a *Access) Unwatch(s *Subscription) {
	s.EndQuietly()
	a.remove(s)
	a.cfg.Hub.Unwatch(s.Room, s)
}

// end ends a subscription. Its output gets err.
func (a *Access) end(s *Subscription, err error) {
	s.Finish(err)
	a.remove(s)
	a.cfg.Hub.Unwatch(s.Room, s)
}

func (a *Access) add(s *Subscription) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return errs.Closed
	}
	ofViewer := a.byViewer[s.Viewer]
	if ofViewer == nil {
		ofViewer = make(map[*Subscription]*recheck)
		a.byViewer[s.Viewer] = ofViewer
	}
	ofViewer[s] = nil
	s.before = a.cfg.Before
	inRoom := a.byRoom[s.Room]
	if inRoom == nil {
		inRoom = make(map[*Subscription]struct{})
		a.byRoom[s.Room] = inRoom
	}
	inRoom[s] = struct{}{}
	return nil
}

func (a *Access) remove(s *Subscription) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ofViewer := a.byViewer[s.Viewer]
	delete(ofViewer, s)
	if len(ofViewer) == 0 {
		delete(a.byViewer, s.Viewer)
	}
	inRoom := a.byRoom[s.Room]
	delete(inRoom, s)
	if len(inRoom) == 0 {
		delete(a.byRoom, s.Room)
	}
}

// Of returns the subscriptions of a viewer.
func (a *Access) Of(viewer string) []*Subscription {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := make([]*Subscription, 0, len(a.byViewer[viewer]))
	for s := range a.byViewer[viewer] {
		list = append(list, s)
	}
	return list
}

// Rooms returns the rooms that have subscriptions on this server, also those to numbers.
func (a *Access) Rooms() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := make([]string, 0, len(a.byRoom))
	for room := range a.byRoom {
		list = append(list, room)
	}
	for room := range a.counted.byRoom {
		if a.byRoom[room] == nil {
			list = append(list, room)
		}
	}
	return list
}

// Count returns the number of subscriptions to a room.
func (a *Access) Count(room string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.byRoom[room])
}

// Forget ends all subscriptions of a connection that has gone. Their outputs are called,
// because an iterator on behalf of the connection would wait for ever otherwise.
func (a *Access) Forget(viewer string) {
	for _, s := range a.Of(viewer) {
		a.end(s, errs.Closed)
	}
	a.forgetOccupancy(viewer)
}

// Cancel cancels the guards that rechecks ask.
func (a *Access) Cancel() { a.quit() }

// Close ends all subscriptions and waits for the rechecks.
func (a *Access) Close() {
	a.mu.Lock()
	a.closed = true
	var all []*Subscription
	for _, ofViewer := range a.byViewer {
		for s := range ofViewer {
			all = append(all, s)
		}
	}
	viewers := slices.Collect(maps.Keys(a.counted.byViewer))
	a.mu.Unlock()
	for _, s := range all {
		a.end(s, errs.Closed)
	}
	for _, viewer := range viewers {
		a.forgetOccupancy(viewer)
	}
	a.quit()
	a.work.Wait()
}
