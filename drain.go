package mesh

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/gorilla/websocket"
)

// restarting is the reason that clients are given with code 1012.
const restarting = "server is restarting"

// drainStep is how often a drain looks for sockets that are due, at most. Of
// many sockets several are due then, and their leaves go to Redis together.
const drainStep = 50 * time.Millisecond

// drainLate is how late a turn may be. What is later, because the process stood
// still, is not made up for at once but spread over the time that remains.
const drainLate = time.Second

// Drain takes the server out of service without haste, as for a rolling
// deploy: from the call on Ready fails and new connections are refused (503
// with Retry-After, [ErrClosed] from ServeConn), and the sockets that there are
// close with code 1012 one after the other, evenly over spread, so that the
// other servers do not get all of them at once (the stock client comes back by
// itself). With spread 0 all close at once. The order is random: what any
// second closes is a sample of all rooms, and no room empties before another.
//
// It returns nil when the last socket is gone, its OnDisconnection hooks are
// through and its ServeConn has returned. All sockets have been told to close
// within spread; who does not answer the close frame is cut off two seconds
// later. When some end by themselves meanwhile, those that remain are closed
// more slowly, evenly over the same time. When ctx ends first it returns an
// error that wraps ctx's. The sockets that have not been told yet stay open and
// served, still no new ones are accepted, and Drain may be called again;
// Shutdown ends them.
//
// Until then the server is one like the others: the sockets that remain are
// served, the lease is renewed, subscriptions go on. Connections of the app's
// own transport are not touched: they are no sockets, and Connect takes more.
// Call Shutdown afterwards, which sees to the last leaves.
//
// Several calls at once all wait for the last socket; whoever is to be through
// first sets the pace. So a call with spread 0 hurries one that is under way.
// There is no way back to service.
//
// [ErrInvalidOptions] for a negative spread and [ErrNotStarted] before Start:
// nothing has changed then. [ErrClosed] where Shutdown was called, before or
// meanwhile.
//
// Inside a callback (a guard, hook, command handler, …) it does not wait for
// that callback, which counts as ended: see [Server.Shutdown].
func (s *Server) Drain(ctx context.Context, spread time.Duration) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	if spread < 0 {
		return fmt.Errorf("%w: spread is %v, must not be negative", ErrInvalidOptions, spread)
	}
	select {
	case <-s.quit:
		return ErrClosed
	default:
	}
	if err := s.n.usable(); err != nil {
		return err
	}
	ctx, cancel := s.n.outside(ctx)
	defer cancel()
	begun := time.Now()
	open := s.refuseMore()
	s.n.opts.Logger.Info("mesh: draining", "connections", open, "spread", spread)
	for ctx.Err() == nil {
		wait := s.closeDue(begun, begun.Add(spread))
		if s.drained(ctx, wait) {
			return nil
		}
		select {
		case <-s.quit:
			return ErrClosed
		default:
		}
	}
	return fmt.Errorf("mesh: %d connections are still open: %w", s.stillOpen(), ctx.Err())
}

// drained waits for the last socket, at most wait (negative: as long as it
// takes), the end of ctx or the beginning of Shutdown, and reports whether all
// are gone.
func (s *Server) drained(ctx context.Context, wait time.Duration) bool {
	var due <-chan time.Time
	if wait >= 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		due = t.C
	}
	select {
	case <-s.gone:
	case <-due:
	case <-ctx.Done():
	case <-s.quit:
	}
	select {
	case <-s.gone:
		return true
	default:
		return false
	}
}

// Shutdown closes every connection with code 1012 (the stock client comes
// back by itself), lets their entries leave in batches, and stops everything
// that Start started. It is idempotent, and bounded by ctx: what Redis does
// not take until then, the other servers end when the lease runs out. Give it
// a deadline: without one it waits for a Redis that is away.
//
// Call Drain before, where clients are many: Shutdown sends all of them to the
// other servers at once.
//
// [http.Server.Shutdown] knows nothing of WebSockets: it neither closes nor
// awaits them. Call this one first, so that they are gone, then that of the
// http.Server, then close the Redis client.
//
// Clients have three seconds to answer the close frame, and what their
// connections still run has three more to end; or a third each of the time that
// is left, if ctx has a deadline and that is less. It waits for callbacks whose
// context has ended for five seconds at most, also without a deadline, and then
// returns an error that says they still run. It may be called inside a callback,
// on its goroutine. Then that callback counts as ended: nothing waits for it, its
// answer is not used, and of ctx only the deadline counts, since a callback's own
// context ends while the server stops.
func (s *Server) Shutdown(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	ctx, cancel := s.n.outside(ctx)
	defer cancel()
	s.refuseMore()
	s.quitOnce.Do(func() { close(s.quit) })
	now := time.Now()
	s.closeDue(now, now)
	if !waitFor(ctx, s.gone, closingTime(ctx)) {
		s.cut() // who does not answer the close frame
	}
	gone := waitFor(ctx, s.gone, closingTime(ctx))
	if !gone {
		s.n.calls.cancel() // hooks that wait for something
		gone = s.abandon()
	}
	var late error
	if gone {
		s.sockets.Wait()
	} else {
		late = errors.New("mesh: handlers of connections are still running")
	}
	return errors.Join(late, s.n.stop(ctx))
}

// closingTime is how long clients are waited for when the server shuts down:
// less than ctx leaves, so that their leaves still get to Redis.
func closingTime(ctx context.Context) time.Duration {
	const most = 3 * time.Second
	if deadline, ok := ctx.Deadline(); ok {
		return min(most, time.Until(deadline)/3)
	}
	return most
}

// waitFor reports whether done was closed within d, and before ctx ended.
func waitFor(ctx context.Context, done <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// leaving is what a server that takes no more sockets knows of those it has.
type leaving struct {
	begun bool      // no more are taken
	order []string  // ids of those to close, last first; some may have ended by themselves
	told  int       // of conns, how many have been told to close
	last  time.Time // whose turn it was last, when that was
}

// refuseMore has the server take no more sockets, and returns how many it has.
func (s *Server) refuseMore() int {
	s.n.retire()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving.begun {
		return len(s.conns)
	}
	s.leaving.begun = true
	// Ids and not connections: what ends by itself is not kept in memory.
	s.leaving.order = make([]string, 0, len(s.conns))
	for id := range s.conns {
		s.leaving.order = append(s.leaving.order, id)
	}
	rand.Shuffle(len(s.leaving.order), func(i, j int) {
		o := s.leaving.order
		o[i], o[j] = o[j], o[i]
	})
	if s.open == 0 {
		close(s.gone)
	}
	return len(s.conns)
}

// closeDue closes those sockets whose turn it is, for a drain that began and is
// to have closed all by the times given, and returns how long it is until the
// next one's turn; negative: none is left to close.
//
// The next is due when the time from the last one's turn to the end, divided
// among all that are left, is over. So the rate stays even when some end by
// themselves; and of several drains the one that ends first is always first,
// and moves the others' turns too.
func (s *Server) closeDue(begun, until time.Time) time.Duration {
	due, wait := s.takeDue(time.Now(), begun, until)
	for _, c := range due { // not while mu is held: there may be many
		c.sock.Close(websocket.CloseServiceRestart, restarting)
	}
	return wait
}

func (s *Server) takeDue(now, begun, until time.Time) (due []*Connection, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &s.leaving
	for {
		left := len(s.conns) - l.told
		if left == 0 {
			return due, -1
		}
		from := begun
		if l.last.After(begun) {
			from = l.last
		}
		turn := from.Add(until.Sub(from) / time.Duration(left+1))
		if turn.After(now) {
			return due, max(turn.Sub(now), min(drainStep, until.Sub(now)))
		}
		if now.Sub(turn) > drainLate && now.Before(until) {
			l.last = now // the process stood still
			continue
		}
		due = append(due, s.tellNext())
		l.last = turn
	}
}

// tellNext takes the next socket that is to be told to close. The caller holds
// mu, and knows that there is one.
func (s *Server) tellNext() *Connection {
	l := &s.leaving
	for {
		id := l.order[len(l.order)-1]
		l.order = l.order[:len(l.order)-1]
		if c := s.conns[id]; c != nil {
			c.told = true
			l.told++
			return c
		}
	}
}

// cut closes the remaining sockets without a close frame. It does not wait: closing a
// network connection of the app's may block.
func (s *Server) cut() {
	for _, c := range s.left() {
		c.sock.Cut()
	}
}

// left returns the connections that have not ended.
func (s *Server) left() []*Connection {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Collect(maps.Values(s.conns))
}

// abandon leaves connections behind that hang in a network connection of the
// app's, and reports whether none is left then.
func (s *Server) abandon() bool {
	for _, c := range s.left() {
		c.sock.Abandon()
	}
	return waitFor(context.Background(), s.gone, stopGrace) // ctx may have ended
}

func (s *Server) stillOpen() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.open
}
