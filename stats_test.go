package mesh_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"strings"
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

// counts returns everything that only ever rises, by name; histograms by how
// much they hold.
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

// ordinary are counters of what goes on all the time. What is said about a
// cause says nothing about them; TestStatsOfWhatGoesOn does.
var ordinary = []string{
	"Events.", "Updates.", "Deliveries", "Batches", "Changes", "Redis", "EventLag", "ExpiredEvents", "Retries",
}

// moved returns by how much counters have risen, but for the ordinary ones that
// are not asked about.
func moved(before, after mesh.Stats, asked map[string]uint64) map[string]uint64 {
	diff := make(map[string]uint64)
	was := counts(before)
next:
	for name, n := range counts(after) {
		if n == was[name] {
			continue
		}
		if _, ok := asked[name]; !ok {
			for _, prefix := range ordinary {
				if strings.HasPrefix(name, prefix) {
					continue next
				}
			}
		}
		diff[name] = n - was[name]
	}
	return diff
}

// statsRig is what the causes happen to: a server whose stats are looked at,
// which is watched from, and another one.
type statsRig struct {
	w       *harness.World
	s       *harness.Server   // of which the stats are
	line    *harness.Lifeline // its way to Redis
	other   *harness.Server
	others  *harness.Lifeline
	watcher *harness.Peer // on s, of "lobby"
}

const statsLease = 6 * time.Second

func newStatsRig(w *harness.World, setup ...func(*mesh.Options)) *statsRig {
	setup = append([]func(*mesh.Options){harness.LeaseOf(statsLease), harness.NoCommandLimit}, setup...)
	r := &statsRig{w: w}
	r.s, r.line = w.Mortal(setup...)
	r.other, r.others = w.Mortal(setup...)
	for _, s := range []*harness.Server{r.s, r.other} {
		s.Track("^short", mesh.PresenceOptions{TTL: 2 * time.Second})
		s.Track(".*", mesh.PresenceOptions{})
	}
	r.watcher = r.s.Dial()
	r.watcher.Subscribe("lobby")
	r.watcher.Subscribe("short")
	w.Sleep(2 * statsLease) // both may judge
	return r
}

// die cuts the other server off for good, with everyone on it.
func (r *statsRig) die() { r.others.Cut() }

// forge publishes an event of the lobby that no script has written, made from
// where the room stands.
func (r *statsRig) forge(frame func(p store.Position) string) {
	t := r.w.T
	t.Helper()
	ps, err := testhook.PartsOf(r.s.Server).Store.Positions(t.Context(), []string{"lobby"})
	require.NoError(t, err)
	r.w.Mem.Mini().Publish(testhook.PartsOf(r.s.Server).Keys.EventsPrefix()+"lobby", frame(ps[0]))
	r.w.Sleep(time.Second)
}

// forged is an event as the scripts write it: conn has a new state.
func forged(epoch string, seq uint64, tag, prev, conn string) string {
	return fmt.Sprintf("S %s %s %s %d . %s e i 0 2 %d . 1 0 0 1 %d\n{}", epoch, tag, prev, time.Now().UnixMilli(), conn, seq, seq)
}

// TestStatsMove: each counter moves when, and only when, the thing happens.
func TestStatsMove(t *testing.T) {
	t.Parallel()
	harness.Long(t, "every counter moves")
	type want = map[string]uint64
	tests := []struct {
		name  string
		setup func(*mesh.Options)
		ready func(r *statsRig, p *harness.Peer) // what comes before the stats are taken; p is on s, in the lobby
		do    func(r *statsRig, p *harness.Peer)
		want  want
	}{
		{name: "nothing", do: func(r *statsRig, _ *harness.Peer) { r.w.Sleep(30 * time.Second) }, want: want{}},
		{name: "leave asked", do: func(_ *statsRig, p *harness.Peer) { p.Leave("lobby") }, want: want{"Leaves.left": 1}},
		{name: "taken out by another server", do: func(r *statsRig, p *harness.Peer) {
			_, err := r.other.Rooms().Remove(r.w.T.Context(), "lobby", p.ID)
			require.NoError(r.w.T, err)
		}, want: want{"Leaves.left": 1}},
		{name: "leave of a connection elsewhere", ready: func(r *statsRig, _ *harness.Peer) {
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
		}, want: want{"Leaves.closed": 1, "Closed.closed": 1}},
		{name: "silent", ready: func(_ *statsRig, p *harness.Peer) { p.Join("short") }, do: func(r *statsRig, p *harness.Peer) {
			p.FallSilent()
			r.watcher.Expect(3*time.Second, "leave", p.ID)
			r.w.Sleep(3 * time.Second)
		}, want: want{"Leaves.silent": 1, "LeaveDelaySilent": 1}},
		{name: "cleaned up by the app", setup: harness.ExpirationOff, ready: func(_ *statsRig, p *harness.Peer) { p.Join("short") },
			do: func(r *statsRig, p *harness.Peer) {
				p.FallSilent()
				r.w.Sleep(3 * time.Second)
				n, err := r.s.Presence().CleanExpired(r.w.T.Context(), "short")
				require.NoError(r.w.T, err)
				require.Equal(r.w.T, 1, n)
			}, want: want{"Leaves.silent": 1}},
		{name: "socket silent", setup: func(o *mesh.Options) { o.PingInterval = time.Second }, do: func(r *statsRig, p *harness.Peer) {
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
		{name: "expired elsewhere", setup: harness.LeaseOf(time.Minute), ready: func(r *statsRig, _ *harness.Peer) {
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
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq+1, "t2", at.Tag, "nobody") })
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
			key := testhook.PartsOf(r.s.Server).Keys.Seq("lobby") // a change whose event went astray
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
		{name: "resubscribed, and nothing missed", ready: (*statsRig).cutOff, do: func(r *statsRig, _ *harness.Peer) {
			r.line.Mend()
			r.w.Sleep(10 * time.Second)
		}, want: want{}},
		{name: "deaf", do: func(r *statsRig, _ *harness.Peer) {
			testhook.PartsOf(r.s.Server).Listener.Remove(testhook.PartsOf(r.s.Server).Keys.ServerChannel(testhook.PartsOf(r.s.Server).Lease.Incarnation()))
			r.w.Sleep(3500 * time.Millisecond)
		}, want: want{"ListenerResets": 1, "ListenerDisconnects": 1}},
		{name: "first read", do: func(_ *statsRig, p *harness.Peer) { p.Subscribe("another") }, want: want{"FirstReads": 1}},
		{name: "watched already", do: func(_ *statsRig, p *harness.Peer) { p.Subscribe("lobby") }, want: want{}},
		{name: "data lost", do: func(r *statsRig, _ *harness.Peer) {
			r.w.Mem.FlushAll()
			r.w.Sleep(2 * statsLease)
		}, want: want{"Reregistered": 1, "Rejoined": 1, "Repairs.compare": 0}},
		// Who was on the server that died with the data is in doubt for a while,
		// and then told to have left, which nobody has ended.
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
				assert.Equal(t, want, moved(before, r.s.Stats(), tt.want))
			})
		})
	}
}

// cutOff takes Redis away from the server whose stats are looked at.
func (r *statsRig) cutOff(_ *harness.Peer) { r.line.Cut() }

// TestStatsOfWhatGoesOn: what is held, and what was told, of one short life.
func TestStatsOfWhatGoesOn(t *testing.T) {
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
		assert.Zero(t, st.Leaves["left"], "another server's")
		assert.EqualValues(t, st.RedisCalls, st.RedisLatency.Count())
		assert.GreaterOrEqual(t, st.EventLag.Count(), uint64(19), "a heartbeat each second")
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
		assert.Less(t, st.RedisLatency.Sum()+time.Second, after.RedisLatency.Sum(), "what was given up counts, too")
	})
}

// TestStatsLags: lags are what passed between the deadline and the leave.
func TestStatsLags(t *testing.T) {
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
		assert.Zero(t, st.QueuedBytes, "of one that is gone")
		assert.EqualValues(t, 1, st.Closed["broken"])
		assert.Positive(t, st.Dropped)
	})
}

// TestStatsKeysAreFixed: every key is there from the start, and is fit to be a
// label; a bare manager has the same.
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

func TestHistogram(t *testing.T) {
	t.Parallel()
	bounds := []time.Duration{time.Millisecond, time.Second}
	raw := []uint64{3, 2, 1}
	h, err := mesh.NewHistogram(bounds, raw, 5*time.Second)
	require.NoError(t, err)
	bounds[0], raw[0] = 0, 0 // copies
	assert.EqualValues(t, 6, h.Count())
	assert.Equal(t, 5*time.Second, h.Sum())
	got := maps.Collect(h.Buckets())
	assert.Equal(t, map[time.Duration]uint64{time.Millisecond: 3, time.Second: 5}, got)
	for le := range h.Buckets() {
		assert.Equal(t, time.Millisecond, le)
		break
	}
	for q, want := range map[float64]time.Duration{
		-1: time.Millisecond, 0: time.Millisecond, 0.5: time.Millisecond, 0.51: time.Second, 0.83: time.Second, 0.9: time.Second, 1: time.Second, 2: time.Second,
	} {
		assert.Equal(t, want, h.Quantile(q), "%v", q)
	}
	text, err := json.Marshal(h)
	require.NoError(t, err)
	assert.JSONEq(t, `{"count":6,"sum":5,"buckets":[{"le":0.001,"count":3},{"le":1,"count":5}]}`, string(text))

	var none mesh.Histogram
	assert.Zero(t, none.Count())
	assert.Zero(t, none.Quantile(0.5))
	text, err = json.Marshal(none)
	require.NoError(t, err)
	assert.JSONEq(t, `{"count":0,"sum":0,"buckets":[]}`, string(text))
	for range none.Buckets() {
		t.Error("a bucket")
	}
	_, err = mesh.NewHistogram(bounds, raw[1:], 0)
	require.ErrorIs(t, err, mesh.ErrInvalidOptions)
	_, err = mesh.NewHistogram([]time.Duration{2, 2}, raw, 0)
	require.ErrorIs(t, err, mesh.ErrInvalidOptions)
}
