package faults

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/testhook"
)

// TestFaults breaks processes, connections and Redis under servers that are in
// use. Every case has a Redis of its own. They wait most of the time, so more
// of them run at once than the machine has processors.
func TestFaults(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, 9)
	for _, c := range faultCases {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			t.Run(c.name, c.run)
		})
	}
}

type faultCase struct {
	name string
	run  func(t *testing.T)
}

// faultCases are sorted such that the longest begin first.
var faultCases = slices.Concat(killCases, refuseCases, halfCases, cutCases, restartCases, lossCases)

// through makes a server reach Redis by way of a proxy.
func through(t *testing.T, p *redistest.ProxyServer) func(*mesh.Options) {
	return func(o *mesh.Options) {
		c := redis.NewClient(&redis.Options{Addr: p.Addr()})
		t.Cleanup(func() { _ = c.Close() })
		o.Redis = c
	}
}

// stream is one subscriber of a room, and what it was shown first.
type stream struct {
	p     *harness.Peer
	room  string
	first harness.View
}

// follow subscribes a peer. Everything it is told from then on can be folded.
func follow(p *harness.Peer, room string) *stream {
	p.T.Helper()
	return &stream{p: p, room: room, first: p.Subscribe(room)}
}

// fold goes through the stream and returns what it comes to, or what is wrong
// with it: nobody joins who is in, leaves or has a state who is not, and no
// state ends that nobody was told of. Within an epoch seq never goes back.
func (s *stream) fold() (harness.Sight, error) {
	now := harness.Sight{}
	var members []mesh.Member
	if err := json.Unmarshal(s.first.Present, &members); err != nil {
		return nil, err
	}
	for _, m := range members {
		now[m.ID] = string(s.first.States[m.ID])
	}
	last := map[string]uint64{s.first.Epoch: s.first.Seq}
	for i, u := range s.p.Got() {
		if u.RoomName != s.room {
			continue
		}
		if u.Seq < last[u.Epoch] {
			return nil, fmt.Errorf("update %d, %v: seq %d after %d", i, u, u.Seq, last[u.Epoch])
		}
		last[u.Epoch] = u.Seq
		if err := now.Take(u); err != nil {
			return nil, fmt.Errorf("update %d, %v (repair %v): %w", i, u, u.Repair, err)
		}
	}
	return now, nil
}

// leaves returns when each connection's leaves came.
func (s *stream) leaves() map[string][]time.Time { return s.times("leave") }

// times returns when each connection's updates of a type came.
func (s *stream) times(kind string) map[string][]time.Time {
	s.p.Mu.Lock()
	defer s.p.Mu.Unlock()
	out := make(map[string][]time.Time)
	for i, u := range s.p.Updates {
		if u.RoomName == s.room && u.Type == kind {
			out[u.ConnectionID] = append(out[u.ConnectionID], s.p.Times[i])
		}
	}
	return out
}

// drill is some servers on one Redis, subscribers of some rooms on each of
// them, and members of whom it is known where they should be.
type drill struct {
	*harness.World
	servers []*harness.Server
	streams []*stream
	rooms   []string

	mu   sync.Mutex // guards want
	want map[string]harness.Sight

	churning sync.WaitGroup
	quiet    chan struct{} // closed to end churning
	calls    atomic.Int64  // that churning made
}

// newDrill starts n servers, each with a subscriber of every room.
func newDrill(w *harness.World, n int, rooms []string, setup ...func(*mesh.Options)) *drill {
	w.T.Helper()
	d := &drill{World: w, rooms: rooms, want: make(map[string]harness.Sight), quiet: make(chan struct{})}
	for _, room := range rooms {
		d.want[room] = harness.Sight{}
	}
	for range n {
		s := w.Tracked(setup...)
		d.servers = append(d.servers, s)
		p := s.Dial()
		for _, room := range rooms {
			d.streams = append(d.streams, follow(p, room))
		}
	}
	return d
}

// members brings in n peers per server and room, every other one with a state.
func (d *drill) members(n int) []*harness.Peer {
	d.T.Helper()
	var list []*harness.Peer
	for _, s := range d.servers {
		for i := range n * len(d.rooms) {
			p, room := s.Dial(), d.rooms[i%len(d.rooms)]
			list = append(list, p)
			d.note(room, p.ID, p.In(room))
			if i%2 == 0 {
				d.note(room, p.ID, p.States(room, i))
			}
		}
	}
	return list
}

// note keeps what is wanted after a call.
func (d *drill) note(room, id string, w harness.Wish) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.In {
		d.want[room][id] = w.State
	} else {
		delete(d.want[room], id)
	}
}

// churn lets n peers per server come and go until calm is called. Each is in
// one room at a time and waits for each answer.
func (d *drill) churn(n int) { d.stir(n, d.restless) }

// stir has somebody do something n times per server, each in one room, until
// calm is called.
func (d *drill) stir(n int, somebody func(s *harness.Server, room string)) {
	d.T.Cleanup(d.calm) // of a test that has failed before it called it
	for _, s := range d.servers {
		for i := range n {
			d.churning.Go(func() { somebody(s, d.rooms[i%len(d.rooms)]) })
		}
	}
}

// comer connects a peer, on any goroutine; nil: the test has failed.
func (d *drill) comer(s *harness.Server) *harness.Peer {
	p, _, err := s.TryDial()
	if err != nil {
		if d.T.Context().Err() == nil { // otherwise the test is over
			d.T.Errorf("dial: %v", err)
		}
		return nil
	}
	return p
}

// restless is a connection that joins, changes its state and leaves.
func (d *drill) restless(s *harness.Server, room string) {
	p := d.comer(s)
	if p == nil {
		return
	}
	var now harness.Wish
	pace := time.NewTicker(25 * time.Millisecond)
	defer pace.Stop()
	for n := 0; ; n++ {
		select {
		case <-d.quiet:
			d.note(room, p.ID, now)
			return
		case <-pace.C:
		}
		switch {
		case !now.In:
			now = p.In(room)
		case rand.N(3) > 0:
			now = p.States(room, n)
		default:
			now = p.Out(room)
		}
		d.calls.Add(1)
	}
}

// calm ends churning and waits for the last answers.
func (d *drill) calm() {
	close(d.quiet)
	d.churning.Wait()
	d.quiet = make(chan struct{})
}

// wanted returns what is wanted now.
func (d *drill) wanted() map[string]harness.Sight {
	d.mu.Lock()
	defer d.mu.Unlock()
	want := make(map[string]harness.Sight, len(d.want))
	for room, s := range d.want {
		want[room] = maps.Clone(s)
	}
	return want
}

// state says what does not fit yet: Redis, and what each stream comes to, must
// be what is wanted.
func (d *drill) state() string {
	want := d.wanted()
	if diff := d.redis(want); diff != "" {
		return diff
	}
	return d.told(want)
}

// redis says how Redis differs from what is wanted.
func (d *drill) redis(want map[string]harness.Sight) string {
	for _, room := range d.rooms {
		now, err := d.servers[0].InRedis(room)
		if err != nil {
			return err.Error()
		}
		if diff := now.Differs(want[room]); diff != "" {
			return fmt.Sprintf("Redis, %s: %s", room, diff)
		}
	}
	return ""
}

// told says how what the streams come to differs from what is wanted.
func (d *drill) told(want map[string]harness.Sight) string {
	for i, s := range d.streams {
		now, err := s.fold()
		if err != nil {
			return err.Error()
		}
		if diff := now.Differs(want[s.room]); diff != "" {
			return fmt.Sprintf("subscriber %d, %s: %s", i, s.room, diff)
		}
	}
	return ""
}

// settles waits until everything fits, and returns how long after since. As with
// eventually, within is exact in virtual time only.
func (d *drill) settles(since time.Time, within time.Duration) time.Duration {
	d.T.Helper()
	within = d.Unhurried(within)
	var last string
	for {
		if last = d.state(); last == "" {
			return time.Since(since)
		}
		if time.Since(since) > within {
			d.legal()
			require.FailNow(d.T, "does not converge within "+within.String(), last)
		}
		d.Sleep(10 * time.Millisecond)
	}
}

// legal checks every stream.
func (d *drill) legal() {
	d.T.Helper()
	for i, s := range d.streams {
		if _, err := s.fold(); err != nil {
			require.FailNow(d.T, "stream is not legal", "subscriber %d, %s: %v", i, s.room, err)
		}
	}
}

// stayed checks that no stream told a leave of any of the peers.
func (d *drill) stayed(peers []*harness.Peer) {
	d.T.Helper()
	for i, s := range d.streams {
		gone := s.leaves()
		for _, p := range peers {
			require.Empty(d.T, gone[p.ID], "subscriber %d was told that %s left %s", i, p.ID, s.room)
		}
	}
}

// patient waits until every server may judge others.
func (d *drill) patient() {
	d.T.Helper()
	for _, s := range d.servers {
		d.Eventually(20*time.Second, func() bool {
			_, ok := testhook.PartsOf(s.Server).Lease.ClockProof()
			return ok
		}, "patience")
	}
}

// judging reports whether every server may judge others now.
func (d *drill) judging() bool {
	for _, s := range d.servers {
		if _, ok := testhook.PartsOf(s.Server).Lease.ClockProof(); !ok {
			return false
		}
	}
	return true
}

// toldBy waits for something that servers tell of others, until the bound. One
// more lease is due where they lose patience meanwhile, as on a slow machine
// they may; and by how much this goroutine itself is held up, for each of those
// that what is told goes through.
func (d *drill) toldBy(bound time.Time, lease time.Duration, ok func() bool, format string, args ...any) {
	d.T.Helper()
	patient := true
	for !ok() {
		if patient && !d.judging() {
			patient, bound = false, bound.Add(lease)
		}
		if late := time.Since(bound); late > 0 {
			require.FailNow(d.T, fmt.Sprintf("%v late", late), fmt.Sprintf(format, args...))
		}
		const nap, through = 5 * time.Millisecond, 4
		lay := time.Now()
		d.Sleep(nap)
		if over := time.Since(lay) - 2*nap; over > 0 {
			bound = bound.Add(through * over)
		}
	}
}

// over waits until dead servers are cleaned up after, shuts the others down,
// and checks that nothing is left in Redis but keys with a TTL and the format.
func (d *drill) over() {
	d.T.Helper()
	d.legal()
	c := d.Client()
	d.Eventually(20*time.Second, func() bool {
		living, err := c.ZCard(d.T.Context(), d.Keys().Instances()).Result()
		require.NoError(d.T, err)
		dead, err := c.ZCard(d.T.Context(), d.Keys().Dead()).Result()
		require.NoError(d.T, err)
		return int(living) == len(d.servers) && dead == 0
	}, "cleaning up after dead servers")
	for _, s := range d.servers {
		s.End()
	}
	left := map[string]int{}
	for _, key := range d.InStore() {
		ttl, err := c.PTTL(d.T.Context(), key).Result()
		require.NoError(d.T, err)
		if ttl == -1 && key != d.Keys().Format() {
			left[strings.TrimRight(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")]++
		}
	}
	require.Empty(d.T, left, "keys without a TTL after everyone left")
}
