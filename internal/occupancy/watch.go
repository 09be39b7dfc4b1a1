package occupancy

import (
	"context"
	"fmt"
	"time"
)

// Result is the answer of Watch about one room.
type Result struct {
	Update *Update
	// Err wraps the error of the context, or is ErrStopped or ErrUnwatched. The room is
	// then not watched.
	Err error
}

// Watch lets the watcher receive the numbers of rooms. It returns the present numbers, in
// the order of the argument. They come from memory if they are up to date, and otherwise
// from one call to Redis for all rooms. If Redis does not answer for StaleAfter, the last
// numbers are returned as stale. The numbers of a room that has never been read are waited
// for until ctx ends.
//
// Deliver may be called before Watch returns. A watcher that has to send the results first
// holds such updates back, and then sends those that are After the result.
//
// A watcher may call Watch again for a room that it watches. Its calls of Watch for one
// room must follow each other.
func (rs *Rooms) Watch(ctx context.Context, w Watcher, rooms []string) []Result {
	results := make([]Result, len(rooms))
	wanted := make([]wanted, len(rooms))
	for i, name := range rooms {
		wanted[i], results[i].Err = rs.register(name, w)
	}
	var late lateness
	defer late.stop()
	for i, want := range wanted {
		if results[i].Err != nil {
			continue
		}
		results[i].Update, results[i].Err = want.await(ctx, w, &late)
		if results[i].Err != nil {
			rs.unregister(want.room, w)
		}
	}
	rs.checkWatched(w, wanted, results)
	return results
}

// checkWatched replaces the results about rooms whose watch has ended since.
func (rs *Rooms) checkWatched(w Watcher, wanted []wanted, results []Result) {
	rs.registry.Lock()
	defer rs.registry.Unlock()
	for i := range results {
		if _, ok := rs.watched[w][wanted[i].room]; !ok && results[i].Err == nil {
			results[i] = Result{Err: ErrUnwatched}
		}
	}
}

// wanted is a reading that a call of Watch waits for.
type wanted struct {
	room   *room
	number uint32 // any later one will do as well
}

// lateness is the time after which a call of Watch takes stale numbers.
type lateness struct {
	timer  *time.Timer
	passed bool
}

// after returns a channel that gets a value when the time has passed. The time begins
// with the first call.
func (l *lateness) after(d time.Duration) <-chan time.Time {
	if l.timer == nil {
		l.timer = time.NewTimer(d)
	}
	return l.timer.C
}

func (l *lateness) stop() {
	if l.timer != nil {
		l.timer.Stop()
	}
}

// register adds a watcher without numbers to a room. The result is the reading whose
// numbers it may get.
func (rs *Rooms) register(name string, w Watcher) (wanted, error) {
	rs.registry.Lock()
	defer rs.registry.Unlock()
	if rs.stopped {
		return wanted{}, ErrStopped
	}
	r := rs.room(name)
	if r == nil {
		r = rs.addRoom(name)
	}
	watched := rs.watched[w]
	if watched == nil {
		watched = make(map[*room]struct{})
		rs.watched[w] = watched
	}
	if _, ok := watched[r]; !ok {
		watched[r] = struct{}{}
		r.refs++
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.watchers[w]; !ok {
		r.watchers[w] = waiting
	}
	r.lingerAt = 0
	if r.upToDate() {
		return wanted{room: r, number: r.complete}, nil
	}
	r.urgent = true
	r.settle()
	return wanted{room: r, number: r.begun + 1}, nil
}

// addRoom makes a room and subscribes to its channel. The caller holds registry.
func (rs *Rooms) addRoom(name string) *room {
	r := newRoom(rs, name)
	rs.mu.Lock()
	rs.byName[name] = r
	rs.mu.Unlock()
	// The lock of the registry keeps the order of Add and the Remove of an earlier room
	// of this name.
	rs.cfg.Listener.Add(name)
	return r
}

// await waits for numbers that the watcher may get.
func (n wanted) await(ctx context.Context, w Watcher, late *lateness) (*Update, error) {
	for {
		ended := ctx.Err()
		u, changed, err := n.take(w, late.passed || ended != nil)
		switch {
		case u != nil || err != nil:
			return u, err
		case ended != nil:
			return nil, fmt.Errorf("mesh: numbers of a room: %w", ended)
		}
		select {
		case <-changed:
		case <-late.after(n.room.rooms.cfg.StaleAfter):
			late.passed = true
		case <-ctx.Done():
		}
	}
}

// take gives the watcher its numbers if they have been read, or, if stale is true, the
// last ones as stale. Otherwise it returns a channel to wait for before the next attempt.
func (n wanted) take(w Watcher, stale bool) (*Update, <-chan struct{}, error) {
	r := n.room
	r.mu.Lock()
	defer r.mu.Unlock()
	_, registered := r.watchers[w]
	switch {
	case r.rooms.ctx.Err() != nil:
		return nil, nil, ErrStopped
	case !registered:
		return nil, nil, ErrUnwatched
	case r.answerable() && int32(r.complete-n.number) >= 0:
		return r.answer(w, false), nil, nil
	case r.numbers.known && stale:
		return r.answer(w, true), nil, nil
	}
	if r.changed == nil {
		r.changed = make(chan struct{})
	}
	return nil, r.changed, nil
}

// unregister removes a watcher that has got no numbers.
func (rs *Rooms) unregister(r *room, w Watcher) {
	rs.registry.Lock()
	defer rs.registry.Unlock()
	if _, ok := rs.watched[w][r]; !ok {
		return
	}
	r.mu.Lock()
	waits := r.watchers[w] == waiting
	r.mu.Unlock()
	if waits {
		rs.removeWatch(r, w)
	}
}

// Unwatch ends the watch of rooms and returns how many of them the watcher watched.
func (rs *Rooms) Unwatch(w Watcher, rooms ...string) int {
	rs.registry.Lock()
	defer rs.registry.Unlock()
	ended := 0
	for _, name := range rooms {
		r := rs.room(name)
		if _, ok := rs.watched[w][r]; ok {
			rs.removeWatch(r, w)
			ended++
		}
	}
	return ended
}

// UnwatchAll ends the watch of all rooms and returns how many there were. A call of Watch
// that runs returns ErrUnwatched for the rooms for which it waits, but one that has just
// begun may still add rooms.
func (rs *Rooms) UnwatchAll(w Watcher) int {
	rs.registry.Lock()
	defer rs.registry.Unlock()
	ended := len(rs.watched[w])
	for r := range rs.watched[w] {
		rs.removeWatch(r, w)
	}
	return ended
}

// removeWatch ends one watch. After the last one the room lingers. The caller holds
// registry.
func (rs *Rooms) removeWatch(r *room, w Watcher) {
	watched := rs.watched[w]
	if delete(watched, r); len(watched) == 0 {
		delete(rs.watched, w)
	}
	r.refs--
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	r.remove(w)
	if r.refs == 0 {
		r.lingerAt = r.rooms.now() + max(rs.cfg.Linger, 0)
	}
	r.wakeWaiters()
	r.settle()
}

// drop removes a room whose linger is over, unless it is watched again.
func (rs *Rooms) drop(r *room) {
	rs.registry.Lock()
	defer rs.registry.Unlock()
	if r.refs > 0 || rs.stopped || rs.room(r.name) != r {
		return
	}
	r.mu.Lock()
	over := due(r.lingerAt, rs.now())
	r.mu.Unlock()
	if !over {
		return // another watcher came and went; the timer is set
	}
	rs.mu.Lock()
	delete(rs.byName, r.name)
	rs.mu.Unlock()
	rs.cfg.Listener.Remove(r.name)
	r.close()
}

// RoomsOf returns the number of rooms that the watcher watches, including those for which
// it waits.
func (rs *Rooms) RoomsOf(w Watcher) int {
	rs.registry.Lock()
	defer rs.registry.Unlock()
	return len(rs.watched[w])
}

// Watchers returns the watchers of a room, including those that wait for its numbers.
func (rs *Rooms) Watchers(room string) []Watcher {
	r := rs.room(room)
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Watcher, 0, len(r.watchers))
	for w := range r.watchers {
		list = append(list, w)
	}
	return list
}
