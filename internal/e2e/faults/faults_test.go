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

// TestFaults injects faults into processes, connections and Redis while servers are in
// use. Every case has its own Redis. The cases wait most of the time, so more of them
// run in parallel than the machine has processors.
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

// faultCases lists the longest cases first.
var faultCases = slices.Concat(killCases, refuseCases, halfCases, cutCases, restartCases, lossCases)

// through makes a server connect to Redis through a proxy.
func through(t *testing.T, p *redistest.ProxyServer) func(*mesh.Options) {
	return func(o *mesh.Options) {
		c := redis.NewClient(&redis.Options{Addr: p.Addr()})
		t.Cleanup(func() { _ = c.Close() })
		o.Redis = c
	}
}

// stream holds the snapshot and the updates of one subscriber of a room.
type stream struct {
	p     *harness.Peer
	room  string
	first harness.View
}

// follow subscribes a peer to a room.
func follow(p *harness.Peer, room string) *stream {
	p.T.Helper()
	return &stream{p: p, room: room, first: p.Subscribe(room)}
}

// fold applies the updates to the snapshot and returns the result. It returns an error
// if an update is invalid: a join of a member, a leave or a state of a connection that
// is not a member, the end of a state that does not exist, or a seq that goes back
// within an epoch.
func (s *stream) fold() (harness.MemberStates, error) {
	now := harness.MemberStates{}
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
		if err := now.Apply(u); err != nil {
			return nil, fmt.Errorf("update %d, %v (repair %v): %w", i, u, u.Repair, err)
		}
	}
	return now, nil
}

// leaves returns the times of the leaves, by connection.
func (s *stream) leaves() map[string][]time.Time { return s.times("leave") }

// times returns the times of the updates of a type, by connection.
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

// drill is a test with servers on one Redis, a subscriber of each room on each server,
// and members whose expected entries are recorded.
type drill struct {
	*harness.World
	servers []*harness.Server
	streams []*stream
	rooms   []string

	mu   sync.Mutex // guards want
	want map[string]harness.MemberStates

	churning sync.WaitGroup
	quiet    chan struct{} // closed to stop the clients of churn
	calls    atomic.Int64  // made by the clients of churn
}

// newDrill starts n servers, each with a subscriber of every room.
func newDrill(w *harness.World, n int, rooms []string, setup ...func(*mesh.Options)) *drill {
	w.T.Helper()
	d := &drill{World: w, rooms: rooms, want: make(map[string]harness.MemberStates), quiet: make(chan struct{})}
	for _, room := range rooms {
		d.want[room] = harness.MemberStates{}
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

// members makes n new peers per server and room join. Every other peer publishes a
// state.
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

// note records the entry that is expected after a call.
func (d *drill) note(room, id string, w harness.WantedEntry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.In {
		d.want[room][id] = w.State
	} else {
		delete(d.want[room], id)
	}
}

// churn runs n clients per server until stopChurn is called. Each one joins and leaves
// a single room, and waits for each answer.
func (d *drill) churn(n int) { d.runClients(n, d.joinAndLeave) }

// runClients runs n clients per server, each in one room, until stopChurn is called.
func (d *drill) runClients(n int, client func(s *harness.Server, room string)) {
	d.T.Cleanup(d.stopChurn) // if the test fails before it calls stopChurn
	for _, s := range d.servers {
		for i := range n {
			d.churning.Go(func() { client(s, d.rooms[i%len(d.rooms)]) })
		}
	}
}

// tryDial connects a peer. It may be called on any goroutine. It returns nil if the
// test failed or ended.
func (d *drill) tryDial(s *harness.Server) *harness.Peer {
	p, _, err := s.TryDial()
	if err != nil {
		if d.T.Context().Err() == nil { // otherwise the test has ended
			d.T.Errorf("dial: %v", err)
		}
		return nil
	}
	return p
}

// joinAndLeave joins, changes its state and leaves, again and again.
func (d *drill) joinAndLeave(s *harness.Server, room string) {
	p := d.tryDial(s)
	if p == nil {
		return
	}
	var now harness.WantedEntry
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

// stopChurn stops the clients and waits for their last answers.
func (d *drill) stopChurn() {
	close(d.quiet)
	d.churning.Wait()
	d.quiet = make(chan struct{})
}

// wanted returns a copy of the expected entries.
func (d *drill) wanted() map[string]harness.MemberStates {
	d.mu.Lock()
	defer d.mu.Unlock()
	want := make(map[string]harness.MemberStates, len(d.want))
	for room, s := range d.want {
		want[room] = maps.Clone(s)
	}
	return want
}

// diff returns the first difference between the expected entries and those in Redis or
// in a stream. It returns "" if there is none.
func (d *drill) diff() string {
	want := d.wanted()
	if diff := d.redisDiff(want); diff != "" {
		return diff
	}
	return d.streamsDiff(want)
}

// redisDiff compares the entries in Redis with the expected ones.
func (d *drill) redisDiff(want map[string]harness.MemberStates) string {
	for _, room := range d.rooms {
		now, err := d.servers[0].InRedis(room)
		if err != nil {
			return err.Error()
		}
		if diff := now.Diff(want[room]); diff != "" {
			return fmt.Sprintf("Redis, %s: %s", room, diff)
		}
	}
	return ""
}

// streamsDiff compares the result of each stream with the expected entries.
func (d *drill) streamsDiff(want map[string]harness.MemberStates) string {
	for i, s := range d.streams {
		now, err := s.fold()
		if err != nil {
			return err.Error()
		}
		if diff := now.Diff(want[s.room]); diff != "" {
			return fmt.Sprintf("subscriber %d, %s: %s", i, s.room, diff)
		}
	}
	return ""
}

// settles waits until Redis and all streams have the expected entries. It returns the
// time since the given moment. As with Eventually, within is exact in virtual time
// only.
func (d *drill) settles(since time.Time, within time.Duration) time.Duration {
	d.T.Helper()
	within = d.Unhurried(within)
	var last string
	for {
		if last = d.diff(); last == "" {
			return time.Since(since)
		}
		if time.Since(since) > within {
			d.checkStreams()
			require.FailNow(d.T, "Redis and the streams do not converge within "+within.String(), last)
		}
		d.Sleep(10 * time.Millisecond)
	}
}

// checkStreams fails if a stream contains an invalid update.
func (d *drill) checkStreams() {
	d.T.Helper()
	for i, s := range d.streams {
		if _, err := s.fold(); err != nil {
			require.FailNow(d.T, "a stream contains an invalid update", "subscriber %d, %s: %v", i, s.room, err)
		}
	}
}

// stayed fails if a stream contains a leave of one of the peers.
func (d *drill) stayed(peers []*harness.Peer) {
	d.T.Helper()
	for i, s := range d.streams {
		gone := s.leaves()
		for _, p := range peers {
			require.Empty(d.T, gone[p.ID], "subscriber %d received a leave of %s from %s", i, p.ID, s.room)
		}
	}
}

// awaitContact waits until every server is in contact.
func (d *drill) awaitContact() {
	d.T.Helper()
	for _, s := range d.servers {
		d.Eventually(20*time.Second, func() bool {
			_, ok := testhook.PartsOf(s.Server).Lease.ClockProof()
			return ok
		}, "no contact")
	}
}

// inContact reports whether every server is in contact now.
func (d *drill) inContact() bool {
	for _, s := range d.servers {
		if _, ok := testhook.PartsOf(s.Server).Lease.ClockProof(); !ok {
			return false
		}
	}
	return true
}

// reportedBy waits until ok returns true, and fails at the bound. The bound is extended
// by one lease if a server loses contact, which may happen on a slow machine, because
// the leave then has to wait for the next lease. It is also extended by every delay of
// this goroutine, times four, because an update passes through about four other
// goroutines.
func (d *drill) reportedBy(bound time.Time, lease time.Duration, ok func() bool, format string, args ...any) {
	d.T.Helper()
	contact := true
	for !ok() {
		if contact && !d.inContact() {
			contact, bound = false, bound.Add(lease)
		}
		if late := time.Since(bound); late > 0 {
			require.FailNow(d.T, fmt.Sprintf("%v late", late), fmt.Sprintf(format, args...))
		}
		const nap, through = 5 * time.Millisecond, 4
		slept := time.Now()
		d.Sleep(nap)
		if over := time.Since(slept) - 2*nap; over > 0 {
			bound = bound.Add(through * over)
		}
	}
}

// finish waits until all dead servers are cleaned up, and shuts the others down. Then
// it checks that Redis only holds the format key and keys with a TTL.
func (d *drill) finish() {
	d.T.Helper()
	d.checkStreams()
	c := d.Client()
	d.Eventually(20*time.Second, func() bool {
		living, err := c.ZCard(d.T.Context(), d.Keys().Instances()).Result()
		require.NoError(d.T, err)
		dead, err := c.ZCard(d.T.Context(), d.Keys().Dead()).Result()
		require.NoError(d.T, err)
		return int(living) == len(d.servers) && dead == 0
	}, "dead servers are cleaned up")
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
	require.Empty(d.T, left, "keys without a TTL after all connections left")
}
