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

// watchersPerPost is how many connections of a server watch every room.
const watchersPerPost = 2

// post is where a server is: in this process, or in one of its own, whose place
// another one takes when it has ended.
type post struct {
	st      *storm
	name    string
	proxy   *redistest.ProxyServer
	local   *harness.Server // nil: a process of its own
	log     harness.Stalls  // of local
	ledgers []*ledger       // of those who watch; the test's own goroutine's

	was harness.Lives // when last asked

	mu     sync.Mutex     // guards the fields below
	remote *harness.Child // nil: none now
	life   int            // rises with every process
}

// host is a server that can be connected to.
type host interface{ TryDial() (*harness.Peer, error) }

// localHost is one in this process.
type localHost struct{ s *harness.Server }

func (h localHost) TryDial() (*harness.Peer, error) {
	p, _, err := h.s.TryDial()
	return p, err
}

// newLocal starts a server in this process. One of them does without CONFIG.
func newLocal(st *storm, n int) *post {
	p := &post{st: st, name: fmt.Sprintf("local %d", n), proxy: redistest.Proxy(st.T, st.Real.Addr())}
	p.local = st.Tracked(harness.LeaseOf(st.lease), func(o *mesh.Options) {
		opts := &redis.Options{Addr: p.proxy.Addr()}
		if n > 0 {
			opts.Username, opts.Password = "app", "pw"
		}
		c := redis.NewClient(opts)
		st.T.Cleanup(func() { _ = c.Close() })
		o.Redis, o.Logger = c, slog.New(&p.log)
	})
	p.local.Level2() // publishing answers why it failed
	require.NoError(st.T, harness.TrackTimed(p.local.Server, st.ttl))
	p.watch()
	return p
}

// newRemote starts a server in a process of its own.
func newRemote(st *storm, n int) *post {
	p := &post{st: st, name: fmt.Sprintf("process %d", n), proxy: redistest.Proxy(st.T, st.Real.Addr())}
	p.start()
	return p
}

// start starts a process.
func (p *post) start() {
	p.st.T.Helper()
	c := p.st.Child(harness.ChildConfig{Redis: p.proxy.Addr(), Lease: p.st.lease, Timed: p.st.ttl, Events: true})
	p.mu.Lock()
	p.remote = c
	p.mu.Unlock()
	p.was = harness.Lives{}
	p.watch()
}

// take takes the process away: nobody connects to it any more.
func (p *post) take() *harness.Child {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.remote
	p.remote = nil
	p.life++
	for _, l := range p.ledgers {
		p.st.report.updates += l.catchUp()
	}
	p.ledgers = nil
	return c
}

// now returns what to connect to, nil where there is nothing now, and which
// life of the post it is. It may be called from any goroutine.
func (p *post) now() (host, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.local != nil:
		return localHost{p.local}, 0
	case p.remote != nil:
		return p.remote, p.life
	}
	return nil, p.life
}

// watch adds those who watch.
func (p *post) watch() {
	p.st.T.Helper()
	for i := range watchersPerPost {
		h, _ := p.now()
		c, err := h.TryDial()
		require.NoError(p.st.T, err)
		p.ledgers = append(p.ledgers, newLedger(fmt.Sprintf("watcher %d of %s", i, p.name), c, p.st.rooms))
	}
}

// lives returns what has become of the server.
func (p *post) lives() harness.Lives {
	if p.local != nil {
		return harness.Lives{Reborn: p.local.Stats().Reregistered, Stalled: p.log.N.Load()}
	}
	p.mu.Lock()
	c := p.remote
	p.mu.Unlock()
	l, err := c.Lives()
	require.NoError(p.st.T, err)
	return l
}

// excuse decides what may have been told of the post's connections since the
// last time. hit says that a fault took this server alone away from Redis: then
// one leave is due for each that ran out with its TTL, or with the lease. A
// server that Redis merely forgot has no excuse. One that found its own process
// standing still has, whatever it was meant to do; and where the machine was
// slow, so have those with a TTL.
func (p *post) excuse(hit, slow bool) {
	if hit || slow {
		p.assure() // what Redis takes from it shows that it knows what has become of it
	}
	is := p.lives()
	if !hit && !slow && is != p.was {
		p.assure()
	}
	gone := is.Stalled > p.was.Stalled || hit && is.Reborn > p.was.Reborn
	for _, s := range p.souls() {
		if gone || (hit || slow) && s.room == harness.RoomTimed {
			p.st.departing(s.p.ID)
		}
		if s.unsure {
			p.st.wrong("%s took no state in %s, for no reason", p.name, s.room)
		}
	}
	p.was = is
}

// assure lets all connections say once more what they have said last.
func (p *post) assure() {
	var wg sync.WaitGroup
	for _, s := range p.souls() {
		wg.Go(s.assure)
	}
	wg.Wait()
}

// souls returns who is connected here.
func (p *post) souls() []*soul {
	return slices.DeleteFunc(slices.Clone(p.st.souls), func(s *soul) bool { return s.post != p || s.p == nil })
}
