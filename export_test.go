package mesh

import (
	"context"
	"maps"
	"slices"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/hub"
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
)

// IsOutage reports whether an error of Authenticate is answered with 500.
func IsOutage(err error) bool { return callbacks.IsOutage(err) }

// NoRefusedUpgrades returns Stats.RefusedUpgrades of a server that refused none.
func NoRefusedUpgrades() map[string]uint64 { return new(refusedUpgrades).counts() }

// CommandNames returns the commands of the protocol.
func CommandNames() []string { return slices.Sorted(maps.Keys(commands)) }

// SetHost sets the name of the host.
func SetHost(o *Options, name string) { o.host = func() (string, error) { return name, nil } }

// Places returns how many places for connections are in use, and how many of them by
// requests that are not connections yet.
func (s *Server) Places() [2]int {
	open, taken := s.gate.Counts()
	return [2]int{open, taken}
}

// Authenticating returns how many requests are being authenticated.
func (s *Server) Authenticating() int64 { return s.asking.Load() }

// SetAuthenticating sets what Authenticating returns.
func (s *Server) SetAuthenticating(n int) { s.asking.Store(int64(n)) }

// TakeUpgrade takes the place of an upgrade.
func (s *Server) TakeUpgrade() error { return s.gate.Take(true) }

// MostConnections returns how many connections the server accepts.
func (s *Server) MostConnections() int { return s.gate.Max() }

// Enter, Take and Leave do what a request for a connection does.
func (s *Server) Enter() error { return s.enter() }

func (s *Server) Take() error { return s.gate.Take(false) }

func (s *Server) Leave() { s.gate.Leave(true) }

// StillOpen returns how many connections have not been closed.
func (s *Server) StillOpen() int { return s.stillOpen() }

// SetBuckets sets the number of buckets of a server that has not been started.
func (s *Server) SetBuckets(n int) { s.n.keys.Spread = n }

// HandleMessage handles a message of Redis on a channel.
func (s *Server) HandleMessage(channel, payload string) { s.n.Message(channel, payload) }

// WaitForPeers waits until all calls of other servers have been carried out.
func (s *Server) WaitForPeers() { s.n.peers.Wait() }

// AnswersKept returns how many answers of guards about a connection are kept, and how
// many may be.
func (s *Server) AnswersKept(conn string) (kept, most int) {
	return s.n.access.guards.Kept(conn), s.n.opts.keptAnswers()
}

// Delivery returns the function that delivers updates to the one subscription.
func (p *PresenceManager) Delivery() func(*wire.Update) {
	return p.n.access.Of("")[0].Deliver
}

// WatchSilently subscribes to a room on behalf of a viewer and drops the events.
func (p *PresenceManager) WatchSilently(ctx context.Context, room, viewer string) error {
	return p.n.access.Watch(ctx, &watch.Subscription{Room: room, Viewer: viewer, Out: silentOutlet{}, MaxBytes: -1})
}

// Refuse returns the answer to a request that is refused.
func (c *Connection) Refuse(req wire.Request, message, code, name string) *wire.Frame {
	return (*wireHandler)(c).Refusal(req, message, code, name)
}

// silentOutlet discards a subscription's events.
type silentOutlet struct{}

func (silentOutlet) Snapshot(hub.View) {}

func (silentOutlet) Update(*wire.Update) {}

func (silentOutlet) Ended(error) {}
