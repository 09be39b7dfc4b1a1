package mesh

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

	"github.com/meshpresence/mesh/internal/redistest"
)

// TestFaults breaks processes, connections and Redis under servers that are in
// use. Every case has a Redis of its own. They wait most of the time, so more
// of them run at once than the machine has processors.
func TestFaults(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes real seconds")
	}
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

// realWorld is a world on a real Redis of its own.
func realWorld(t *testing.T, opts ...redistest.Option) *world {
	t.Helper()
	return &world{t: t, real: redistest.Start(t, opts...)}
}

func leaseOf(d time.Duration) func(*Options) { return func(o *Options) { o.LeaseTTL = d } }

// through makes a server reach Redis by way of a proxy.
func through(t *testing.T, p *redistest.ProxyServer) func(*Options) {
	return func(o *Options) {
		c := redis.NewClient(&redis.Options{Addr: p.Addr()})
		t.Cleanup(func() { _ = c.Close() })
		o.Redis = c
	}
}

// sight is who is in a room, with the state of each, "" for none.
type sight map[string]string

// differs says how s differs from what is wanted, "" if it does not.
func (s sight) differs(want sight) string {
	var list []string
	for id, state := range want {
		if got, ok := s[id]; !ok {
			list = append(list, "lacks "+id)
		} else if got != state {
			list = append(list, fmt.Sprintf("%s has state %q, not %q", id, got, state))
		}
	}
	for id := range s {
		if _, ok := want[id]; !ok {
			list = append(list, "still has "+id)
		}
	}
	if len(list) > 5 {
		list = append(list[:5], fmt.Sprintf("… %d more", len(list)-5))
	}
	return strings.Join(list, ", ")
}

// stream is one subscriber of a room, and what it was shown first.
type stream struct {
	p     *peer
	room  string
	first view
}

// follow subscribes a peer. Everything it is told from then on can be folded.
func follow(p *peer, room string) *stream {
	p.t.Helper()
	return &stream{p: p, room: room, first: p.subscribe(room)}
}

// fold goes through the stream and returns what it comes to, or what is wrong
// with it: nobody joins who is in, leaves or has a state who is not, and no
// state ends that nobody was told of. Within an epoch seq never goes back.
func (s *stream) fold() (sight, error) {
	now := sight{}
	var members []Member
	if err := json.Unmarshal(s.first.Present, &members); err != nil {
		return nil, err
	}
	for _, m := range members {
		now[m.ID] = string(s.first.States[m.ID])
	}
	last := map[string]uint64{s.first.Epoch: s.first.Seq}
	for i, u := range s.p.got() {
		if u.RoomName != s.room {
			continue
		}
		if u.Seq < last[u.Epoch] {
			return nil, fmt.Errorf("update %d, %v: seq %d after %d", i, u, u.Seq, last[u.Epoch])
		}
		last[u.Epoch] = u.Seq
		if err := now.take(u); err != nil {
			return nil, fmt.Errorf("update %d, %v (repair %v): %w", i, u, u.Repair, err)
		}
	}
	return now, nil
}

func (s sight) take(u update) error {
	state, in := s[u.ConnectionID]
	switch {
	case u.Type == "join" && in:
		return fmt.Errorf("is in already")
	case u.Type == "join":
		s[u.ConnectionID] = ""
	case !in:
		return fmt.Errorf("is not in")
	case u.Type == "leave":
		delete(s, u.ConnectionID)
	case u.Type != "state":
		return fmt.Errorf("unknown type")
	case string(u.State) == "null" && state == "":
		return fmt.Errorf("had no state")
	case string(u.State) == "null":
		s[u.ConnectionID] = ""
	default:
		s[u.ConnectionID] = string(u.State)
	}
	return nil
}

// leaves returns when each connection's leaves came.
func (s *stream) leaves() map[string][]time.Time { return s.times("leave") }

// times returns when each connection's updates of a type came.
func (s *stream) times(kind string) map[string][]time.Time {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	out := make(map[string][]time.Time)
	for i, u := range s.p.updates {
		if u.RoomName == s.room && u.Type == kind {
			out[u.ConnectionID] = append(out[u.ConnectionID], s.p.times[i])
		}
	}
	return out
}

// inRedis returns who is in a room as Redis holds it.
func (s *testServer) inRedis(room string) (sight, error) {
	members, err := s.Presence().Members(s.w.t.Context(), room)
	if err != nil {
		return nil, err
	}
	now := sight{}
	for _, m := range members {
		now[m.ID] = string(m.State)
	}
	return now, nil
}

// drill is some servers on one Redis, subscribers of some rooms on each of
// them, and members of whom it is known where they should be.
type drill struct {
	*world
	servers []*testServer
	streams []*stream
	rooms   []string

	mu   sync.Mutex // guards want
	want map[string]sight

	churning sync.WaitGroup
	quiet    chan struct{} // closed to end churning
	calls    atomic.Int64  // that churning made
}

// newDrill starts n servers, each with a subscriber of every room.
func newDrill(w *world, n int, rooms []string, setup ...func(*Options)) *drill {
	w.t.Helper()
	d := &drill{world: w, rooms: rooms, want: make(map[string]sight), quiet: make(chan struct{})}
	for _, room := range rooms {
		d.want[room] = sight{}
	}
	for range n {
		s := w.tracked(setup...)
		d.servers = append(d.servers, s)
		p := s.dial()
		for _, room := range rooms {
			d.streams = append(d.streams, follow(p, room))
		}
	}
	return d
}

// members brings in n peers per server and room, every other one with a state.
func (d *drill) members(n int) []*peer {
	d.t.Helper()
	var list []*peer
	for _, s := range d.servers {
		for i := range n * len(d.rooms) {
			p, room := s.dial(), d.rooms[i%len(d.rooms)]
			list = append(list, p)
			d.note(room, p.id, p.in(room))
			if i%2 == 0 {
				d.note(room, p.id, p.states(room, i))
			}
		}
	}
	return list
}

// wish is what a peer has asked for in one room.
type wish struct {
	in    bool
	state string
}

// note keeps what is wanted after a call.
func (d *drill) note(room, id string, w wish) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if w.in {
		d.want[room][id] = w.state
	} else {
		delete(d.want[room], id)
	}
}

// in joins and states publishes. Where Redis is away they fail, and hold all
// the same when it is back.
func (p *peer) in(room string) wish {
	_, _ = p.tryCall("mesh/join-room", map[string]any{"roomName": room})
	return wish{in: true}
}

func (p *peer) states(room string, n int) wish {
	state := fmt.Sprintf(`{"n":%d}`, n)
	_, _ = p.tryCall("mesh/publish-presence-state", map[string]any{"roomName": room, "state": json.RawMessage(state)})
	return wish{in: true, state: state}
}

func (p *peer) out(room string) wish {
	_, _ = p.tryCall("mesh/leave-room", map[string]any{"roomName": room})
	return wish{}
}

// churn lets n peers per server come and go until calm is called. Each is in
// one room at a time and waits for each answer.
func (d *drill) churn(n int) { d.stir(n, d.restless) }

// stir has somebody do something n times per server, each in one room, until
// calm is called.
func (d *drill) stir(n int, somebody func(s *testServer, room string)) {
	d.t.Cleanup(d.calm) // of a test that has failed before it called it
	for _, s := range d.servers {
		for i := range n {
			d.churning.Go(func() { somebody(s, d.rooms[i%len(d.rooms)]) })
		}
	}
}

// comer connects a peer, on any goroutine; nil: the test has failed.
func (d *drill) comer(s *testServer) *peer {
	p, _, err := s.tryDial()
	if err != nil {
		if d.t.Context().Err() == nil { // otherwise the test is over
			d.t.Errorf("dial: %v", err)
		}
		return nil
	}
	return p
}

// restless is a connection that joins, changes its state and leaves.
func (d *drill) restless(s *testServer, room string) {
	p := d.comer(s)
	if p == nil {
		return
	}
	var now wish
	pace := time.NewTicker(25 * time.Millisecond)
	defer pace.Stop()
	for n := 0; ; n++ {
		select {
		case <-d.quiet:
			d.note(room, p.id, now)
			return
		case <-pace.C:
		}
		switch {
		case !now.in:
			now = p.in(room)
		case rand.N(3) > 0:
			now = p.states(room, n)
		default:
			now = p.out(room)
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
func (d *drill) wanted() map[string]sight {
	d.mu.Lock()
	defer d.mu.Unlock()
	want := make(map[string]sight, len(d.want))
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
func (d *drill) redis(want map[string]sight) string {
	for _, room := range d.rooms {
		now, err := d.servers[0].inRedis(room)
		if err != nil {
			return err.Error()
		}
		if diff := now.differs(want[room]); diff != "" {
			return fmt.Sprintf("Redis, %s: %s", room, diff)
		}
	}
	return ""
}

// told says how what the streams come to differs from what is wanted.
func (d *drill) told(want map[string]sight) string {
	for i, s := range d.streams {
		now, err := s.fold()
		if err != nil {
			return err.Error()
		}
		if diff := now.differs(want[s.room]); diff != "" {
			return fmt.Sprintf("subscriber %d, %s: %s", i, s.room, diff)
		}
	}
	return ""
}

// settles waits until everything fits, and returns how long after since.
func (d *drill) settles(since time.Time, within time.Duration) time.Duration {
	d.t.Helper()
	var last string
	for {
		if last = d.state(); last == "" {
			return time.Since(since)
		}
		if time.Since(since) > within {
			d.legal()
			require.FailNow(d.t, "does not converge within "+within.String(), last)
		}
		d.sleep(10 * time.Millisecond)
	}
}

// legal checks every stream.
func (d *drill) legal() {
	d.t.Helper()
	for i, s := range d.streams {
		if _, err := s.fold(); err != nil {
			require.FailNow(d.t, "stream is not legal", "subscriber %d, %s: %v", i, s.room, err)
		}
	}
}

// stayed checks that no stream told a leave of any of the peers.
func (d *drill) stayed(peers []*peer) {
	d.t.Helper()
	for i, s := range d.streams {
		gone := s.leaves()
		for _, p := range peers {
			require.Empty(d.t, gone[p.id], "subscriber %d was told that %s left %s", i, p.id, s.room)
		}
	}
}

// patient waits until every server may judge others.
func (d *drill) patient() {
	d.t.Helper()
	for _, s := range d.servers {
		d.eventually(20*time.Second, func() bool {
			_, ok := s.n.lease.Judge()
			return ok
		}, "patience")
	}
}

// judging reports whether every server may judge others now.
func (d *drill) judging() bool {
	for _, s := range d.servers {
		if _, ok := s.n.lease.Judge(); !ok {
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
	d.t.Helper()
	patient := true
	for !ok() {
		if patient && !d.judging() {
			patient, bound = false, bound.Add(lease)
		}
		if late := time.Since(bound); late > 0 {
			require.FailNow(d.t, fmt.Sprintf("%v late", late), fmt.Sprintf(format, args...))
		}
		const nap, through = 5 * time.Millisecond, 4
		lay := time.Now()
		d.sleep(nap)
		if over := time.Since(lay) - 2*nap; over > 0 {
			bound = bound.Add(through * over)
		}
	}
}

// over waits until dead servers are cleaned up after, shuts the others down,
// and checks that nothing is left in Redis but keys with a TTL and the format.
func (d *drill) over() {
	d.t.Helper()
	d.legal()
	c := d.client()
	d.eventually(20*time.Second, func() bool {
		living, err := c.ZCard(d.t.Context(), d.keys().Instances()).Result()
		require.NoError(d.t, err)
		dead, err := c.ZCard(d.t.Context(), d.keys().Dead()).Result()
		require.NoError(d.t, err)
		return int(living) == len(d.servers) && dead == 0
	}, "cleaning up after dead servers")
	for _, s := range d.servers {
		s.shutdown()
	}
	left := map[string]int{}
	for _, key := range d.inStore() {
		ttl, err := c.PTTL(d.t.Context(), key).Result()
		require.NoError(d.t, err)
		if ttl == -1 && key != d.keys().Format() {
			left[strings.TrimRight(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")]++
		}
	}
	require.Empty(d.t, left, "keys without a TTL after everyone left")
}
