package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// counts returns all counters by name, and of histograms the numbers of values.
func counts(s mesh.Stats) map[string]uint64 {
	all := make(map[string]uint64)
	v := reflect.ValueOf(s)
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		switch f := v.Field(i).Interface().(type) {
		case uint64:
			all[name] = f
		case map[string]uint64:
			for key, n := range f {
				all[name+"."+key] = n
			}
		case mesh.Histogram:
			all[name] = f.Count()
		}
	}
	return all
}

// ordinary has the counters that rise all the time. TestCounters ignores them, except
// for those that a case names. TestStatsOfNormalOperation checks them.
var ordinary = []string{
	"Events.", "Updates.", "Deliveries", "Batches", "Changes", "Redis", "EventLag", "ExpiredEvents", "Retries",
}

// risen returns how much each counter has risen, without the ordinary ones that are not
// named.
func risen(before, after mesh.Stats, named map[string]uint64) map[string]uint64 {
	diff := make(map[string]uint64)
	first := counts(before)
next:
	for name, n := range counts(after) {
		if n == first[name] {
			continue
		}
		if _, ok := named[name]; !ok {
			for _, prefix := range ordinary {
				if strings.HasPrefix(name, prefix) {
					continue next
				}
			}
		}
		diff[name] = n - first[name]
	}
	return diff
}

// statsRig has a server whose stats are checked, a watcher on it, and another server.
type statsRig struct {
	w         *harness.World
	s         *harness.Server   // the server whose stats are checked
	line      *harness.Lifeline // the connections of s to Redis
	other     *harness.Server
	otherLine *harness.Lifeline
	watcher   *harness.Peer // on s
}

const statsLease = 6 * time.Second

func newStatsRig(w *harness.World, setup ...func(*mesh.Options)) *statsRig {
	setup = append([]func(*mesh.Options){harness.LeaseOf(statsLease), harness.NoCommandLimit}, setup...)
	r := &statsRig{w: w}
	r.s, r.line = w.Mortal(setup...)
	r.other, r.otherLine = w.Mortal(setup...)
	for _, s := range []*harness.Server{r.s, r.other} {
		s.Track("^short", mesh.PresenceOptions{TTL: 2 * time.Second})
		s.Track(".*", mesh.PresenceOptions{})
	}
	r.watcher = r.s.Dial()
	r.watcher.Subscribe("lobby")
	r.watcher.Subscribe("short")
	w.Sleep(2 * statsLease) // until both are in contact
	return r
}

// die cuts the other server off from Redis for good.
func (r *statsRig) die() { r.otherLine.Cut() }

// forge publishes an event of the room lobby that no script has written. event makes it
// from the position of the room.
func (r *statsRig) forge(event func(p store.Position) string) {
	t := r.w.T
	t.Helper()
	ps, err := testhook.PartsOf(r.s.Server).Store.Positions(t.Context(), []string{"lobby"})
	require.NoError(t, err)
	r.w.Mem.Mini().Publish(testhook.PartsOf(r.s.Server).Keys.EventsPrefix()+"lobby", event(ps[0]))
	r.w.Sleep(time.Second)
}

// forged returns an event in the format of the scripts, with a new state of conn.
func forged(epoch string, seq uint64, tag, prev, conn string) string {
	return fmt.Sprintf("S %s %s %s %d . %s e i 0 2 %d . 1 0 0 1 %d\n{}", epoch, tag, prev, time.Now().UnixMilli(), conn, seq, seq)
}

// TestCounters checks that each counter rises if its cause happens, and that the other
// counters do not.
func TestCounters(t *testing.T) {
	t.Parallel()
	harness.Long(t, "has a case for each counter")
	type want = map[string]uint64
	tests := []struct {
		name  string
		setup func(*mesh.Options)
		ready func(r *statsRig, p *harness.Peer) // runs before the stats are taken; p is on s and in the lobby
		do    func(r *statsRig, p *harness.Peer)
		want  want
	}{
		{name: "nothing", do: func(r *statsRig, _ *harness.Peer) { r.w.Sleep(30 * time.Second) }, want: want{}},
		{name: "left", do: func(_ *statsRig, p *harness.Peer) { p.Leave("lobby") }, want: want{"Leaves.left": 1}},
		{name: "removed by another server", do: func(r *statsRig, p *harness.Peer) {
			_, err := r.other.Rooms().Remove(r.w.T.Context(), "lobby", p.ID)
			require.NoError(r.w.T, err)
		}, want: want{"Leaves.left": 1}},
		{name: "left on another server", ready: func(r *statsRig, _ *harness.Peer) {
			far := r.other.Dial()
			far.Join("lobby")
			r.w.T.Cleanup(func() { far.Close() })
			far.Leave("lobby")
		}, do: func(r *statsRig, _ *harness.Peer) { r.w.Sleep(time.Second) }, want: want{}},
		{name: "closed", do: func(r *statsRig, p *harness.Peer) {
			p.Join("elsewhere")
			p.Close()
			r.watcher.Expect(time.Second, "leave", p.ID)
			r.w.Sleep(time.Second)
		}, want: want{"Leaves.closed": 2, "Closed.broken": 1}},
		{name: "closed by the app", do: func(r *statsRig, p *harness.Peer) {
			c, ok := r.s.Connection(p.ID)
			require.True(r.w.T, ok)
			c.Close(1000, "")
			r.watcher.Expect(5*time.Second, "leave", p.ID)
			r.w.Sleep(time.Second)
		}, want: want{"Leaves.left": 1, "Closed.closed": 1}},
		{name: "silent", ready: func(_ *statsRig, p *harness.Peer) { p.Join("short") }, do: func(r *statsRig, p *harness.Peer) {
			p.FallSilent()
			r.watcher.Expect(3*time.Second, "leave", p.ID)
			r.w.Sleep(3 * time.Second)
		}, want: want{"Leaves.silent": 1, "LeaveDelaySilent": 1}},
		{name: "CleanExpired", setup: harness.ExpirationOff, ready: func(_ *statsRig, p *harness.Peer) { p.Join("short") },
			do: func(r *statsRig, p *harness.Peer) {
				p.FallSilent()
				r.w.Sleep(3 * time.Second)
				n, err := r.s.Presence().CleanExpired(r.w.T.Context(), "short")
				require.NoError(r.w.T, err)
				require.Equal(r.w.T, 1, n)
			}, want: want{"Leaves.silent": 1}},
		{name: "silent socket", setup: func(o *mesh.Options) { o.PingInterval = time.Second }, do: func(r *statsRig, p *harness.Peer) {
			p.Mute()
			r.watcher.Expect(10*time.Second, "leave", p.ID)
			r.w.Sleep(time.Second)
		}, want: want{"Leaves.closed": 1, "Closed.silent": 1}},
		{name: "server lost", ready: func(r *statsRig, _ *harness.Peer) {
			for range 3 {
				r.other.Dial().Join("lobby")
			}
		}, do: func(r *statsRig, _ *harness.Peer) {
			r.die()
			r.w.Sleep(statsLease + time.Second)
		}, want: want{"Leaves.server_lost": 3, "LeaveDelayServerLost": 3, "ServersDeclaredDead": 1}},
		{name: "expired while the owner is away", setup: harness.LeaseOf(time.Minute), ready: func(r *statsRig, _ *harness.Peer) {
			r.w.Sleep(2 * time.Minute)
			p := r.other.Dial()
			p.Join("short")
			p.Join("lobby")
			p.State("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 3000})
		}, do: func(r *statsRig, _ *harness.Peer) {
			r.die()
			r.w.Sleep(10 * time.Second)
		}, want: want{"Leaves.expired": 1, "StatesExpired": 1, "ExpiredEventsUsed": 2}},
		{name: "declared dead", do: func(r *statsRig, p *harness.Peer) {
			require.NoError(r.w.T, testhook.PartsOf(r.other).Store.DeclareDead(r.w.T.Context(), r.s.Stats().Incarnation))
			r.w.Sleep(2 * statsLease)
		}, want: want{"Reregistered": 1, "Rejoined": 1}},
		{name: "gap", do: func(r *statsRig, p *harness.Peer) {
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq+2, "t2", "t1", p.ID) })
		}, want: want{"Repairs.gap": 1, "EventsEarly": 1}},
		{name: "fork", do: func(r *statsRig, p *harness.Peer) {
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq+1, "t2", "t1", p.ID) })
		}, want: want{"Repairs.fork": 1}},
		{name: "epoch", do: func(r *statsRig, p *harness.Peer) {
			r.forge(func(store.Position) string { return forged("other", 7, "t2", "t1", p.ID) })
		}, want: want{"Repairs.epoch": 1}},
		{name: "unreadable", do: func(r *statsRig, _ *harness.Peer) {
			r.forge(func(store.Position) string { return "?" })
		}, want: want{"Repairs.unreadable": 1, "EventsIgnored.unreadable": 1}},
		{name: "inconsistent", do: func(r *statsRig, _ *harness.Peer) {
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq+1, "t2", at.Tag, "unknown") })
		}, want: want{"Repairs.inconsistent": 1}},
		{name: "duplicate", do: func(r *statsRig, p *harness.Peer) {
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq, at.Tag, "t1", p.ID) })
		}, want: want{"EventsIgnored.duplicate": 1}},
		{name: "stray", do: func(r *statsRig, _ *harness.Peer) {
			testhook.PartsOf(r.s.Server).Listener.Add(testhook.PartsOf(r.s.Server).Keys.EventsPrefix() + "unwatched")
			r.w.Sleep(time.Second)
			r.w.Mem.Mini().Publish(testhook.PartsOf(r.s.Server).Keys.EventsPrefix()+"unwatched", "?")
			r.w.Sleep(time.Second)
		}, want: want{"EventsIgnored.stray": 1}},
		{name: "compare", do: func(r *statsRig, _ *harness.Peer) {
			key := testhook.PartsOf(r.s.Server).Keys.Seq("lobby") // a change without an event
			at, err := testhook.PartsOf(r.s.Server).Store.Positions(r.w.T.Context(), []string{"lobby"})
			require.NoError(r.w.T, err)
			r.w.Mem.Mini().Set(key, fmt.Sprintf("%s %d t1", at[0].Epoch, at[0].Seq+1))
			r.w.Sleep(15 * time.Second)
		}, want: want{"Repairs.compare": 1}},
		{name: "resubscribed", ready: (*statsRig).cutOff, do: func(r *statsRig, _ *harness.Peer) {
			r.other.Dial().Join("lobby")
			r.w.Sleep(100 * time.Millisecond)
			r.line.Mend()
			r.w.Sleep(10 * time.Second)
		}, want: want{"Repairs.resubscribed": 1, "RepairUpdates": 1, "Updates.join": 1, "Events.join": 0}},
		{name: "resubscribed without a missed event", ready: (*statsRig).cutOff, do: func(r *statsRig, _ *harness.Peer) {
			r.line.Mend()
			r.w.Sleep(10 * time.Second)
		}, want: want{}},
		{name: "listener reset", do: func(r *statsRig, _ *harness.Peer) {
			testhook.PartsOf(r.s.Server).Listener.Remove(testhook.PartsOf(r.s.Server).Keys.ServerChannel(testhook.PartsOf(r.s.Server).Lease.Incarnation()))
			r.w.Sleep(3500 * time.Millisecond)
		}, want: want{"ListenerResets": 1, "ListenerDisconnects": 1}},
		{name: "first read", do: func(_ *statsRig, p *harness.Peer) { p.Subscribe("another") }, want: want{"FirstReads": 1}},
		{name: "already watched", do: func(_ *statsRig, p *harness.Peer) { p.Subscribe("lobby") }, want: want{}},
		{name: "data lost", do: func(r *statsRig, _ *harness.Peer) {
			r.w.Mem.FlushAll()
			r.w.Sleep(2 * statsLease)
		}, want: want{"Reregistered": 1, "Rejoined": 1, "Repairs.compare": 0}},
		// The member on the server that died with the data is unconfirmed for a while.
		// Then its leave is delivered, although no server has ended its entry.
		{name: "verify", ready: func(r *statsRig, _ *harness.Peer) { r.other.Dial().Join("lobby") }, do: func(r *statsRig, _ *harness.Peer) {
			r.die()
			r.w.Mem.FlushAll()
			r.w.Sleep(3 * statsLease)
		}, want: want{"Reregistered": 1, "Rejoined": 1, "Repairs.verify": 1, "RepairUpdates": 1, "Updates.leave": 1, "Leaves.server_lost": 0}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				setup := tt.setup
				if setup == nil {
					setup = func(*mesh.Options) {}
				}
				r := newStatsRig(w, setup)
				p := r.s.Dial()
				p.Join("lobby")
				r.watcher.Expect(time.Second, "join", p.ID)
				w.Sleep(2 * time.Second)
				if tt.ready != nil {
					tt.ready(r, p)
					w.Sleep(time.Second)
				}
				before := r.s.Stats()
				tt.do(r, p)
				synctest.Wait()
				want := make(map[string]uint64)
				for name, n := range tt.want {
					require.Contains(t, counts(before), name)
					if n > 0 {
						want[name] = n
					}
				}
				assert.Equal(t, want, risen(before, r.s.Stats(), tt.want))
			})
		})
	}
}

// cutOff cuts the server whose stats are checked off from Redis.
func (r *statsRig) cutOff(_ *harness.Peer) { r.line.Cut() }

// TestStatsOfNormalOperation checks the gauges and the ordinary counters after a few
// joins, states and leaves, and after a short outage of Redis.
func TestStatsOfNormalOperation(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		watchers := harness.Subscribers("lobby", s1, s1, s2)
		a, b := s1.Dial(), s2.Dial()
		a.Join("lobby")
		a.Join("quiet")
		b.Join("lobby")
		b.State("lobby", map[string]any{"n": 1})
		b.State("lobby", map[string]any{"n": 2}, map[string]any{"silent": true})
		require.NoError(t, s2.Connections().SetMetadata(t.Context(), b.ID, 1, mesh.MetadataOptions{}))
		b.Leave("lobby")
		for _, p := range watchers {
			p.Expect(time.Second, "leave", b.ID)
		}
		w.Sleep(20 * time.Second)
		st := s1.Stats()
		assert.Equal(t, []int{3, 2, 2, 1, 2}, []int{st.Connections, st.Entries, st.Rooms, st.Watched, st.Subscriptions})
		assert.Zero(t, st.Unwritten)
		assert.Zero(t, st.Stale)
		assert.Equal(t, map[string]uint64{"join": 2, "rejoin": 0, "leave": 1, "state": 2, "metadata": 1, "disconnect": 0}, st.Events)
		assert.Equal(t, map[string]uint64{"join": 2, "leave": 1, "state": 1, "metadata": 1, "disconnect": 0, "reconnect": 0}, st.Updates,
			"the silent state is not delivered")
		assert.EqualValues(t, 2*5, st.Deliveries)
		assert.EqualValues(t, 1, s2.Stats().Leaves["left"])
		assert.Zero(t, st.Leaves["left"], "only the owner counts the leave")
		assert.EqualValues(t, st.RedisCalls, st.RedisLatency.Count())
		assert.GreaterOrEqual(t, st.EventLag.Count(), uint64(19), "one echo per second")
		assert.Less(t, st.LeaseAge, 4*time.Second)
		assert.True(t, st.CanDeclareDead)
		assert.True(t, st.ExpiredEventsWorking)
		assert.Zero(t, st.RedisFailures)

		w.Away()
		_, err := s1.Presence().PresentConnections(t.Context(), "nowhere")
		require.ErrorIs(t, err, mesh.ErrUnavailable)
		w.Sleep(5 * time.Second) // a renewal is due every third of the lease
		w.Back()
		w.Sleep(10 * time.Second)
		after := s1.Stats()
		assert.Positive(t, after.RedisFailures)
		assert.Positive(t, after.LeaseFailures)
		assert.Less(t, st.RedisLatency.Sum()+time.Second, after.RedisLatency.Sum(), "calls that failed count too")
	})
}

// TestLeaveDelays checks that a leave delay is the time between the moment at which an
// entry should have ended and its leave.
func TestLeaveDelays(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		r := newStatsRig(w)
		p, lost := r.s.Dial(), r.other.Dial()
		p.Join("short")
		lost.Join("lobby")
		_, seen := p.FallSilent()
		r.watcher.Expect(3*time.Second, "leave", p.ID)
		late := time.Since(seen) - 2*time.Second
		st := r.s.Stats()
		assert.InDelta(t, late.Seconds(), st.LeaveDelaySilent.Sum().Seconds(), 0.03)

		renewed := time.Now().Add(-r.other.Stats().LeaseAge)
		r.die()
		r.watcher.Expect(statsLease+time.Second, "leave", lost.ID)
		w.Sleep(10 * time.Millisecond)
		late = time.Since(renewed) - statsLease
		assert.InDelta(t, late.Seconds(), r.s.Stats().LeaveDelayServerLost.Sum().Seconds(), 0.05)
	})
}

func TestStatsOfQueues(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.WriteTimeout = time.Hour })
		slow, slower, fine := s.Raw(), s.Raw(), s.Dial()
		send := func(conn string, size int) {
			c, ok := s.Connection(conn)
			require.True(t, ok)
			require.NoError(t, c.Send("say", strings.Repeat("x", size)))
		}
		send(slow.ID, 1000)
		for range 2 {
			send(slower.ID, 2000)
		}
		send(fine.ID, 5000)
		w.Sleep(time.Second)
		st := s.Stats()
		sizes := make(map[string]int)
		for _, id := range []string{slow.ID, slower.ID} {
			c, _ := s.Connection(id)
			sizes[id] = testhook.QueueBytes(c)
		}
		assert.Greater(t, sizes[slow.ID], 1000)
		assert.Greater(t, sizes[slower.ID], 4000)
		assert.EqualValues(t, sizes[slow.ID]+sizes[slower.ID], st.QueuedBytes)
		assert.EqualValues(t, sizes[slower.ID], st.LongestQueue)
		slow.Next()
		slower.Next()
		slower.Next()
		w.Sleep(time.Second)
		st = s.Stats()
		assert.Zero(t, st.QueuedBytes)
		assert.Zero(t, st.LongestQueue)
		assert.Zero(t, st.Dropped)

		send(slow.ID, 1000)
		send(slow.ID, 1000)
		require.NoError(t, slow.WS.Close())
		w.Sleep(5 * time.Second)
		st = s.Stats()
		assert.Zero(t, st.QueuedBytes, "the queue of a closed socket does not count")
		assert.EqualValues(t, 1, st.Closed["broken"])
		assert.Positive(t, st.Dropped)
	})
}

// TestStatsKeysAreFixed checks that all keys exist from the start and are valid labels.
// A manager must have the same keys as a server.
func TestStatsKeysAreFixed(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		srv, err := mesh.NewServer(w.Options())
		require.NoError(t, err)
		p, err := mesh.NewPresenceManager(w.Options())
		require.NoError(t, err)
		fresh := counts(srv.Stats())
		for name, n := range fresh {
			assert.Zero(t, n, name)
			assert.Regexp(t, `^[A-Za-z]+(\.([a-z0-9_]+|E[A-Z]+))?$`, name)
		}
		assert.Equal(t, fresh, counts(p.Stats()))
		assert.EqualValues(t, -1, srv.Stats().LeaseAge)
		assert.Empty(t, srv.Stats().Incarnation)

		s := w.Tracked()
		a := s.Dial()
		a.Join("lobby")
		a.Subscribe("lobby")
		a.Close()
		w.Sleep(5 * time.Second)
		var names, later []string
		for name := range fresh {
			names = append(names, name)
		}
		for name := range counts(s.Stats()) {
			later = append(later, name)
		}
		assert.ElementsMatch(t, names, later)
	})
}

const (
	statsConns = 100_000
	statsRooms = 10_000
)

func statsRoom(i int) string { return "room" + strconv.Itoa(i%statsRooms) }

// busyManager returns a manager with 100,000 connections, each in one of 10,000 watched
// rooms, and the positions of the rooms.
func busyManager(b *testing.B) (*mesh.PresenceManager, []store.Position) {
	b.Helper()
	off := false
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: benchRedis(b), EnablePresenceExpirationEvents: &off})
	require.NoError(b, err)
	require.NoError(b, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
	require.NoError(b, p.Start(b.Context()))
	b.Cleanup(func() { require.NoError(b, p.Shutdown(context.Background())) })
	var callers sync.WaitGroup
	for worker := range benchCallers {
		callers.Go(func() {
			for i := worker; i < statsConns; i += benchCallers {
				id := "conn" + strconv.Itoa(i)
				if err := p.Connect(b.Context(), id, nil); err != nil {
					b.Error(err)
				}
				// On a busy machine the join may be written only after the call has ended.
				if err := p.Join(b.Context(), statsRoom(i), id); err != nil && !errors.Is(err, mesh.ErrUnavailable) {
					b.Error(err)
				}
			}
		})
	}
	callers.Wait()
	require.Eventually(b, func() bool { return p.Stats().Unwritten == 0 }, time.Minute, 10*time.Millisecond)
	ctx, stop := context.WithCancel(b.Context())
	var watchers, ready sync.WaitGroup
	b.Cleanup(func() { stop(); watchers.Wait() })
	rooms := make([]string, statsRooms)
	for i := range rooms {
		rooms[i] = statsRoom(i)
		ready.Add(1)
		watchers.Go(func() {
			begun := sync.OnceFunc(ready.Done)
			for range p.Subscribe(ctx, rooms[i], mesh.SubscribeOptions{}) {
				begun()
			}
		})
	}
	ready.Wait()
	at, err := testhook.PartsOf(p).Store.Positions(b.Context(), rooms)
	require.NoError(b, err)
	return p, at
}

// BenchmarkStats measures a call of Stats on a busy manager, and how much it delays the
// delivery of events. "deliver alone" delivers one event to each room in turn, without
// calls of Stats. "deliver beside" does the same while a goroutine calls Stats all the
// time. An app calls it every few seconds.
func BenchmarkStats(b *testing.B) {
	p, at := busyManager(b)
	require.Equal(b, statsConns, p.Stats().Entries)
	b.Run("call", func(b *testing.B) {
		for b.Loop() {
			p.Stats()
		}
	})
	n := 0
	deliver := func(b *testing.B) {
		var took []time.Duration
		for b.Loop() {
			i := n % statsRooms
			next := store.Position{Epoch: at[i].Epoch, Seq: at[i].Seq + 1, Tag: fmt.Sprintf("b%d", n)}
			event := forged(next.Epoch, next.Seq, next.Tag, at[i].Tag, "conn"+strconv.Itoa(i))
			began := time.Now()
			testhook.PartsOf(p).Hub.HandleEvent(statsRoom(i), event)
			took = append(took, time.Since(began))
			at[i] = next
			n++
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)*999/1000].Microseconds()), "µs/p99.9")
		b.ReportMetric(float64(took[len(took)-1].Microseconds()), "µs/max")
	}
	b.Run("deliver alone", deliver)
	b.Run("deliver beside", func(b *testing.B) {
		stop := make(chan struct{})
		var calls sync.WaitGroup
		calls.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					p.Stats()
				}
			}
		})
		deliver(b)
		close(stop)
		calls.Wait()
	})
	require.Zero(b, p.Stats().Repairs["fork"], "the forged events must not be forks")
}
