package mesh

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/meshpresence/mesh/internal/admission"
	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/redisstate"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/watch"
	"github.com/meshpresence/mesh/internal/wire"
)

// Limits that tests of package mesh_test compare with.
const (
	MaxFound           = maxFound
	MaxIteratorEvents  = maxIteratorEvents
	MaxOwnedSizes      = maxOwnedSizes
	AuthsAtOnce        = authsAtOnce
	DefaultConnections = defaultConnections
	DrainStep          = drainStep
	DrainLate          = drainLate
)

// ServerWith returns a server with a number of connections and without other parts.
func ServerWith(connections int) *Server {
	s := &Server{n: &core{}, conns: map[string]*Connection{}, gate: admission.New(admission.Config{})}
	for i := range connections {
		id := strconv.Itoa(i)
		s.conns[id] = &Connection{id: id}
	}
	return s
}

// RefuseMore begins to drain. It returns the number of connections.
func (s *Server) RefuseMore() int { return s.refuseMore() }

// TakeDue returns the ids of the connections that a drain closes now, and the wait
// before the next ones. The drain lasts from begun to until.
func (s *Server) TakeDue(now, begun, until time.Time) (ids []string, wait time.Duration) {
	due, wait := s.takeDue(now, begun, until)
	for _, c := range due {
		ids = append(ids, c.id)
	}
	return ids, wait
}

// NoRefusedUpgrades returns Stats.RefusedUpgrades of a server that refused none.
func NoRefusedUpgrades() map[string]uint64 { return new(refusedUpgrades).counts() }

// CommandNames returns the commands of the protocol.
func CommandNames() []string { return slices.Sorted(maps.Keys(commands)) }

// SetHost sets the name of the host.
func SetHost(o *Options, name string) { o.host = func() (string, error) { return name, nil } }

// Places returns the number of places for connections in use, and how many of them
// belong to requests that are not connections yet.
func (s *Server) Places() [2]int {
	open, taken := s.gate.Counts()
	return [2]int{open, taken}
}

// Authenticating returns how many requests are being authenticated.
func (s *Server) Authenticating() int64 { return s.asking.Load() }

// SetAuthenticating sets what Authenticating returns.
func (s *Server) SetAuthenticating(n int) { s.asking.Store(int64(n)) }

// TakeUpgrade takes a place for a connection that is being upgraded.
func (s *Server) TakeUpgrade() error { return s.gate.Take(true) }

// MostConnections returns how many connections the server accepts.
func (s *Server) MostConnections() int { return s.gate.Max() }

// Enter, Take and Leave are the steps of a request for a connection.
func (s *Server) Enter() error { return s.enter() }

func (s *Server) Take() error { return s.gate.Take(false) }

func (s *Server) Leave() { s.gate.Leave(true) }

// StillOpen returns the number of connections that have not been closed.
func (s *Server) StillOpen() int { return s.stillOpen() }

// SetBuckets sets the number of buckets of a server that has not been started.
func (s *Server) SetBuckets(n int) { s.n.keys.Spread = n }

// HandleMessage handles a message of Redis on a channel.
func (s *Server) HandleMessage(channel, payload string) { s.n.Message(channel, payload) }

// WaitForPeers waits until all calls of other servers have been carried out.
func (s *Server) WaitForPeers() { s.n.peers.Wait() }

// AnswersKept returns the number of cached guard answers about a connection, and its
// limit.
func (s *Server) AnswersKept(conn string) (kept, most int) {
	return s.n.access.guards.Kept(conn), s.n.opts.keptAnswers()
}

// Delivery returns the function that delivers updates to the only subscription.
func (p *PresenceManager) Delivery() func(*wire.Update) {
	return p.n.access.Of("")[0].Deliver
}

// WatchSilently subscribes to a room on behalf of a viewer and drops the events.
func (p *PresenceManager) WatchSilently(ctx context.Context, room, viewer string) error {
	return p.n.access.Watch(ctx, &watch.Subscription{Room: room, Viewer: viewer, Out: silentOutlet{}, MaxBytes: -1})
}

// FillQueue puts events into the queue of a subscription of the app. It returns the
// error that ends the subscription.
func (s *Server) FillQueue(room string, events int) error {
	out := newQueueOutlet(s.n, room)
	for range events {
		out.put(Event{}, nil)
	}
	_, err := out.take()
	return err
}

// Resubscribed is a connection whose second subscription to a room has replaced the
// first one.
type Resubscribed struct {
	Conn          *Connection
	first, second *watch.Subscription
}

// SubscribeTwice returns a connection without a server that has subscribed to a room twice.
func SubscribeTwice(wheel *clock.Wheel) Resubscribed {
	c := &Connection{subs: map[string]*watch.Subscription{}, sock: socket.NewGroup(socket.Config{Wheel: wheel}).New(nil, nil)}
	subscribed := func() *watch.Subscription {
		out := &socketOutlet{c: c, room: "r", answered: true}
		return &watch.Subscription{Room: "r", Viewer: "v", Out: out, MaxBytes: -1}
	}
	r := Resubscribed{c, subscribed(), subscribed()}
	c.subs["r"] = r.second
	return r
}

// EndFirst ends the first subscription.
func (r Resubscribed) EndFirst() { r.first.Finish(ErrRefused) }

// PutBack ends the second subscription and restores the first one.
func (r Resubscribed) PutBack() { r.Conn.unsubscribe(r.second, r.first) }

// Open returns the number of subscriptions of the connection.
func (r Resubscribed) Open() int { return len(r.Conn.subs) }

// EncodeState returns a state as it is stored.
func (p *PresenceManager) EncodeState(state any) (json.RawMessage, error) {
	return p.n.encodeState(state)
}

// EncodeMetadata returns metadata as it is stored.
func (p *PresenceManager) EncodeMetadata(value any) (json.RawMessage, error) {
	return p.n.encodeMetadata(value)
}

// Response returns the status and the text of the answer to a refused request.
func (r *Refusal) Response() (status int, message string) { return r.response() }

// RedisState returns the server's view of the state of Redis.
func (s *Server) RedisState() *redisstate.State { return s.n.redis.State }

// ExpiredPaused reports whether the server ignores expired events for now.
func (s *Server) ExpiredPaused() bool { return s.n.redis.expired.Paused() }

// Disconnected tells the server that its listener is lost.
func (s *Server) Disconnected() { s.n.Disconnected() }

// Refuse returns the answer of the socket to a refused request.
func (c *Connection) Refuse(req wire.Request, message, code, name string) *wire.Frame {
	return (*wireHandler)(c).Refusal(req, message, code, name)
}

// silentOutlet discards a subscription's events.
type silentOutlet struct{}

func (silentOutlet) Snapshot(hub.View) {}

func (silentOutlet) Update(*wire.Update) {}

func (silentOutlet) Ended(error) {}

// ReparseListCursor parses the text of a cursor of mesh/list-presence and encodes it again.
func ReparseListCursor(text string) (string, error) {
	at, err := parseListCursor(text)
	return at.String(), err
}

// StaleClient is a connection without a socket, for tests of the pushes about stale rooms.
type StaleClient struct{ c *Connection }

// NewStaleClient returns a client that is subscribed to these rooms.
func NewStaleClient(rooms ...string) StaleClient {
	c := &Connection{subs: make(map[string]*watch.Subscription)}
	for _, room := range rooms {
		o := &socketOutlet{c: c, room: room}
		o.begun.Store(true)
		c.subs[room] = &watch.Subscription{Room: room, Out: o}
	}
	return StaleClient{c}
}

// Answered tells the client that a room is stale, in the answer to its subscription.
func (s StaleClient) Answered(room string) {
	o := &socketOutlet{c: s.c, room: room}
	if sub := s.c.subs[room]; sub != nil {
		o = sub.Out.(*socketOutlet)
	}
	s.c.noteStale(o)
}

// Subscribing begins a subscription that is not answered yet.
func (s StaleClient) Subscribing(room string) {
	s.c.subs[room] = &watch.Subscription{Room: room, Out: &socketOutlet{c: s.c, room: room}}
}

// Look returns the push that is due if some rooms are stale, and some of them for a while.
func (s StaleClient) Look(stale, away []string) (p wire.PresenceStale, due bool) {
	set := func(rooms []string) map[string]bool {
		all := make(map[string]bool)
		for _, room := range rooms {
			all[room] = true
		}
		return all
	}
	p, due, _ = s.c.stalePush(set(stale), set(away))
	return p, due
}
