package mesh

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/owner"
)

const (
	// callRetry is how long an answer may take before the call is repeated,
	// callLimit before it is given up.
	callRetry = 600 * time.Millisecond
	callLimit = 1900 * time.Millisecond
	// callsAtOnce bounds the calls that are carried out here at once; more
	// are not answered, and so repeated.
	callsAtOnce = 64
)

// remoteCall is the payload of a call, see readCall.
type remoteCall struct {
	ID   string `json:"id"`
	From string `json:"from"` // incarnation to answer to
	Op   string `json:"op"`
	Room string `json:"room,omitempty"`
	Conn string `json:"conn,omitempty"`
	// Conns are what opGone asks about.
	Conns []string `json:"conns,omitempty"`
	// Paged says that opClear may do a part, and After where it goes on: behind
	// the connection of that id.
	Paged bool   `json:"paged,omitempty"`
	After string `json:"after,omitempty"`
}

// The operations of a remoteCall.
const (
	opAdd     = "add"     // bring Conn into Room
	opRemove  = "remove"  // take Conn out of Room
	opClear   = "clear"   // take every connection of yours out of Room
	opRecheck = "recheck" // ask the guards again about Conn
	opClose   = "close"   // close Conn
	opRooms   = "rooms"   // say which rooms Conn is in
	opGone    = "gone"    // say which of Conns are not in Room any more

	opRecheckRoom = "recheck-room" // ask the guards of Room again about all of your connections
)

// remoteAnswer is the payload of an answer.
type remoteAnswer struct {
	ID string `json:"id"`
	outcome
	Error string `json:"error,omitempty"` // name of one of remoteErrors
}

// outcome is what came of a call.
type outcome struct {
	OK    bool     `json:"ok"`              // it found something to do
	Rooms []string `json:"rooms,omitempty"` // of opRooms
	Gone  []string `json:"gone,omitempty"`  // of opGone
	Count int      `json:"count,omitempty"` // of opClear: connections that left
	After string   `json:"after,omitempty"` // of opClear: where it goes on; "": it is done
}

// remoteErrors are the errors that a call can bring back.
var remoteErrors = map[string]error{
	"unknown":     ErrUnknownConnection,
	"limit":       ErrLimit,
	"closed":      ErrClosed,
	"conflict":    ErrConflict,
	"invalid":     ErrInvalidConnectionID,
	"unavailable": ErrUnavailable,
}

func nameOfError(err error) string {
	for name, sentinel := range remoteErrors {
		if errors.Is(err, sentinel) {
			return name
		}
	}
	return "unavailable"
}

// called carries out another server's call.
func (c *control) called(rest string) {
	call, ok := readCall(rest)
	if !ok {
		return
	}
	select {
	case c.slots <- struct{}{}:
	default:
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	seen := c.recent(call.ID, time.Now())
	if c.stopped || seen.running {
		<-c.slots
		return
	}
	seen.running = true
	c.work.Go(func() {
		defer func() { <-c.slots }()
		c.serve(call, seen)
	})
}

// serve carries out a call, unless it has been already, and answers it. The
// same call again gets the same answer, and changes nothing.
func (c *control) serve(call remoteCall, seen *seenCall) {
	ctx, cancel := context.WithTimeout(c.n.life, callLimit)
	defer cancel()
	if seen.answer == nil {
		done, err := c.carryOut(ctx, call)
		seen.answer = &remoteAnswer{ID: call.ID, outcome: done}
		if err != nil {
			seen.answer.Error = nameOfError(err)
		}
	}
	body, _ := json.Marshal(seen.answer) // strings and a bool
	_, _ = c.n.store.Publish(ctx, c.n.keys.Control(call.From), wordDone+" "+string(body))
	c.mu.Lock()
	seen.running = false
	c.mu.Unlock()
}

// seenCall is a call that has come in before. Its answer belongs to whoever
// set running.
type seenCall struct {
	id      string
	at      time.Time
	running bool // guarded by control.mu
	answer  *remoteAnswer
}

// recent returns what is known of a call, and forgets calls that nobody
// repeats any more. c.mu is held.
func (c *control) recent(id string, now time.Time) *seenCall {
	for len(c.order) > 0 && now.Sub(c.order[0].at) > 2*callLimit {
		delete(c.seen, c.order[0].id)
		c.order = c.order[1:]
	}
	s := c.seen[id]
	if s == nil {
		s = &seenCall{id: id, at: now}
		c.seen[id] = s
		c.order = append(c.order, s)
	}
	return s
}

// carryOut does to this server's own connections what is asked.
func (c *control) carryOut(ctx context.Context, call remoteCall) (outcome, error) {
	switch call.Op {
	case opClear:
		return c.clear(ctx, call)
	case opRecheckRoom:
		c.n.recheckRoom(call.Room)
		return outcome{OK: true}, nil
	case opGone:
		return outcome{OK: true, Gone: c.n.owner.Gone(call.Room, call.Conns)}, nil
	}
	conn, err := c.n.conn(call.Conn)
	if err != nil {
		return outcome{}, err
	}
	done := outcome{OK: true}
	switch call.Op {
	case opAdd:
		err = c.n.add(ctx, conn, call.Room)
		done.OK = err == nil
	case opRemove:
		done.OK, err = c.n.revoke(ctx, conn, call.Room)
	case opRooms:
		done.Rooms = conn.Rooms()
	case opRecheck:
		c.n.recheck(conn)
	case opClose:
		c.n.close(conn)
	default:
		return outcome{}, fmt.Errorf("%w: operation %q", ErrIncompatible, call.Op)
	}
	return done, c.n.errorFor(ctx, err)
}

const (
	// An opClear that may do a part begins nothing more after clearFor, and gives
	// up the rest after clearWithin. That is below callLimit, so that the answer
	// still arrives.
	clearFor    = 500 * time.Millisecond
	clearWithin = 1300 * time.Millisecond
	// clearTogether is the number of connections that leave at once: they share a batch or
	// two.
	clearTogether = 256
)

// clear takes this server's connections out of a room, in the order of their
// ids: a connection that joins again in the meantime is not taken out twice. It
// voids joins that wait, and asks the guards again about connections that see the
// room, at the beginning and, for guards that ask who is in, at the end.
func (c *control) clear(ctx context.Context, call remoteCall) (outcome, error) {
	again := func() {
		c.n.verdicts.invalidateAllOf(call.Room)
		c.n.watchers.recheckRooms([]string{call.Room})
	}
	if call.After == "" {
		again()
		c.n.joins.takeOutOf(call.Room)
	}
	conns := slices.DeleteFunc(c.n.owner.Joined(call.Room), func(conn *owner.Conn) bool { return conn.ID() <= call.After })
	slices.SortFunc(conns, func(a, b *owner.Conn) int { return strings.Compare(a.ID(), b.ID()) })
	var done outcome
	began := time.Now()
	if call.Paged {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, clearWithin)
		defer cancel()
	}
	for part := range slices.Chunk(conns, clearTogether) {
		if call.Paged && done.After != "" && time.Since(began) > clearFor {
			return done, nil
		}
		left, err := c.clearPart(ctx, call.Room, part)
		done.Count += left
		done.OK = done.Count > 0
		if err != nil {
			return done, c.n.errorFor(ctx, err)
		}
		done.After = part[len(part)-1].ID()
	}
	done.After = ""
	if len(conns) > 0 || call.After != "" {
		again()
	}
	return done, nil
}

// clearPart takes connections out of a room, all at once, and returns how many
// have left.
func (c *control) clearPart(ctx context.Context, room string, conns []*owner.Conn) (left int, failed error) {
	var (
		all sync.WaitGroup
		mu  sync.Mutex // guards left and failed
	)
	for _, conn := range conns {
		all.Go(func() {
			_, err := c.n.leave(ctx, conn, room)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			left++
		})
	}
	all.Wait()
	return left, failed
}

func (c *control) answered(rest string) {
	a, ok := readAnswer(rest)
	if !ok {
		return
	}
	c.mu.Lock()
	ch := c.waiting[a.ID]
	delete(c.waiting, a.ID)
	c.mu.Unlock()
	if ch != nil {
		ch <- a
	}
}

// call asks an incarnation (this one: without a detour) to do something, and
// waits for the answer, at most callLimit. Which one is asked before every
// attempt: a server may be reborn meanwhile.
func (c *control) call(ctx context.Context, locate func(context.Context) (string, error), call remoteCall) (outcome, error) {
	if err := checkContext(ctx); err != nil {
		return outcome{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	call.ID, call.From = rand.Text(), c.n.lease.Incarnation()
	body, err := json.Marshal(call)
	if err != nil {
		return outcome{}, fmt.Errorf("mesh: call: %w", err)
	}
	answer := make(chan remoteAnswer, 1)
	c.mu.Lock()
	c.waiting[call.ID] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, call.ID)
		c.mu.Unlock()
	}()
	for {
		inc, err := locate(ctx)
		if err != nil {
			return outcome{}, err
		}
		if inc == c.n.lease.Incarnation() {
			return c.carryOut(ctx, call)
		}
		if _, err := c.n.store.Publish(ctx, c.n.keys.Control(inc), wordCall+" "+string(body)); err != nil {
			return outcome{}, c.n.errorFor(ctx, err)
		}
		t := time.NewTimer(callRetry)
		select {
		case a := <-answer:
			t.Stop()
			return a.outcome, a.err()
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			if errors.Is(ctx.Err(), context.Canceled) { // by the caller
				return outcome{}, contextError(ctx)
			}
			return outcome{}, fmt.Errorf("%w: the connection's server does not answer", ErrUnavailable)
		}
	}
}

func (a remoteAnswer) err() error {
	if a.Error == "" {
		return nil
	}
	if err := remoteErrors[a.Error]; err != nil {
		return err
	}
	return fmt.Errorf("%w: another server answered %q", ErrUnavailable, a.Error)
}
