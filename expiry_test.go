package mesh

import (
	"context"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// lifeline is the network of one server's Redis client. Cut, the server is to
// all others as one that was killed: it says nothing more.
type lifeline struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error)

	mu    sync.Mutex // guards the fields below
	down  bool
	conns []net.Conn
}

// mortal starts a server whose line to Redis can be cut. It is mended before
// the server is shut down.
func (w *world) mortal(setup ...func(*Options)) (*testServer, *lifeline) {
	w.t.Helper()
	l := &lifeline{dial: (&net.Dialer{}).DialContext}
	c := w.clientOver(l)
	s := w.server(append([]func(*Options){func(o *Options) { o.Redis = c }}, setup...)...)
	w.t.Cleanup(l.mend)
	return s, l
}

// clientOver returns a client whose connections are made by a lifeline.
func (w *world) clientOver(l *lifeline) redis.UniversalClient {
	w.t.Helper()
	if w.cluster != nil {
		return w.cluster.Client(w.t, func(o *redis.ClusterOptions) { o.Dialer = l.connect })
	}
	opts := &redis.Options{}
	if w.virtual {
		opts = w.mem.Options()
		l.dial = opts.Dialer
	} else {
		opts.Addr = w.real.Addr()
	}
	opts.Dialer = l.connect
	c := redis.NewClient(opts)
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (l *lifeline) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		return nil, net.ErrClosed
	}
	c, err := l.dial(ctx, network, addr)
	if err == nil {
		l.conns = append(l.conns, c)
	}
	return c, err
}

func (l *lifeline) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = true
	for _, c := range l.conns {
		_ = c.Close()
	}
	l.conns = nil
}

func (l *lifeline) mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = false
}

func expirationOff(o *Options) { off := false; o.EnablePresenceExpirationEvents = &off }

// present returns the ids of who is in a room, as Redis holds them.
func (s *testServer) present(room string) []string {
	s.w.t.Helper()
	ids, err := s.Presence().PresentConnections(s.w.t.Context(), room)
	require.NoError(s.w.t, err)
	return ids
}

// fallSilent makes a peer send one frame and then nothing more. It returns a
// moment right before that frame, and one right after.
func (p *peer) fallSilent() (before, after time.Time) {
	p.t.Helper()
	p.mute()
	p.w.sleep(20 * time.Millisecond) // a pong under way
	before = time.Now()
	p.call("mesh/noop", nil)
	return before, time.Now()
}

func TestSilenceEndsAnEntryOnce(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const ttl = time.Second
		s1, s2 := w.server(), w.server()
		for _, s := range []*testServer{s1, s2} {
			s.track("^short", PresenceOptions{TTL: ttl})
			s.track(".*", PresenceOptions{})
		}
		watchers, others := subscribers("short", s1, s2), subscribers("for ever", s1, s2)
		a, talker := s1.dial(), s1.dial()
		for _, p := range []*peer{a, talker} {
			p.join("short")
			p.join("for ever")
		}
		before, after := a.fallSilent()
		for _, p := range watchers {
			p.expect(ttl+time.Second, "leave", a.id)
		}
		require.GreaterOrEqual(t, time.Since(before), ttl)
		require.LessOrEqual(t, time.Since(after), ttl+time.Second)
		require.ElementsMatch(t, []string{talker.id}, s2.present("short"))
		require.ElementsMatch(t, []string{talker.id, a.id}, s2.present("for ever"))

		w.sleep(1500 * time.Millisecond) // Redis's expired event has come by now too
		a.call("mesh/noop", nil)         // any frame is a sign of life, and joins it again
		for i, p := range watchers {
			w.eventually(2*time.Second, func() bool { return p.count("join", a.id) == 2 }, "it has not joined again: %v", p.got())
			require.Equal(t, 1, p.count("leave", ""))
			require.Equal(t, 0, others[i].count("leave", ""))
			require.Equal(t, 1, others[i].count("join", a.id))
		}
		require.ElementsMatch(t, []string{talker.id, a.id}, s2.present("short"))
	})
}

func TestWhoAskedToLeaveDoesNotComeBack(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s1, s2 := w.server(), w.server()
		for _, s := range []*testServer{s1, s2} {
			s.track(".*", PresenceOptions{TTL: time.Second})
		}
		watchers := subscribers("lobby", s1, s2)
		a, b := s1.dial(), s1.dial()
		for _, p := range []*peer{a, b} {
			p.join("lobby")
			p.mute()
		}
		for _, p := range watchers {
			p.expect(3*time.Second, "leave", a.id)
			p.expect(3*time.Second, "leave", b.id)
		}
		was, err := s2.Rooms().Remove(ctx, "lobby", a.id) // taken out while it is away
		require.NoError(t, err)
		require.True(t, was)
		a.call("mesh/noop", nil)
		b.leave("lobby") // its next frame is the wish to leave
		w.sleep(300 * time.Millisecond)
		require.Empty(t, s1.present("lobby"))
		for _, p := range watchers {
			for _, who := range []*peer{a, b} {
				require.Equal(t, 1, p.count("join", who.id), "%v", p.got())
				require.Equal(t, 1, p.count("leave", who.id), "%v", p.got())
			}
		}
		b.join("lobby")
		require.Equal(t, []string{b.id}, s1.present("lobby"))
	})
}

// Where the TTL is shorter than the ping interval, extra pings keep who
// answers them present, and the key in Redis is never let go.
func TestAnsweringPingsKeepsAnEntryAlive(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2, raw := w.server(), w.server(), w.client()
		ttls := map[string]time.Duration{"one": time.Second, "two": 2 * time.Second}
		members := make(map[string]*peer)
		var watchers []*peer
		for room, ttl := range ttls {
			for _, s := range []*testServer{s1, s2} {
				require.NoError(t, s.TrackPresence(Exact(room), PresenceOptions{TTL: ttl}))
			}
			watchers = append(watchers, subscribers(room, s1, s2)...)
			members[room] = s1.dial()
			members[room].join(room)
		}
		rounds := 40
		if w.virtual {
			rounds = 1200 // a minute: past the regular pings
		}
		lowest := map[string]time.Duration{"one": time.Hour, "two": time.Hour}
		for range rounds {
			w.sleep(50 * time.Millisecond)
			for room, ttl := range ttls {
				life := keyLife(t, raw, w.connKey(room, members[room].id))
				require.NotZero(t, life, "the key of %q has run out", room)
				require.LessOrEqual(t, life, ttl+time.Second)
				lowest[room] = min(lowest[room], life)
			}
		}
		for room, ttl := range ttls {
			require.Less(t, lowest[room], ttl+time.Second-100*time.Millisecond, "its life was never seen to go down")
			require.Equal(t, []string{members[room].id}, s2.present(room))
		}
		for _, p := range watchers {
			require.Equal(t, 0, p.count("leave", ""))
		}
	})
}

// A connection that had no reason to give a sign of life has not been silent:
// neither when somebody else brings it into a room with a TTL, nor when the
// room it is in gets one.
func TestWhoWasQuietBeforeIsNotSilent(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s1, s2 := w.server(), w.server()
		for _, s := range []*testServer{s1, s2} {
			require.NoError(t, s.TrackPresence(Exact("short"), PresenceOptions{TTL: 2 * time.Second}))
			require.NoError(t, s.TrackPresence(Exact("plain"), PresenceOptions{}))
		}
		short, plain := subscribers("short", s1, s2), subscribers("plain", s1, s2)
		a, b := s1.dial(), s1.dial()
		b.join("plain")
		w.sleep(25 * time.Second)
		require.NoError(t, s2.Rooms().Add(ctx, "short", a.id))
		require.NoError(t, s1.TrackPresence(Exact("plain"), PresenceOptions{TTL: 2 * time.Second}))
		require.NoError(t, s2.TrackPresence(Exact("plain"), PresenceOptions{TTL: 2 * time.Second}))
		w.sleep(10 * time.Second)
		for i := range short {
			require.Equal(t, 1, short[i].count("join", a.id))
			require.Equal(t, 0, short[i].count("leave", ""), "%v", short[i].got())
			require.Equal(t, 0, plain[i].count("leave", ""), "%v", plain[i].got())
		}
		// And from then on silence counts.
		a.mute()
		b.mute()
		for i := range short {
			short[i].expect(3*time.Second, "leave", a.id)
			plain[i].expect(3*time.Second, "leave", b.id)
		}
	})
}

// A rule changed while a connection is away by silence holds when it comes back.
func TestTheTTLOfWhoComesBackIsThatOfTheRuleThen(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s, raw := w.server(), w.client()
		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{TTL: 2 * time.Second}))
		watcher, a := s.dial(), s.dial()
		watcher.subscribe("lobby")
		a.join("lobby")
		a.mute()
		watcher.expect(3*time.Second, "leave", a.id)
		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{TTL: time.Minute}))
		a.call("mesh/noop", nil)
		w.eventually(time.Second, func() bool { return watcher.count("join", a.id) == 2 }, "it is back")
		w.sleep(time.Second)
		require.Greater(t, keyLife(t, raw, w.connKey("lobby", a.id)), 50*time.Second)
		w.sleep(9 * time.Second)
		require.Equal(t, 1, watcher.count("leave", ""))
	})
}

func TestExpirationOff(t *testing.T) {
	t.Parallel()
	// It counts subscriptions to what is everybody's.
	everywhereOn(t, func(t *testing.T) *world { return ownCluster(t) }, func(t *testing.T, w *world) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		raw := w.client()
		const ttl = time.Second
		var log commandLog
		s1, s2 := w.server(expirationOff, log.logging, leaseOf(time.Second)), w.server(expirationOff, log.logging, leaseOf(time.Second))
		for _, s := range []*testServer{s1, s2} {
			s.track(".*", PresenceOptions{TTL: ttl})
		}
		watchers := subscribers("lobby", s1, s2)
		a, b, talker, leaver := s1.dial(), s2.dial(), s1.dial(), s2.dial()
		for _, p := range []*peer{a, b, talker, leaver} {
			p.join("lobby")
		}
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 300}))
		a.mute()
		b.mute()
		leaver.close()
		for _, p := range watchers { // all but TTLs is as ever
			p.expectStates(2*time.Second, a.id, `{"n":1}`, "null")
			p.expect(2*time.Second, "leave", leaver.id)
		}
		wait := 2500 * time.Millisecond
		if w.virtual {
			wait = 25 * time.Second
		}
		w.sleep(wait)
		for _, p := range watchers {
			require.Equal(t, 1, p.count("leave", ""), "nothing ends by itself")
		}
		require.ElementsMatch(t, []string{a.id, b.id, talker.id}, s1.present("lobby"))
		require.False(t, keyExists(t, raw, w.connKey("lobby", a.id)))
		require.True(t, keyExists(t, raw, w.connKey("lobby", talker.id)))

		n, err := s1.Presence().CleanExpired(ctx, "lobby") // its own, and the other server's
		require.NoError(t, err)
		require.Equal(t, 2, n)
		for _, s := range []*testServer{s1, s2} {
			n, err := s.Presence().CleanExpired(ctx, "lobby")
			require.NoError(t, err)
			require.Zero(t, n)
		}
		for _, p := range watchers {
			for _, who := range []*peer{a, b} {
				p.expect(2*time.Second, "leave", who.id)
			}
		}
		require.Equal(t, []string{talker.id}, s2.present("lobby"))
		a.call("mesh/noop", nil)
		b.call("mesh/noop", nil)
		for _, p := range watchers {
			for _, who := range []*peer{a, b} {
				w.eventually(2*time.Second, func() bool { return p.count("join", who.id) == 2 }, "%s is back: %v", who.id, p.got())
				require.Equal(t, 1, p.count("leave", who.id))
			}
		}
		require.Zero(t, log.sent("config"))
		require.NotZero(t, log.sent("evalsha"))
		channels, err := raw.PubSubChannels(ctx, "__key*").Result()
		require.NoError(t, err)
		require.Empty(t, channels)
	})
}

// Whose entry another server has cleaned up joins again at its next frame,
// however long the TTL.
func TestWhoWasCleanedUpComesBackWithTheNextFrame(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		const ttl = time.Minute
		s1, s2 := w.server(expirationOff), w.server(expirationOff)
		for _, s := range []*testServer{s1, s2} {
			s.track(".*", PresenceOptions{TTL: ttl})
		}
		watchers := subscribers("lobby", s1, s2)
		for i := range 7 { // at different times of the owner's refreshing
			a := s2.dial()
			a.join("lobby")
			w.sleep(time.Duration(i) * 3 * time.Second)
			a.fallSilent()
			w.sleep(ttl + 1100*time.Millisecond) // its key has run out
			n, err := s1.Presence().CleanExpired(t.Context(), "lobby")
			require.NoError(t, err)
			require.Equal(t, 1, n)
			a.call("mesh/noop", nil)
			for _, p := range watchers {
				w.eventually(time.Second, func() bool { return p.count("join", a.id) == 2 }, "round %d: it is not back", i)
			}
			a.close()
			for _, p := range watchers {
				w.eventually(time.Second, func() bool { return p.count("leave", a.id) == 2 }, "round %d: it has not left", i)
			}
		}
	})
}

// With expiration on, the same servers do ask for expired events: what the
// test above relies on to see that they do not.
func TestExpirationOnAsksForEvents(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		var log commandLog
		s := w.server(log.logging)
		require.NotZero(t, log.sent("config"))
		require.True(t, s.Stats().ExpiredEvents)
		channels, err := w.client().PubSubChannels(t.Context(), "__key*").Result()
		require.NoError(t, err)
		require.NotEmpty(t, channels)
	})
}

// Where CONFIG is forbidden, and where no expired event ever comes, silence
// ends entries all the same.
func TestSilenceNeedsNoExpiredEvents(t *testing.T) {
	t.Parallel()
	for name, opt := range map[string]meshtest.Option{
		"forbidden": meshtest.WithConfigForbidden(), "lost": meshtest.WithoutExpiredEvents(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				s1, s2 := w.server(), w.server()
				for _, s := range []*testServer{s1, s2} {
					s.track(".*", PresenceOptions{TTL: 2 * time.Second})
					require.False(t, s.Stats().ExpiredEvents)
				}
				watchers := subscribers("lobby", s1, s2)
				a := s1.dial()
				a.join("lobby")
				a.state("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 500})
				a.fallSilent()
				for _, p := range watchers {
					p.expect(3*time.Second, "leave", a.id)
				}
				w.sleep(time.Minute)
				for _, p := range watchers {
					require.Equal(t, 1, p.count("leave", ""))
					p.expectStates(0, a.id, `{"n":1}`, "null")
				}
			}, opt)
		})
	}
}

func TestADeadServersEntriesLeaveWithItsLease(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		lease := time.Second
		if w.virtual {
			lease = 10 * time.Second
		}
		s1, s2 := w.tracked(leaseOf(lease)), w.tracked(leaseOf(lease))
		doomed, line := w.mortal(leaseOf(lease))
		doomed.track(".*", PresenceOptions{})
		watchers := subscribers("lobby", s1, s2)
		own := doomed.dial()
		own.subscribe("lobby")
		stays := s1.dial()
		stays.join("lobby")
		var lost []*peer
		for range 5 {
			p := doomed.dial()
			p.join("lobby")
			p.state("lobby", map[string]any{"n": 1})
			lost = append(lost, p)
		}
		w.sleep(lease + lease/2) // the survivors have been in touch for long enough to judge
		line.cut()
		for _, p := range lost {
			p.close()
		}
		cut := time.Now()
		for _, p := range watchers {
			for _, who := range lost {
				p.expect(lease+time.Second-time.Since(cut), "leave", who.id)
			}
		}
		require.Greater(t, time.Since(cut), lease/2, "it might have been a pause")
		require.Equal(t, []string{stays.id}, s2.present("lobby"))
		line.mend() // it wakes up and finds itself dead
		w.sleep(lease)
		for _, p := range watchers {
			for _, who := range lost {
				require.Equal(t, 1, p.count("join", who.id))
				require.Equal(t, 1, p.count("leave", who.id))
				p.expectStates(0, who.id, `{"n":1}`)
			}
			require.Equal(t, 0, p.count("leave", stays.id))
		}
		require.Equal(t, []string{stays.id}, s2.present("lobby"), "nothing comes back")
		w.eventually(5*time.Second, func() bool { return own.count("leave", "") == len(lost) }, "its own watcher is repaired: %v", own.got())
		require.Equal(t, 0, own.count("leave", stays.id))
	})
}

// What runs out before a dead owner's lease does is told by way of Redis's
// expired events.
func TestExpiredEventsAreFasterThanALongLease(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		lease := 30 * time.Second
		s1, s2, s3 := w.server(leaseOf(lease)), w.server(leaseOf(lease)), w.server(leaseOf(lease))
		doomed, line := w.mortal(leaseOf(lease))
		for _, s := range []*testServer{s1, s2, s3, doomed} {
			s.track("^short", PresenceOptions{TTL: 3 * time.Second})
			s.track(".*", PresenceOptions{})
		}
		short, plain := subscribers("short", s1, s2, s3), subscribers("plain", s1, s2, s3)
		a := doomed.dial()
		a.join("short")
		a.join("plain")
		w.sleep(lease + time.Second)
		require.Equal(t, "true", a.state("plain", map[string]any{"n": 1}, map[string]any{"expireAfter": 2000}))
		line.cut()
		cut := time.Now()
		key := doomed.n.keys.Conn("short", a.id)
		gone := cut.Add(w.client().PTTL(t.Context(), key).Val()).UnixMilli()
		for _, p := range plain { // no TTL, and a state with one
			p.expectStates(2500*time.Millisecond, a.id, `{"n":1}`, "null")
		}
		for _, p := range short { // the key lives for TTL + 1 s, and its owner has half a second to show that it lives
			u := p.expect(4850*time.Millisecond-time.Since(cut), "leave", a.id)
			require.GreaterOrEqual(t, u.Timestamp, gone+500, "an owner would have come first")
		}
		require.Greater(t, time.Since(cut), time.Second)
		for _, p := range plain {
			require.Equal(t, 0, p.count("leave", ""), "it takes its lease to tell that the server is dead")
		}
		for _, p := range plain {
			p.expect(lease+time.Second-time.Since(cut), "leave", a.id)
		}
		w.sleep(lease)
		for i := range short {
			require.Equal(t, 1, short[i].count("leave", ""))
			require.Equal(t, 1, plain[i].count("leave", ""))
			plain[i].expectStates(0, a.id, `{"n":1}`, "null")
		}
	})
}

// With expiration off an expired entry of a dead owner stays until somebody
// cleans up, or the lease runs out; its leave is told once.
func TestCleanExpiredEndsADeadServersEntries(t *testing.T) {
	t.Parallel()
	for _, clean := range []bool{true, false} {
		name := map[bool]string{true: "by hand", false: "by lease"}[clean]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				lease := 20 * time.Second
				s1, s2 := w.server(expirationOff, leaseOf(lease)), w.server(expirationOff, leaseOf(lease))
				doomed, line := w.mortal(expirationOff, leaseOf(lease))
				for _, s := range []*testServer{s1, s2, doomed} {
					s.track(".*", PresenceOptions{TTL: 2 * time.Second})
				}
				watchers := subscribers("lobby", s1, s2)
				a := doomed.dial()
				a.join("lobby")
				w.sleep(lease + time.Second)
				line.cut()
				w.sleep(8 * time.Second)
				for _, p := range watchers {
					require.Equal(t, 0, p.count("leave", ""))
				}
				if clean {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					counts := make([]int, 2)
					var wg sync.WaitGroup
					for i, s := range []*testServer{s1, s2} { // both at once: one ends it
						wg.Go(func() {
							var err error
							if counts[i], err = s.Presence().CleanExpired(ctx, "lobby"); err != nil {
								t.Error(err)
							}
						})
					}
					wg.Wait()
					slices.Sort(counts)
					require.Equal(t, []int{0, 1}, counts)
					for _, p := range watchers {
						p.expect(100*time.Millisecond, "leave", a.id)
					}
				}
				w.sleep(lease)
				for _, p := range watchers {
					require.Equal(t, 1, p.count("leave", a.id))
				}
			})
		})
	}
}

// An outage that hits everybody, longer than any lease, ends nobody's presence.
func TestAnOutageLongerThanTheLeaseEndsNobody(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct{ begin, end func(*meshtest.Redis) }{
		"cut":  {(*meshtest.Redis).Cut, (*meshtest.Redis).Heal},
		"hang": {(*meshtest.Redis).Hang, (*meshtest.Redis).Resume},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				servers := []*testServer{w.server(), w.server(), w.server()}
				for _, s := range servers {
					s.track("^short", PresenceOptions{TTL: 3 * time.Second})
					s.track(".*", PresenceOptions{})
				}
				watchers := slices.Concat(subscribers("short", servers...), subscribers("plain", servers...))
				var ids []string
				for range 2 {
					for _, s := range servers {
						p := s.dial()
						p.join("short")
						p.join("plain")
						ids = append(ids, p.id)
					}
				}
				w.sleep(15 * time.Second)
				fault.begin(w.mem)
				w.sleep(35 * time.Second)
				fault.end(w.mem)
				w.sleep(30 * time.Second)
				for _, p := range watchers {
					require.Equal(t, 0, p.count("leave", ""), "%v", p.got())
					require.Equal(t, len(ids), p.count("join", ""), "%v", p.got())
				}
				for _, s := range servers {
					require.ElementsMatch(t, ids, s.present("short"))
					require.ElementsMatch(t, ids, s.present("plain"))
				}
				w.sleep(10 * time.Second)
				p := servers[0].dial()
				p.join("plain")
				for _, watcher := range watchers[3:] {
					watcher.expect(time.Second, "join", p.id)
				}
			})
		})
	}
}

func TestFlushAllIsHealedWithinAHeartbeat(t *testing.T) {
	t.Parallel()
	// It deletes what is everybody's.
	everywhereOn(t, func(t *testing.T) *world { return ownCluster(t) }, func(t *testing.T, w *world) {
		lease := 1500 * time.Millisecond
		if w.virtual {
			lease = 10 * time.Second
		}
		servers := []*testServer{w.server(leaseOf(lease)), w.server(leaseOf(lease)), w.server(leaseOf(lease))}
		for _, s := range servers {
			s.track("^short", PresenceOptions{TTL: 2 * time.Second})
			s.track(".*", PresenceOptions{})
		}
		rooms := []string{"plain", "short"}
		watchers := slices.Concat(subscribers("plain", servers...), subscribers("short", servers...))
		var ids []string
		for _, s := range servers {
			for range 3 {
				p := s.dial()
				for _, room := range rooms {
					p.join(room)
					require.Equal(t, "true", p.state(room, map[string]any{"of": p.id}))
				}
				ids = append(ids, p.id)
			}
		}
		for _, p := range watchers {
			w.eventually(2*time.Second, func() bool { return p.count("state", "") == len(ids) }, "all are there")
		}
		w.eachNode(func(c redis.UniversalClient) { require.NoError(t, c.FlushAll(t.Context()).Err()) })
		for _, room := range rooms {
			w.eventually(lease/3+time.Second, func() bool { return len(servers[0].present(room)) == len(ids) }, "the roster of %q", room)
			members, err := servers[1].Presence().Members(t.Context(), room)
			require.NoError(t, err)
			for _, m := range members {
				require.JSONEq(t, `{"of":"`+m.ID+`"}`, string(m.State))
			}
		}
		w.sleep(lease + 2*time.Second) // whoever was in doubt would have left by now
		for _, p := range watchers {
			require.Equal(t, 0, p.count("leave", ""), "%v", p.got())
			require.Equal(t, len(ids), p.count("join", ""), "%v", p.got())
			require.Equal(t, len(ids), p.count("state", ""), "%v", p.got())
		}
		for _, room := range rooms {
			for _, s := range servers {
				require.ElementsMatch(t, ids, s.present(room))
				require.ElementsMatch(t, ids, s.dial().subscribe(room).ids(t))
			}
		}
	})
}
