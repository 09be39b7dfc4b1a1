package mesh

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/occupancy"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
	"github.com/meshpresence/mesh/internal/watch"
	"github.com/meshpresence/mesh/internal/wire"
)

// Occupancy is the numbers of a room at one position, without a list of its members.
type Occupancy struct {
	Room string
	// Connections is the number of members, including disconnected ones.
	Connections int
	// Users is the number of users. Each connection without a user counts as one. It is
	// 0 if users are not counted.
	Users int
	// Seq and Epoch are the position of the room. At one position the numbers equal
	// those of a [Snapshot]. Epoch is empty if nothing has ever happened in the room,
	// or so long ago that Redis has forgotten it.
	Seq   uint64
	Epoch string
	// Stale reports whether the numbers may be out of date: Redis does not answer, or
	// has lost data and servers are writing it again.
	Stale bool
}

// Occupancy returns the numbers of each of the rooms, tracked or not, as Redis holds them.
// It asks Redis for all of them in one round trip, and on a Cluster in one round trip for
// each node. The map contains every given room, also empty ones. A room that is given
// twice is read once. Without rooms the map is empty, and Redis is not asked. No guard is
// asked.
//
// Either all rooms are read or none. An invalid name is [ErrInvalidRoom]. If any node does
// not answer, the error wraps [ErrUnavailable].
//
// Stale means here that Redis has lost data of the room and that servers are writing it
// again, so the numbers may be too low. While the users of a room have to be counted
// again, each connection counts as one.
func (p *PresenceManager) Occupancy(ctx context.Context, rooms ...string) (map[string]Occupancy, error) {
	names, err := p.n.distinctRooms(ctx, rooms)
	if err != nil {
		return nil, err
	}
	read, err := p.n.store.Occupancy(ctx, names...)
	if err != nil {
		return nil, errorFor(ctx, err)
	}
	all := make(map[string]Occupancy, len(names))
	for i, room := range names {
		all[room] = p.n.occupancyOf(room, &read[i])
	}
	return all, nil
}

// SubscribeOccupancy watches the numbers of rooms, such as those of a lobby, without their
// members. The iterator yields the numbers of each room first, and then each room's
// numbers when they have changed: at most once per OccupancyInterval of its rule. A room
// that gets its first member is yielded at once, unless it was yielded within the
// interval. A room that has become empty is yielded after the interval. If the loop is
// slow, it gets only the last numbers of each room. A room that is given twice is watched
// once.
//
// If Redis does not answer, the last numbers are yielded as stale, and new ones when Redis
// is back. The iterator ends when the loop is left, and at once if there are no rooms.
// Otherwise its last pair has an error, which names the room if it is about one:
//
//   - the error of ctx
//   - [ErrInvalidRoom], or [ErrNotTracked] if no rule matches a room
//   - [ErrRefused] if an OccupancyGuard refuses a room, at the start or later
//   - [ErrUnknownConnection] if the Viewer is not a connection of this server
//   - [ErrUnavailable] if the numbers of a room could not be read at the start
//   - [ErrClosed] at Shutdown or when the Viewer's connection ends
//
// Each range over the result is a subscription of its own.
func (p *PresenceManager) SubscribeOccupancy(ctx context.Context, rooms []string, opts SubscribeOptions) iter.Seq2[Occupancy, error] {
	rooms = slices.Clone(rooms)
	return func(yield func(Occupancy, error) bool) {
		names, err := p.n.distinctRooms(ctx, rooms)
		if err == nil && opts.Viewer != "" {
			_, err = p.n.conn(opts.Viewer)
		}
		if err != nil {
			yield(Occupancy{}, err)
			return
		}
		if len(names) == 0 {
			return
		}
		out := &occupancyQueue{n: p.n, more: wait.NewSignal()}
		s := &watch.OccupancySubscription{Viewer: opts.Viewer, Out: out}
		if err := p.n.access.SubscribeOccupancy(ctx, s, names, out.begin); err != nil {
			yield(Occupancy{}, err)
			return
		}
		defer p.n.access.CloseOccupancy(s, nil)
		out.follow(ctx, yield)
	}
}

// distinctRooms checks the names that an app has given, and leaves out repeated ones.
func (n *core) distinctRooms(ctx context.Context, rooms []string) ([]string, error) {
	if err := n.checkRunningCtx(ctx); err != nil {
		return nil, err
	}
	for _, room := range rooms {
		if err := n.checkRoom(room); err != nil {
			return nil, err
		}
	}
	return distinct(rooms), nil
}

// distinct returns the names without repeated ones, in their order.
func distinct(names []string) []string {
	list := make([]string, 0, len(names))
	seen := make(map[string]struct{}, len(names))
	for _, name := range names {
		if _, twice := seen[name]; !twice {
			seen[name] = struct{}{}
			list = append(list, name)
		}
	}
	return list
}

// occupancyQueue keeps the last numbers of each room for an iterator. It has at most one
// entry per room, so the iterator may be slow.
type occupancyQueue struct {
	n    *core
	more wait.Signal // set when there is something to take

	mu      sync.Mutex // guards the fields below
	waiting []string   // rooms, in the order of their first numbers that wait
	last    map[string]*occupancy.Update
	err     error
}

// begin takes the first numbers, unless a room has none.
func (q *occupancyQueue) begin(results []watch.OccupancyResult) {
	for _, r := range results {
		if r.Err != nil {
			q.Ended(r.Room, r.Err)
			return
		}
	}
	for _, r := range results {
		q.Update(r.Update)
	}
}

// Update implements watch.OccupancyOutput.
func (q *occupancyQueue) Update(u *occupancy.Update) {
	q.mu.Lock()
	if q.last == nil {
		q.last = make(map[string]*occupancy.Update)
	}
	if q.last[u.Room] == nil {
		q.waiting = append(q.waiting, u.Room)
	}
	q.last[u.Room] = u
	q.mu.Unlock()
	q.more.Set()
}

// Ended implements watch.OccupancyOutput. One room ends the whole iterator.
func (q *occupancyQueue) Ended(room string, err error) {
	if watch.IsRefusal(err) || errors.Is(err, ErrUnavailable) {
		err = fmt.Errorf("%w (numbers of %s)", err, wire.Quote(room))
	}
	q.mu.Lock()
	if q.err == nil {
		q.err = err
	}
	q.mu.Unlock()
	q.more.Set()
}

// take returns the numbers that wait.
func (q *occupancyQueue) take() ([]Occupancy, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	list := make([]Occupancy, len(q.waiting))
	for i, room := range q.waiting {
		list[i] = q.n.occupancy(q.last[room])
	}
	q.waiting, q.last = nil, nil
	return list, q.err
}

// follow yields everything that comes.
func (q *occupancyQueue) follow(ctx context.Context, yield func(Occupancy, error) bool) {
	for {
		list, err := q.take()
		for _, o := range list {
			if !yield(o, nil) {
				return
			}
		}
		if err != nil {
			yield(Occupancy{}, err)
			return
		}
		select {
		case <-q.more:
		case <-ctx.Done():
			yield(Occupancy{}, errs.Ended(ctx))
			return
		}
	}
}

// occupancyOf converts the numbers that the store has read.
func (n *core) occupancyOf(room string, read *store.Occupancy) Occupancy {
	r := occupancy.ReadingOf(read)
	o := Occupancy{Room: room, Connections: r.Connections, Seq: r.Position.Seq, Epoch: r.Position.Epoch, Stale: r.Rebuilding}
	if n.hub.CountsUsers() {
		o.Users = r.Users
	}
	return o
}

// occupancy converts numbers that a subscriber gets.
func (n *core) occupancy(u *occupancy.Update) Occupancy {
	o := Occupancy{Room: u.Room, Connections: u.Connections, Seq: u.Seq, Epoch: u.Epoch, Stale: u.Stale}
	if n.hub.CountsUsers() {
		o.Users = u.Users
	}
	return o
}

// wireOccupancy converts numbers for clients.
func (n *core) wireOccupancy(u *occupancy.Update) wire.Occupancy {
	o := wire.Occupancy{RoomName: u.Room, Epoch: u.Epoch, Seq: u.Seq, Stale: u.Stale}
	o.Connections = wire.CountOf(u.Connections)
	if n.hub.CountsUsers() {
		o.Users = wire.CountOf(u.Users)
	}
	return o
}

// occupancyFrame encodes the push with numbers.
func (n *core) occupancyFrame(u *occupancy.Update) *wire.Frame {
	return wire.PushNumbers(n.wireOccupancy(u))
}

// occupancyLine is the command line of the commands about numbers. No room has this name.
const occupancyLine = "\x00occupancy"

// roomsPerCommand is the number of rooms that a command about numbers may name.
const roomsPerCommand = 100

// newOccupancies is the number by which Limits.NewRoomsPerMinute is multiplied for the
// numbers of rooms. They cost less than a mirror, and there are more of them.
const newOccupancies = 10

// occupancies are the rooms whose numbers a connection is subscribed to.
type occupancies struct {
	sub      watch.OccupancySubscription
	newRooms limit.Names // rooms that it begins to use
}

// occupancies returns the field counted. Only the commands of occupancyLine call it.
func (c *Connection) occupancies() *occupancies {
	if c.counted == nil {
		c.counted = new(occupancies)
		encode := c.core().occupancyFrame
		c.counted.sub.Viewer, c.counted.sub.Out = c.id, &occupancyOutlet{c: c, encode: encode}
	}
	return c.counted
}

// subscribeOccupancy answers before the first later numbers are sent.
func subscribeOccupancy(ctx context.Context, c *Connection, req wire.Request) (reply, error) {
	rooms, err := c.occupancyRooms(req)
	if err != nil {
		return reply{}, err
	}
	n, o := c.core(), c.occupancies()
	if most := n.opts.Limits.OccupanciesPerConnection; over(o.sub.With(rooms), most) {
		return reply{}, fmt.Errorf("%w: numbers of %d rooms per connection", ErrLimit, most)
	}
	if err := o.admit(rooms, n.opts.Limits.NewRoomsPerMinute); err != nil {
		return reply{}, err
	}
	err = n.access.SubscribeOccupancy(ctx, &o.sub, rooms, func(results []watch.OccupancyResult) {
		c.respond(req, c.occupancyAnswer(results), nil)
	})
	if err != nil {
		return reply{}, err
	}
	return answeredReply(), nil
}

// admit returns an ErrLimit if the connection would begin to use too many rooms in this
// minute. A room lingers for some seconds after its last subscriber, so a client must not
// go through any number of them.
func (o *occupancies) admit(rooms []string, perMinute int) error {
	most := perMinute
	if most > 0 {
		most *= newOccupancies
	}
	for _, room := range rooms {
		if !o.sub.Has(room) && !o.newRooms.Use(room, most, time.Now()) {
			return fmt.Errorf("%w: numbers of %d new rooms per minute", ErrLimit, most)
		}
	}
	return nil
}

func unsubscribeOccupancy(_ context.Context, c *Connection, req wire.Request) (reply, error) {
	rooms, err := c.occupancyRooms(req)
	if err != nil {
		return reply{}, err
	}
	ended := c.core().access.UnsubscribeOccupancy(&c.occupancies().sub, rooms...)
	return valueReply(ended == len(rooms)), nil
}

// occupancyRooms returns the rooms that a command about numbers names, each once.
func (c *Connection) occupancyRooms(req wire.Request) ([]string, error) {
	var p wire.OccupancyRequest
	if err := req.Bind(&p); err != nil {
		return nil, errPayload(err)
	}
	switch n := len(p.RoomNames); {
	case n == 0:
		return nil, fmt.Errorf("%w: roomNames is empty", ErrInvalidRoom)
	case n > roomsPerCommand:
		return nil, fmt.Errorf("%w: %d rooms per command", ErrLimit, roomsPerCommand)
	}
	rooms := make([]string, len(p.RoomNames))
	for i, name := range p.RoomNames {
		rooms[i] = string(name)
		if err := c.core().checkRoom(rooms[i]); err != nil {
			return nil, err
		}
	}
	return distinct(rooms), nil
}

func (c *Connection) occupancyAnswer(results []watch.OccupancyResult) wire.OccupancyAnswer {
	answer := wire.OccupancyAnswer{Rooms: make([]wire.OccupancyResult, len(results))}
	for i, r := range results {
		to := &answer.Rooms[i]
		if r.Err != nil {
			to.RoomName = r.Room
			_, to.Code, _ = wireError(r.Err)
			continue
		}
		to.Occupancy = c.core().wireOccupancy(r.Update)
	}
	return answer
}

// occupancyOutlet sends the numbers of rooms to a socket.
type occupancyOutlet struct {
	c      *Connection
	encode func(*occupancy.Update) *wire.Frame // made once per connection, because it is garbage otherwise
}

// Update implements watch.OccupancyOutput. All sockets share the frame.
func (o *occupancyOutlet) Update(u *occupancy.Update) {
	_ = o.c.sock.Send(u.Frame(o.encode)) // fails only if the connection has ended
}

// Ended implements watch.OccupancyOutput.
func (o *occupancyOutlet) Ended(room string, err error) {
	if errors.Is(err, ErrClosed) {
		return // the socket is closed, too
	}
	if f, err := wire.Push(wire.PushOccupancyEnded, wire.Ended{RoomName: room}); err == nil {
		_ = o.c.sock.Send(f)
	}
}
