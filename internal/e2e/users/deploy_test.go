package users

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

var deployUsers = flag.Int("deploy.users", 2000, "users of TestDeploy and TestKilledServer; a quarter of them with the race detector")

const (
	deployRooms   = 100
	deployServers = 4
	deployGrace   = 15 * time.Second
	// awayMin and awayMax bound the time until a client dials again.
	awayMin, awayMax = 100 * time.Millisecond, 2 * time.Second
	// deployLease is so short that a dead server is noticed within the test.
	deployLease = 6 * time.Second
)

// fleet is a group of servers in other processes, with a client for each user. A client
// that loses its connection dials another server.
type fleet struct {
	w     *harness.World
	watch *watch
	users int
	stop  chan struct{}

	clients sync.WaitGroup
	first   sync.WaitGroup // ends when every client has joined

	mu      sync.Mutex // guards the fields below
	living  []*harness.Child
	moves   int                      // joins after the first one of each client
	away    int                      // clients that have lost their connection
	longest map[string]time.Duration // longest absence of each user
}

// onRedis runs a test in real time on a Redis, and then on a Redis Cluster. Such tests need
// the whole machine, so none of them is parallel.
func onRedis(t *testing.T, f func(t *testing.T, w *harness.World)) {
	t.Helper()
	harness.Long(t, "takes real seconds")
	t.Run("redis", func(t *testing.T) { f(t, harness.RealWorld(t)) })
	t.Run("cluster", func(t *testing.T) { f(t, harness.ClusterWorld(t)) })
}

// newFleet starts servers, and a subscriber of every room. It returns when each user is
// in a room.
func newFleet(w *harness.World) *fleet {
	w.T.Helper()
	f := &fleet{w: w, users: *deployUsers, stop: make(chan struct{}), longest: make(map[string]time.Duration)}
	if harness.Light() {
		f.users /= 4
	}
	rooms := make([]string, deployRooms)
	for i := range rooms {
		rooms[i] = fmt.Sprintf("doc-%d", i)
	}
	f.watch = watchRooms(w, rooms, deployGrace, harness.LeaseOf(deployLease))
	for range deployServers {
		f.start()
	}
	w.T.Cleanup(f.end)
	f.first.Add(f.users)
	for i := range f.users {
		f.clients.Go(func() { f.live(fmt.Sprintf("user-%d", i), rooms[i%deployRooms], i%2 == 0) })
	}
	f.first.Wait()
	f.watch.await(f.users / deployRooms)
	f.w.Eventually(10*time.Second, func() bool { return f.watch.count(mesh.EventJoin) >= f.users }, "the joins are reported")
	arrived, left := f.watch.users()
	require.Equal(w.T, []int{f.users, 0}, []int{arrived, left}, "users that arrived and that left, before the deploy")
	return f
}

// start adds a server.
func (f *fleet) start() {
	c := f.w.Child(harness.ChildConfig{
		Lease: deployLease, Users: true, Grace: deployGrace, Drain: time.Second,
		Limits: mesh.Limits{UpgradesPerSecond: -1},
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	f.living = append(f.living, c)
}

// retire takes the oldest server from the list, so that no client dials it any more.
func (f *fleet) retire() *harness.Child {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.living[0]
	f.living = f.living[1:]
	return c
}

// dial connects a user to any server. It tries again until there is a connection or the
// test ends.
func (f *fleet) dial(user, room, replaces string) *harness.Peer {
	for {
		f.mu.Lock()
		c := f.living[rand.N(len(f.living))]
		f.mu.Unlock()
		p, err := c.TryDialAs(user)
		if err == nil {
			v, err := p.TryJoinReplacing(room, replaces)
			if err == nil && v.Success {
				return p
			}
			p.Close()
		}
		select {
		case <-f.stop:
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// live is a client: it joins a room, and again on another server whenever its connection
// ends. Half of the clients name their last connection.
func (f *fleet) live(user, room string, names bool) {
	p := f.dial(user, room, "")
	f.first.Done()
	for p != nil {
		select {
		case <-p.Ended:
		case <-f.stop:
			p.Close()
			return
		}
		lost, last := time.Now(), ""
		if names {
			last = p.ID
		}
		f.note(func() { f.away++ })
		time.Sleep(awayMin + rand.N(awayMax-awayMin))
		p = f.dial(user, room, last)
		f.note(func() {
			f.away--
			f.moves++
			f.longest[user] = max(f.longest[user], time.Since(lost))
		})
	}
}

func (f *fleet) note(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// settle waits until every client is back, Redis has forgotten its old connection, and
// that has been reported.
func (f *fleet) settle(moves int) {
	f.w.T.Helper()
	f.w.Eventually(30*time.Second, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.away == 0 && f.moves >= moves
	}, "all clients are back")
	f.watch.await(f.users / deployRooms)
	f.w.Eventually(10*time.Second, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.watch.count(mesh.EventLeave) >= f.moves
	}, "the leaves of the old connections are reported")
}

// check fails if a user who was back in time was reported as left, or as arrived again.
func (f *fleet) check() {
	f.w.T.Helper()
	f.watch.check()
	f.mu.Lock()
	longest, moves := maps.Clone(f.longest), f.moves
	f.mu.Unlock()
	f.watch.mu.Lock()
	defer f.watch.mu.Unlock()
	late, most := 0, time.Duration(0)
	for user, d := range longest {
		most = max(most, d)
		if d >= deployGrace-5*time.Second { // the machine was too slow
			late++
			delete(f.watch.left, user)
			f.watch.arrived[user] = 1
		}
	}
	assert.Empty(f.w.T, f.watch.left, "users that were reported as left")
	for user, n := range f.watch.arrived {
		assert.Equal(f.w.T, 1, n, "arrivals of %s", user)
	}
	f.w.T.Logf("%d users, %d moves, away for %v at most, %d users not back in time; events %v, reasons of leaves %v",
		f.users, moves, most.Round(time.Millisecond), late, f.watch.kinds, f.watch.reasons)
	require.Less(f.w.T, late, f.users/2, "most users must be back in time, or the test shows nothing")
}

func (f *fleet) end() {
	close(f.stop)
	f.clients.Wait()
}

// A rolling deploy: each server drains and shuts down, after another one has started. No
// user who is back within Grace is reported as left or arrived.
func TestDeploy(t *testing.T) {
	onRedis(t, func(t *testing.T, w *harness.World) {
		f := newFleet(w)
		for range deployServers {
			f.start()
			require.NoError(t, f.retire().Stop())
		}
		f.settle(f.users)
		f.check()
		// On a busy machine a user may be back before the old connection has ended.
		assert.Greater(t, f.watch.count(mesh.EventDisconnect), f.users/2, "most users were disconnected for a moment")
	})
}

// A server dies. Its users join on other servers, before and after the others notice.
func TestKilledServer(t *testing.T) {
	onRedis(t, func(t *testing.T, w *harness.World) {
		f := newFleet(w)
		f.retire().Die()
		f.settle(f.users / deployServers / 2)
		f.check()
	})
}
