//go:build unix

package mesh

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

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
	local   *testServer // nil: a process of its own
	log     stalls      // of local
	ledgers []*ledger   // of those who watch; the test's own goroutine's

	was lives // when last asked

	mu     sync.Mutex // guards the fields below
	remote *child     // nil: none now
	life   int        // rises with every process
}

// host is a server that can be connected to.
type host interface{ tryDial() (*peer, error) }

// localHost is one in this process.
type localHost struct{ s *testServer }

func (h localHost) tryDial() (*peer, error) {
	p, _, err := h.s.tryDial()
	return p, err
}

// newLocal starts a server in this process. One of them does without CONFIG.
func newLocal(st *storm, n int) *post {
	p := &post{st: st, name: fmt.Sprintf("local %d", n), proxy: redistest.Proxy(st.t, st.real.Addr())}
	p.local = st.tracked(leaseOf(st.lease), func(o *Options) {
		opts := &redis.Options{Addr: p.proxy.Addr()}
		if n > 0 {
			opts.Username, opts.Password = "app", "pw"
		}
		c := redis.NewClient(opts)
		st.t.Cleanup(func() { _ = c.Close() })
		o.Redis, o.Logger = c, slog.New(&p.log)
	})
	require.NoError(st.t, p.local.trackTimed(st.ttl))
	p.watch()
	return p
}

// newRemote starts a server in a process of its own.
func newRemote(st *storm, n int) *post {
	p := &post{st: st, name: fmt.Sprintf("process %d", n), proxy: redistest.Proxy(st.t, st.real.Addr())}
	p.start()
	return p
}

// start starts a process.
func (p *post) start() {
	p.st.t.Helper()
	c := p.st.child(childConfig{Redis: p.proxy.Addr(), Lease: p.st.lease, Timed: p.st.ttl, Events: true})
	p.mu.Lock()
	p.remote = c
	p.mu.Unlock()
	p.was = lives{}
	p.watch()
}

// take takes the process away: nobody connects to it any more.
func (p *post) take() *child {
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
	p.st.t.Helper()
	for i := range watchersPerPost {
		h, _ := p.now()
		c, err := h.tryDial()
		require.NoError(p.st.t, err)
		p.ledgers = append(p.ledgers, newLedger(fmt.Sprintf("watcher %d of %s", i, p.name), c, p.st.rooms))
	}
}

// lives returns what has become of the server.
func (p *post) lives() lives {
	if p.local != nil {
		return lives{Reborn: p.local.Stats().Reborn, Stalled: p.log.n.Load()}
	}
	p.mu.Lock()
	c := p.remote
	p.mu.Unlock()
	l, err := c.lives()
	require.NoError(p.st.t, err)
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
		if gone || (hit || slow) && s.room == roomTimed {
			p.st.departing(s.p.id)
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
