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

// drainStep is the minimum interval at which a drain closes sockets. With many sockets
// several are due at once, and their leaves go to Redis together.
const drainStep = 50 * time.Millisecond

// drainLate is the maximum delay of a turn. A longer delay, because the process
// stalled, is not made up for at once but spread over the remaining time.
const drainLate = time.Second

// Drain takes the server out of service gradually, as for a rolling deploy. From the
// call on Ready fails and new connections are refused (503 with Retry-After,
// [ErrClosed] from ServeConn). The open sockets are closed with code 1012 one after the
// other, evenly over spread, so that the other servers do not get all clients at once.
// The stock client reconnects by itself. With spread 0 all sockets are closed at once.
// The socket of a user in a room with a Grace is closed when Redis keeps the place, up to
// a second later.
// The order is random, so that no room empties before another.
//
// Drain returns nil when the last socket has ended, its OnDisconnection hooks have
// returned and its ServeConn has returned. All sockets are told to close within spread.
// Connections that do not answer the close frame are cut off two seconds later. If some
// sockets end by themselves during the drain, the rest are closed more slowly, evenly
// over the same time. If ctx ends first, Drain returns an error that wraps the error of
// ctx. The sockets that have not been told to close stay open and served. No new ones
// are accepted, and Drain may be called again. Shutdown ends them.
//
// During a drain the server works as before: open sockets are served, the lease is
// renewed, subscriptions continue. Connections of the app's own transport are not
// affected, and Connect accepts more. Call Shutdown afterwards to end them and to write
// the last leaves.
//
// Several concurrent calls all wait for the last socket, and the call with the earliest
// end sets the pace. So a call with spread 0 ends a running drain quickly. A server
// cannot return to service.
//
// It returns [ErrInvalidOptions] for a negative spread and [ErrNotStarted] before
// Start. Nothing has changed then. It returns [ErrClosed] if Shutdown was called before
// or during the drain.
//
// If it is called inside a callback (a guard, hook, command handler, …), it does not
// wait for that callback, which counts as ended. See [Server.Shutdown].
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
	if err := s.n.checkRunning(); err != nil {
		return err
	}
	ctx, cancel := s.n.detachFromCallback(ctx)
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

// drained waits until all sockets have ended, at most for wait (negative means no
// limit), until the end of ctx, or until Shutdown begins. It reports whether all have
// ended.
func (s *Server) drained(ctx context.Context, wait time.Duration) bool {
	var due <-chan time.Time
	if wait >= 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		due = t.C
	}
	select {
	case <-s.gate.Empty():
	case <-due:
	case <-ctx.Done():
	case <-s.quit:
	}
	select {
	case <-s.gate.Empty():
		return true
	default:
		return false
	}
}

// Shutdown closes every connection with code 1012, ends all their entries in batches,
// and stops everything that Start started. The stock client reconnects by itself.
// Shutdown is idempotent and bounded by ctx. If Redis does not take all leaves by then,
// the other servers end the remaining entries when the lease runs out. Use a context
// with a deadline: without one Shutdown waits while Redis is unavailable.
//
// With many clients, call Drain first. Shutdown sends all of them to the other servers
// at once.
//
// [http.Server.Shutdown] neither closes nor awaits WebSockets. Call this method first,
// then Shutdown of the http.Server, then close the Redis client.
//
// Clients have three seconds to answer the close frame, and the running callbacks of
// their connections have three more seconds to end. If ctx has a deadline that leaves
// less time, each gets a third of it. Shutdown waits for callbacks whose context has
// ended for at most five seconds, also without a deadline, and then returns an error
// that says that they still run.
//
// Shutdown may be called inside a callback, on its goroutine. That callback then counts
// as ended: nothing waits for it, and its answer is not used. Only the deadline of ctx
// counts then, because the context of a callback ends while the server stops.
func (s *Server) Shutdown(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	ctx, cancel := s.n.detachFromCallback(ctx)
	defer cancel()
	s.refuseMore()
	s.quitOnce.Do(func() { close(s.quit) })
	now := time.Now()
	s.closeDue(now, now)
	if !waitFor(ctx, s.gate.Empty(), closingTime(ctx)) {
		s.cutAll() // connections that did not answer the close frame
	}
	gone := waitFor(ctx, s.gate.Empty(), closingTime(ctx))
	if !gone {
		s.n.calls.Cancel() // hooks that still wait
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

// closingTime is the time for which a shutdown waits for clients. It is less than ctx
// leaves, so that the leaves still get to Redis.
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

// refuseMore makes the server accept no more sockets, and returns the number of open
// ones.
func (s *Server) refuseMore() int {
	s.n.stopAccepting()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving.begun {
		return len(s.conns)
	}
	s.leaving.begun = true
	s.gate.Close()
	// Ids and not connections, so that ended connections do not stay in memory.
	s.leaving.order = make([]string, 0, len(s.conns))
	for id := range s.conns {
		s.leaving.order = append(s.leaving.order, id)
	}
	rand.Shuffle(len(s.leaving.order), func(i, j int) {
		o := s.leaving.order
		o[i], o[j] = o[j], o[i]
	})
	return len(s.conns)
}

// closeDue closes the sockets that are due in a drain from begun to until. It returns
// the time until the next turn, or a negative value if no socket is left to close.
//
// The next socket is due when the time from the last turn to the end, divided by the
// number of sockets that are left, has passed. So the rate stays even if some sockets
// end by themselves. With several drains, the one that ends first is always ahead, and
// moves the turns of the others.
func (s *Server) closeDue(begun, until time.Time) time.Duration {
	due, wait := s.takeDue(time.Now(), begun, until)
	for _, c := range due { // without mu, because there may be many
		if c.keepsPlaces() {
			s.n.life.work.Go(c.handOver)
		} else {
			c.restart()
		}
	}
	return wait
}

// handOverFor limits the time for which a drain waits for the places of a connection to be
// kept, before it closes the socket.
const handOverFor = time.Second

// keepsPlaces reports whether a room may keep the place of the connection.
func (c *Connection) keepsPlaces() bool {
	return c.local.User() != "" && slices.ContainsFunc(c.local.Rooms(), func(room string) bool {
		return c.core().access.rules.Match(room).Grace > 0
	})
}

// handOver lets the rooms of the connection keep its places, and closes the socket when
// Redis has them. The client returns at once, and then finds its place.
func (c *Connection) handOver() {
	n, rooms := c.core(), c.local.Rooms()
	n.disconnect(c.local, departClosed)
	ctx, cancel := context.WithTimeout(n.life.ctx, handOverFor)
	defer cancel()
	select {
	case <-c.local.Gone():
	case <-ctx.Done():
	}
	c.restart()
	if !c.closedByApp.Load() {
		return
	}
	for _, room := range rooms { // the app has closed it since then: it keeps no place
		if _, err := n.removeEnding(ctx, room, c.id, true); err != nil {
			n.opts.Logger.Debug("mesh: the place of a closed connection is still kept", "conn", c.id, "room", room, "error", err)
		}
	}
}

// restart closes the socket because the server restarts.
func (c *Connection) restart() { c.sock.Close(websocket.CloseServiceRestart, restarting) }

func (s *Server) takeDue(now, begun, until time.Time) (due []*Connection, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &s.leaving
	for {
		left := len(s.conns) - l.closing
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
			l.last = now // the process stalled
			continue
		}
		due = append(due, s.closeNext())
		l.last = turn
	}
}

// closeNext takes the next socket to close. The caller holds mu and has checked that
// there is one.
func (s *Server) closeNext() *Connection {
	l := &s.leaving
	for {
		id := l.order[len(l.order)-1]
		l.order = l.order[:len(l.order)-1]
		if c := s.conns[id]; c != nil {
			c.closing = true
			l.closing++
			return c
		}
	}
}

// cutAll closes the remaining sockets without a close frame. It does not wait, because
// closing a network connection of the app may block.
func (s *Server) cutAll() {
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

// abandon leaves behind connections that hang in a network connection of the app, and
// reports whether none is left.
func (s *Server) abandon() bool {
	for _, c := range s.left() {
		c.sock.Abandon()
	}
	return waitFor(context.Background(), s.gate.Empty(), stopGrace) // ctx may have ended
}

// stillOpen returns the number of connections and requests that have not ended.
func (s *Server) stillOpen() int {
	open, _ := s.gate.Counts()
	return open
}
