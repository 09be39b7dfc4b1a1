//go:build unix

package faults

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

// watchersPerSlot is the number of connections of a server that subscribe to every
// room.
const watchersPerSlot = 2

// serverSlot runs one server, either in this process or in a child process. A new
// process replaces one that has ended.
type serverSlot struct {
	ct       *churnTest
	name     string
	proxy    *redistest.ProxyServer
	local    *harness.Server // nil for a child process
	log      harness.Stalls  // log of local
	watchers []*watcher      // watchers on this server. Only the test's own goroutine uses them.

	before harness.Interruptions // result of the last call of interruptions

	mu      sync.Mutex     // guards the fields below
	remote  *harness.Child // nil if none runs
	process int            // number of the process
}

// host is a server that accepts connections.
type host interface{ TryDial() (*harness.Peer, error) }

// localHost is a server in this process.
type localHost struct{ s *harness.Server }

func (h localHost) TryDial() (*harness.Peer, error) {
	p, _, err := h.s.TryDial()
	return p, err
}

// newLocal starts a server in this process. The second one runs without the right to
// use CONFIG.
func newLocal(ct *churnTest, n int) *serverSlot {
	p := &serverSlot{ct: ct, name: fmt.Sprintf("local %d", n), proxy: redistest.Proxy(ct.T, ct.Real.Addr())}
	p.local = ct.Tracked(harness.LeaseOf(ct.lease), func(o *mesh.Options) {
		opts := &redis.Options{Addr: p.proxy.Addr()}
		if n > 0 {
			opts.Username, opts.Password = "app", "pw"
		}
		c := redis.NewClient(opts)
		ct.T.Cleanup(func() { _ = c.Close() })
		o.Redis, o.Logger = c, slog.New(&p.log)
	})
	p.local.Level2() // level 2 returns errors for states that were not published
	require.NoError(ct.T, harness.TrackTimed(p.local.Server, ct.ttl))
	p.watch()
	return p
}

// newRemote starts a server in a child process.
func newRemote(ct *churnTest, n int) *serverSlot {
	p := &serverSlot{ct: ct, name: fmt.Sprintf("process %d", n), proxy: redistest.Proxy(ct.T, ct.Real.Addr())}
	p.start()
	return p
}

// start starts a child process.
func (p *serverSlot) start() {
	p.ct.T.Helper()
	c := p.ct.Child(harness.ChildConfig{Redis: p.proxy.Addr(), Lease: p.ct.lease, Timed: p.ct.ttl, Events: true})
	p.mu.Lock()
	p.remote = c
	p.mu.Unlock()
	p.before = harness.Interruptions{}
	p.watch()
}

// takeChild removes the process from the slot, so that no client connects to it any
// more.
func (p *serverSlot) takeChild() *harness.Child {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.remote
	p.remote = nil
	p.process++
	for _, l := range p.watchers {
		p.ct.report.updates += l.catchUp()
	}
	p.watchers = nil
	return c
}

// current returns the running server, or nil, and the number of its process. It may be
// called from any goroutine.
func (p *serverSlot) current() (host, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.local != nil:
		return localHost{p.local}, 0
	case p.remote != nil:
		return p.remote, p.process
	}
	return nil, p.process
}

// watch connects the watchers.
func (p *serverSlot) watch() {
	p.ct.T.Helper()
	for i := range watchersPerSlot {
		h, _ := p.current()
		c, err := h.TryDial()
		require.NoError(p.ct.T, err)
		p.watchers = append(p.watchers, newWatcher(fmt.Sprintf("watcher %d of %s", i, p.name), c, p.ct.rooms))
	}
}

// interruptions returns how often the server reregistered and stalled.
func (p *serverSlot) interruptions() harness.Interruptions {
	if p.local != nil {
		return harness.Interruptions{Reregistered: p.local.Stats().Reregistered, Stalled: p.log.N.Load()}
	}
	p.mu.Lock()
	c := p.remote
	p.mu.Unlock()
	l, err := c.Interruptions()
	require.NoError(p.ct.T, err)
	return l
}

// allowLeaves decides which leaves of this server's connections are allowed since the
// last call. If the fault isolated this server from Redis, or if this process was slow,
// entries may have expired with their TTL. All entries may have ended if the server
// stalled, or if it was isolated and declared dead. If Redis only lost the server's
// keys, no leave is allowed.
func (p *serverSlot) allowLeaves(isolated, slow bool) {
	if isolated || slow {
		p.repeatStates() // Redis accepts them only after the server has noticed an interruption
	}
	now := p.interruptions()
	if !isolated && !slow && now != p.before {
		p.repeatStates()
	}
	ended := now.Stalled > p.before.Stalled || isolated && now.Reregistered > p.before.Reregistered
	for _, s := range p.clients() {
		if ended || (isolated || slow) && s.room == harness.RoomTimed {
			p.ct.allowLeave(s.p.ID)
		}
		if s.refused {
			p.ct.violation("%s refused a state in %s without a fault", p.name, s.room)
		}
	}
	p.before = now
}

// repeatStates makes all connections publish their states again.
func (p *serverSlot) repeatStates() {
	var wg sync.WaitGroup
	for _, s := range p.clients() {
		wg.Go(s.repeatState)
	}
	wg.Wait()
}

// clients returns the clients that are connected to this server.
func (p *serverSlot) clients() []*churnClient {
	return slices.DeleteFunc(slices.Clone(p.ct.clients), func(s *churnClient) bool { return s.slot != p || s.p == nil })
}
