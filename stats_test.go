package mesh

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// reads returns how many rooms were read from Redis to be mirrored.
func reads(s Stats) uint64 {
	n := s.FirstReads
	for _, again := range s.Repairs {
		n += again
	}
	return n
}

// counts returns everything that only ever rises, by name; histograms by how
// much they hold.
func counts(s Stats) map[string]uint64 {
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
		case Histogram:
			all[name] = f.Count()
		}
	}
	return all
}

// ordinary are counters of what goes on all the time. What is said about a
// cause says nothing about them; TestStatsOfWhatGoesOn does.
var ordinary = []string{
	"Events.", "Updates.", "Deliveries", "Batches", "Changes", "Redis", "EventLag", "Hints", "Retries",
}

// moved returns by how much counters have risen, but for the ordinary ones that
// are not asked about.
func moved(before, after Stats, asked map[string]uint64) map[string]uint64 {
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
	w       *world
	s       *testServer // of which the stats are
	line    *lifeline   // its way to Redis
	other   *testServer
	others  *lifeline
	watcher *peer // on s, of "lobby"
}

const statsLease = 6 * time.Second

func newStatsRig(w *world, setup ...func(*Options)) *statsRig {
	setup = append([]func(*Options){leaseOf(statsLease), noCommandLimit}, setup...)
	r := &statsRig{w: w}
	r.s, r.line = w.mortal(setup...)
	r.other, r.others = w.mortal(setup...)
	for _, s := range []*testServer{r.s, r.other} {
		s.track("^short", PresenceOptions{TTL: 2 * time.Second})
		s.track(".*", PresenceOptions{})
	}
	r.watcher = r.s.dial()
	r.watcher.subscribe("lobby")
	r.watcher.subscribe("short")
	w.sleep(2 * statsLease) // both may judge
	return r
}

// die cuts the other server off for good, with everyone on it.
func (r *statsRig) die() { r.others.cut() }

// forge publishes an event of the lobby that no script has written, made from
// where the room stands.
func (r *statsRig) forge(make func(p store.Position) string) {
	t := r.w.t
	t.Helper()
	ps, err := r.s.n.store.Positions(t.Context(), []string{"lobby"})
	require.NoError(t, err)
	r.w.mem.Mini().Publish(r.s.n.keys.EventsPrefix()+"lobby", make(ps[0]))
	r.w.sleep(time.Second)
}

// forged is an event as the scripts write it: conn has a new state.
func forged(epoch string, seq uint64, tag, prev, conn string) string {
	return fmt.Sprintf("S %s %s %s %d . %s e i 0 2 %d . 1 0 0 1 %d\n{}", epoch, tag, prev, time.Now().UnixMilli(), conn, seq, seq)
}

// TestStatsMove: each counter moves when, and only when, the thing happens.
func TestStatsMove(t *testing.T) {
	t.Parallel()
	type want = map[string]uint64
	tests := []struct {
		name  string
		setup func(*Options)
		ready func(r *statsRig, p *peer) // what comes before the stats are taken; p is on s, in the lobby
		do    func(r *statsRig, p *peer)
		want  want
	}{
		{name: "nothing", do: func(r *statsRig, _ *peer) { r.w.sleep(30 * time.Second) }, want: want{}},
		{name: "leave asked", do: func(_ *statsRig, p *peer) { p.leave("lobby") }, want: want{"Leaves.left": 1}},
		{name: "taken out by another server", do: func(r *statsRig, p *peer) {
			_, err := r.other.Rooms().Remove(r.w.t.Context(), "lobby", p.id)
			require.NoError(r.w.t, err)
		}, want: want{"Leaves.left": 1}},
		{name: "leave of a connection elsewhere", ready: func(r *statsRig, _ *peer) {
			far := r.other.dial()
			far.join("lobby")
			r.w.t.Cleanup(func() { far.close() })
			far.leave("lobby")
		}, do: func(r *statsRig, _ *peer) { r.w.sleep(time.Second) }, want: want{}},
		{name: "closed", do: func(r *statsRig, p *peer) {
			p.join("elsewhere")
			p.close()
			r.watcher.expect(time.Second, "leave", p.id)
			r.w.sleep(time.Second)
		}, want: want{"Leaves.closed": 2, "Closed.broken": 1}},
		{name: "closed by the app", do: func(r *statsRig, p *peer) {
			c, ok := r.s.Connection(p.id)
			require.True(r.w.t, ok)
			c.Close(1000, "")
			r.watcher.expect(5*time.Second, "leave", p.id)
			r.w.sleep(time.Second)
		}, want: want{"Leaves.closed": 1, "Closed.closed": 1}},
		{name: "silent", ready: func(_ *statsRig, p *peer) { p.join("short") }, do: func(r *statsRig, p *peer) {
			p.fallSilent()
			r.watcher.expect(3*time.Second, "leave", p.id)
			r.w.sleep(3 * time.Second)
		}, want: want{"Leaves.silent": 1, "ReapLagSilent": 1}},
		{name: "cleaned up by the app", setup: expirationOff, ready: func(_ *statsRig, p *peer) { p.join("short") },
			do: func(r *statsRig, p *peer) {
				p.fallSilent()
				r.w.sleep(3 * time.Second)
				n, err := r.s.Presence().CleanExpired(r.w.t.Context(), "short")
				require.NoError(r.w.t, err)
				require.Equal(r.w.t, 1, n)
			}, want: want{"Leaves.silent": 1}},
		{name: "socket silent", setup: func(o *Options) { o.PingInterval = time.Second }, do: func(r *statsRig, p *peer) {
			p.mute()
			r.watcher.expect(10*time.Second, "leave", p.id)
			r.w.sleep(time.Second)
		}, want: want{"Leaves.closed": 1, "Closed.silent": 1}},
		{name: "server lost", ready: func(r *statsRig, _ *peer) {
			for range 3 {
				r.other.dial().join("lobby")
			}
		}, do: func(r *statsRig, _ *peer) {
			r.die()
			r.w.sleep(statsLease + time.Second)
		}, want: want{"Leaves.server_lost": 3, "ReapLagLost": 3, "Buried": 1}},
		{name: "expired elsewhere", setup: leaseOf(time.Minute), ready: func(r *statsRig, _ *peer) {
			r.w.sleep(2 * time.Minute)
			p := r.other.dial()
			p.join("short")
			p.join("lobby")
			p.state("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 3000})
		}, do: func(r *statsRig, _ *peer) {
			r.die()
			r.w.sleep(10 * time.Second)
		}, want: want{"Leaves.expired": 1, "StatesExpired": 1, "Hints": 2}},
		{name: "declared dead", do: func(r *statsRig, p *peer) {
			require.NoError(r.w.t, r.other.n.store.DeclareDead(r.w.t.Context(), r.s.Stats().Incarnation))
			r.w.sleep(2 * statsLease)
		}, want: want{"Reborn": 1, "Rejoined": 1}},
		{name: "gap", do: func(r *statsRig, p *peer) {
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq+2, "t2", "t1", p.id) })
		}, want: want{"Repairs.gap": 1, "EventsEarly": 1}},
		{name: "fork", do: func(r *statsRig, p *peer) {
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq+1, "t2", "t1", p.id) })
		}, want: want{"Repairs.fork": 1}},
		{name: "epoch", do: func(r *statsRig, p *peer) {
			r.forge(func(store.Position) string { return forged("other", 7, "t2", "t1", p.id) })
		}, want: want{"Repairs.epoch": 1}},
		{name: "unreadable", do: func(r *statsRig, _ *peer) {
			r.forge(func(store.Position) string { return "?" })
		}, want: want{"Repairs.unreadable": 1, "EventsIgnored.unreadable": 1}},
		{name: "inconsistent", do: func(r *statsRig, _ *peer) {
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq+1, "t2", at.Tag, "nobody") })
		}, want: want{"Repairs.inconsistent": 1}},
		{name: "duplicate", do: func(r *statsRig, p *peer) {
			r.forge(func(at store.Position) string { return forged(at.Epoch, at.Seq, at.Tag, "t1", p.id) })
		}, want: want{"EventsIgnored.duplicate": 1}},
		{name: "stray", do: func(r *statsRig, _ *peer) {
			r.s.n.listener.Add(r.s.n.keys.EventsPrefix() + "unwatched")
			r.w.sleep(time.Second)
			r.w.mem.Mini().Publish(r.s.n.keys.EventsPrefix()+"unwatched", "?")
			r.w.sleep(time.Second)
		}, want: want{"EventsIgnored.stray": 1}},
		{name: "compare", do: func(r *statsRig, _ *peer) {
			key := r.s.n.keys.Seq("lobby") // a change whose event went astray
			at, err := r.s.n.store.Positions(r.w.t.Context(), []string{"lobby"})
			require.NoError(r.w.t, err)
			r.w.mem.Mini().Set(key, fmt.Sprintf("%s %d t1", at[0].Epoch, at[0].Seq+1))
			r.w.sleep(15 * time.Second)
		}, want: want{"Repairs.compare": 1}},
		{name: "resubscribed", ready: (*statsRig).cutOff, do: func(r *statsRig, _ *peer) {
			r.other.dial().join("lobby")
			r.w.sleep(100 * time.Millisecond)
			r.line.mend()
			r.w.sleep(10 * time.Second)
		}, want: want{"Repairs.resubscribed": 1, "RepairUpdates": 1, "Updates.join": 1, "Events.join": 0}},
		{name: "resubscribed, and nothing missed", ready: (*statsRig).cutOff, do: func(r *statsRig, _ *peer) {
			r.line.mend()
			r.w.sleep(10 * time.Second)
		}, want: want{}},
		{name: "deaf", do: func(r *statsRig, _ *peer) {
			r.s.n.listener.Remove(r.s.n.keys.Control(r.s.n.lease.Incarnation()))
			r.w.sleep(3500 * time.Millisecond)
		}, want: want{"Deaf": 1, "ListenerLost": 1}},
		{name: "first read", do: func(_ *statsRig, p *peer) { p.subscribe("another") }, want: want{"FirstReads": 1}},
		{name: "watched already", do: func(_ *statsRig, p *peer) { p.subscribe("lobby") }, want: want{}},
		{name: "data lost", do: func(r *statsRig, _ *peer) {
			r.w.mem.FlushAll()
			r.w.sleep(2 * statsLease)
		}, want: want{"Reborn": 1, "Rejoined": 1, "Repairs.compare": 0}},
		// Who was on the server that died with the data is in doubt for a while,
		// and then told to have left, which nobody has ended.
		{name: "verify", ready: func(r *statsRig, _ *peer) { r.other.dial().join("lobby") }, do: func(r *statsRig, _ *peer) {
			r.die()
			r.w.mem.FlushAll()
			r.w.sleep(3 * statsLease)
		}, want: want{"Reborn": 1, "Rejoined": 1, "Repairs.verify": 1, "RepairUpdates": 1, "Updates.leave": 1, "Leaves.server_lost": 0}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				setup := tt.setup
				if setup == nil {
					setup = func(*Options) {}
				}
				r := newStatsRig(w, setup)
				p := r.s.dial()
				p.join("lobby")
				r.watcher.expect(time.Second, "join", p.id)
				w.sleep(2 * time.Second)
				if tt.ready != nil {
					tt.ready(r, p)
					w.sleep(time.Second)
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
func (r *statsRig) cutOff(_ *peer) { r.line.cut() }

// TestStatsOfWhatGoesOn: what is held, and what was told, of one short life.
func TestStatsOfWhatGoesOn(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		watchers := subscribers("lobby", s1, s1, s2)
		a, b := s1.dial(), s2.dial()
		a.join("lobby")
		a.join("quiet")
		b.join("lobby")
		b.state("lobby", map[string]any{"n": 1})
		b.state("lobby", map[string]any{"n": 2}, map[string]any{"silent": true})
		require.NoError(t, s2.Connections().SetMetadata(t.Context(), b.id, 1, MetadataOptions{}))
		b.leave("lobby")
		for _, p := range watchers {
			p.expect(time.Second, "leave", b.id)
		}
		w.sleep(20 * time.Second)
		st := s1.Stats()
		assert.Equal(t, []int{3, 2, 2, 1, 2}, []int{st.Connections, st.Entries, st.Rooms, st.Watched, st.Subscriptions})
		assert.Zero(t, st.Unwritten)
		assert.Zero(t, st.Stale)
		assert.Equal(t, map[string]uint64{"join": 2, "rejoin": 0, "leave": 1, "state": 2, "metadata": 1}, st.Events)
		assert.Equal(t, map[string]uint64{"join": 2, "leave": 1, "state": 1}, st.Updates, "the silent state is told nobody")
		assert.EqualValues(t, 2*4, st.Deliveries)
		assert.EqualValues(t, 1, s2.Stats().Leaves["left"])
		assert.Zero(t, st.Leaves["left"], "another server's")
		assert.EqualValues(t, st.RedisCalls, st.RedisLatency.Count())
		assert.GreaterOrEqual(t, st.EventLag.Count(), uint64(19), "a heartbeat each second")
		assert.Less(t, st.LeaseAge, 4*time.Second)
		assert.True(t, st.MayJudge)
		assert.True(t, st.ExpiredEvents)
		assert.Zero(t, st.RedisFailures)

		w.away()
		_, err := s1.Presence().PresentConnections(t.Context(), "nowhere")
		require.ErrorIs(t, err, ErrUnavailable)
		w.sleep(5 * time.Second) // a renewal is due every third of the lease
		w.back()
		w.sleep(10 * time.Second)
		after := s1.Stats()
		assert.Positive(t, after.RedisFailures)
		assert.Positive(t, after.LeaseFailures)
		assert.Less(t, st.RedisLatency.Sum()+time.Second, after.RedisLatency.Sum(), "what was given up counts, too")
	})
}

// TestStatsLags: lags are what passed between the deadline and the leave.
func TestStatsLags(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		r := newStatsRig(w)
		p, lost := r.s.dial(), r.other.dial()
		p.join("short")
		lost.join("lobby")
		_, seen := p.fallSilent()
		r.watcher.expect(3*time.Second, "leave", p.id)
		late := time.Since(seen) - 2*time.Second
		st := r.s.Stats()
		assert.InDelta(t, late.Seconds(), st.ReapLagSilent.Sum().Seconds(), 0.03)

		renewed := time.Now().Add(-r.other.Stats().LeaseAge)
		r.die()
		r.watcher.expect(statsLease+time.Second, "leave", lost.id)
		w.sleep(10 * time.Millisecond)
		late = time.Since(renewed) - statsLease
		assert.InDelta(t, late.Seconds(), r.s.Stats().ReapLagLost.Sum().Seconds(), 0.05)
	})
}

func TestStatsOfQueues(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(func(o *Options) { o.WriteTimeout = time.Hour })
		slow, slower, fine := s.raw(), s.raw(), s.dial()
		send := func(conn string, size int) {
			c, ok := s.Connection(conn)
			require.True(t, ok)
			require.NoError(t, c.Send("say", strings.Repeat("x", size)))
		}
		send(slow.id, 1000)
		for range 2 {
			send(slower.id, 2000)
		}
		send(fine.id, 5000)
		w.sleep(time.Second)
		st := s.Stats()
		sizes := make(map[string]int)
		for _, id := range []string{slow.id, slower.id} {
			c, _ := s.Connection(id)
			sizes[id] = c.sock.QueueBytes()
		}
		assert.Greater(t, sizes[slow.id], 1000)
		assert.Greater(t, sizes[slower.id], 4000)
		assert.EqualValues(t, sizes[slow.id]+sizes[slower.id], st.QueuedBytes)
		assert.EqualValues(t, sizes[slower.id], st.LongestQueue)
		slow.next()
		slower.next()
		slower.next()
		w.sleep(time.Second)
		st = s.Stats()
		assert.Zero(t, st.QueuedBytes)
		assert.Zero(t, st.LongestQueue)
		assert.Zero(t, st.Dropped)

		send(slow.id, 1000)
		send(slow.id, 1000)
		require.NoError(t, slow.ws.Close())
		w.sleep(5 * time.Second)
		st = s.Stats()
		assert.Zero(t, st.QueuedBytes, "of one that is gone")
		assert.EqualValues(t, 1, st.Closed["broken"])
		assert.Positive(t, st.Dropped)
	})
}

func TestStatsOfASlowSubscription(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		o := &queueOutlet{room: "lobby", more: make(chan struct{}, 1), slow: &s.n.slow}
		for range eventsHeld + 5 {
			o.put(Event{}, nil)
		}
		_, err := o.take()
		require.ErrorIs(t, err, ErrSlowConsumer)
		assert.EqualValues(t, 1, s.Stats().SlowSubscriptions)
	})
}

// TestStatsKeysAreFixed: every key is there from the start, and is fit to be a
// label; a bare manager has the same.
func TestStatsKeysAreFixed(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		srv, err := NewServer(w.options())
		require.NoError(t, err)
		p, err := NewPresenceManager(w.options())
		require.NoError(t, err)
		fresh := counts(srv.Stats())
		for name, n := range fresh {
			assert.Zero(t, n, name)
			assert.Regexp(t, `^[A-Za-z]+(\.[a-z_]+)?$`, name)
		}
		assert.Equal(t, fresh, counts(p.Stats()))
		assert.EqualValues(t, -1, srv.Stats().LeaseAge)
		assert.Empty(t, srv.Stats().Incarnation)

		s := w.tracked()
		a := s.dial()
		a.join("lobby")
		a.subscribe("lobby")
		a.close()
		w.sleep(5 * time.Second)
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
	h, err := NewHistogram(bounds, raw, 5*time.Second)
	require.NoError(t, err)
	bounds[0], raw[0] = 0, 0 // copies
	assert.EqualValues(t, 6, h.Count())
	assert.Equal(t, 5*time.Second, h.Sum())
	got := make(map[time.Duration]uint64)
	for le, n := range h.Buckets() {
		got[le] = n
	}
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

	var none Histogram
	assert.Zero(t, none.Count())
	assert.Zero(t, none.Quantile(0.5))
	text, err = json.Marshal(none)
	require.NoError(t, err)
	assert.JSONEq(t, `{"count":0,"sum":0,"buckets":[]}`, string(text))
	for range none.Buckets() {
		t.Error("a bucket")
	}
	_, err = NewHistogram(bounds, raw[1:], 0)
	require.ErrorIs(t, err, ErrInvalidOptions)
	_, err = NewHistogram([]time.Duration{2, 2}, raw, 0)
	require.ErrorIs(t, err, ErrInvalidOptions)
}
