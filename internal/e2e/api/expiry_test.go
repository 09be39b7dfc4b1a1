package api

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/meshtest"
)

func TestSilenceEndsAnEntryOnce(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const ttl = time.Second
		s1, s2 := w.Server(), w.Server()
		for _, s := range []*harness.Server{s1, s2} {
			s.Track("^short", mesh.PresenceOptions{TTL: ttl})
			s.Track(".*", mesh.PresenceOptions{})
		}
		watchers, others := harness.Subscribers("short", s1, s2), harness.Subscribers("for ever", s1, s2)
		a, talker := s1.Dial(), s1.Dial()
		for _, p := range []*harness.Peer{a, talker} {
			p.Join("short")
			p.Join("for ever")
		}
		before, after := a.FallSilent()
		for _, p := range watchers {
			p.Expect(ttl+time.Second, "leave", a.ID)
		}
		require.GreaterOrEqual(t, time.Since(before), ttl)
		require.LessOrEqual(t, time.Since(after), w.Unhurried(ttl+time.Second))
		require.ElementsMatch(t, []string{talker.ID}, s2.Present("short"))
		require.ElementsMatch(t, []string{talker.ID, a.ID}, s2.Present("for ever"))

		w.Sleep(1500 * time.Millisecond) // long enough for Redis's expired event
		a.Call("mesh/noop", nil)         // any frame is a sign of life, and causes a return
		for i, p := range watchers {
			w.Eventually(2*time.Second, func() bool { return p.Count("join", a.ID) == 2 }, "no return: %v", p.Got())
			require.Equal(t, 1, p.Count("leave", ""))
			require.Equal(t, 0, others[i].Count("leave", ""))
			require.Equal(t, 1, others[i].Count("join", a.ID))
		}
		require.ElementsMatch(t, []string{talker.ID, a.ID}, s2.Present("short"))
	})
}

func TestAConnectionThatLeftDoesNotReturn(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s1, s2 := w.Server(), w.Server()
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{TTL: time.Second})
		}
		watchers := harness.Subscribers("lobby", s1, s2)
		a, b := s1.Dial(), s1.Dial()
		for _, p := range []*harness.Peer{a, b} {
			p.Join("lobby")
			p.Mute()
		}
		for _, p := range watchers {
			p.Expect(3*time.Second, "leave", a.ID)
			p.Expect(3*time.Second, "leave", b.ID)
		}
		was, err := s2.Rooms().Remove(ctx, "lobby", a.ID) // removed while it is silent
		require.NoError(t, err)
		require.True(t, was)
		a.Call("mesh/noop", nil)
		b.Leave("lobby") // the next frame is a leave
		w.Sleep(300 * time.Millisecond)
		require.Empty(t, s1.Present("lobby"))
		for _, p := range watchers {
			for _, other := range []*harness.Peer{a, b} {
				require.Equal(t, 1, p.Count("join", other.ID), "%v", p.Got())
				require.Equal(t, 1, p.Count("leave", other.ID), "%v", p.Got())
			}
		}
		b.Join("lobby")
		require.Equal(t, []string{b.ID}, s1.Present("lobby"))
	})
}

// If the TTL is shorter than the ping interval, extra pings keep connections that
// answer them present. Their keys in Redis must never run out.
func TestAnsweringPingsKeepsAnEntryAlive(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2, raw := w.Server(), w.Server(), w.Client()
		ttls := map[string]time.Duration{"one": time.Second, "two": 2 * time.Second}
		members := make(map[string]*harness.Peer)
		var watchers []*harness.Peer
		for room, ttl := range ttls {
			for _, s := range []*harness.Server{s1, s2} {
				require.NoError(t, s.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{TTL: ttl}))
			}
			watchers = append(watchers, harness.Subscribers(room, s1, s2)...)
			members[room] = s1.Dial()
			members[room].Join(room)
		}
		rounds := 40
		if w.Virtual {
			rounds = 1200 // a minute, which is longer than the ping interval
		}
		lowest := map[string]time.Duration{"one": time.Hour, "two": time.Hour}
		for range rounds {
			w.Sleep(50 * time.Millisecond)
			for room, ttl := range ttls {
				life := harness.KeyLife(t, raw, w.ConnKey(room, members[room].ID))
				require.NotZero(t, life, "the key of %q has run out", room)
				require.LessOrEqual(t, life, ttl+time.Second)
				lowest[room] = min(lowest[room], life)
			}
		}
		for room, ttl := range ttls {
			if w.Virtual { // otherwise it depends on when the key is read
				require.Less(t, lowest[room], ttl+time.Second-100*time.Millisecond, "the TTL of the key never decreased")
			}
			require.Equal(t, []string{members[room].ID}, s2.Present(room))
		}
		for _, p := range watchers {
			require.Equal(t, 0, p.Count("leave", ""))
		}
	})
}

// A connection is not silent if it had no reason to show life: before another server
// adds it to a room with a TTL, or before its room gets a TTL.
func TestNoSilenceBeforeARoomHasATTL(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s1, s2 := w.Server(), w.Server()
		for _, s := range []*harness.Server{s1, s2} {
			require.NoError(t, s.TrackPresence(mesh.Exact("short"), mesh.PresenceOptions{TTL: 2 * time.Second}))
			require.NoError(t, s.TrackPresence(mesh.Exact("plain"), mesh.PresenceOptions{}))
		}
		short, plain := harness.Subscribers("short", s1, s2), harness.Subscribers("plain", s1, s2)
		a, b := s1.Dial(), s1.Dial()
		b.Join("plain")
		w.Sleep(25 * time.Second)
		require.NoError(t, s2.Rooms().Add(ctx, "short", a.ID, mesh.AddOptions{}))
		require.NoError(t, s1.TrackPresence(mesh.Exact("plain"), mesh.PresenceOptions{TTL: 2 * time.Second}))
		require.NoError(t, s2.TrackPresence(mesh.Exact("plain"), mesh.PresenceOptions{TTL: 2 * time.Second}))
		w.Sleep(10 * time.Second)
		for i := range short {
			require.Equal(t, 1, short[i].Count("join", a.ID))
			require.Equal(t, 0, short[i].Count("leave", ""), "%v", short[i].Got())
			require.Equal(t, 0, plain[i].Count("leave", ""), "%v", plain[i].Got())
		}
		// From then on, silence counts.
		a.Mute()
		b.Mute()
		for i := range short {
			short[i].Expect(3*time.Second, "leave", a.ID)
			plain[i].Expect(3*time.Second, "leave", b.ID)
		}
	})
}

// If a rule changes while a connection is silent, its return gets the TTL of the new
// rule.
func TestAReturnHasTheTTLOfTheNewRule(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, raw := w.Server(), w.Client()
		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{TTL: 2 * time.Second}))
		watcher, a := s.Dial(), s.Dial()
		watcher.Subscribe("lobby")
		a.Join("lobby")
		a.Mute()
		watcher.Expect(3*time.Second, "leave", a.ID)
		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{TTL: time.Minute}))
		a.Call("mesh/noop", nil)
		w.Eventually(time.Second, func() bool { return watcher.Count("join", a.ID) == 2 }, "the connection returns")
		w.Sleep(time.Second)
		require.Greater(t, harness.KeyLife(t, raw, w.ConnKey("lobby", a.ID)), 50*time.Second)
		w.Sleep(9 * time.Second)
		require.Equal(t, 1, watcher.Count("leave", ""))
	})
}

func TestExpirationOff(t *testing.T) {
	t.Parallel()
	// The test counts all subscriptions of the cluster to expired events.
	harness.EverywhereOn(t, func(t *testing.T) *harness.World { return harness.OwnCluster(t) }, func(t *testing.T, w *harness.World) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		raw := w.Client()
		const ttl = time.Second
		var log harness.CommandLog
		s1, s2 := w.Server(harness.ExpirationOff, log.Logging, harness.LeaseOf(time.Second)), w.Server(harness.ExpirationOff, log.Logging, harness.LeaseOf(time.Second))
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{TTL: ttl})
		}
		watchers := harness.Subscribers("lobby", s1, s2)
		a, b, talker, leaver := s1.Dial(), s2.Dial(), s1.Dial(), s2.Dial()
		for _, p := range []*harness.Peer{a, b, talker, leaver} {
			p.Join("lobby")
		}
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 300}))
		a.Mute()
		b.Mute()
		leaver.Close()
		for _, p := range watchers { // all but TTLs works as usual
			p.ExpectStates(2*time.Second, a.ID, `{"n":1}`, "null")
			p.Expect(2*time.Second, "leave", leaver.ID)
		}
		wait := 2500 * time.Millisecond
		if w.Virtual {
			wait = 25 * time.Second
		}
		w.Sleep(wait)
		for _, p := range watchers {
			require.Equal(t, 1, p.Count("leave", ""), "an entry ended by itself")
		}
		require.ElementsMatch(t, []string{a.ID, b.ID, talker.ID}, s1.Present("lobby"))
		require.False(t, harness.KeyExists(t, raw, w.ConnKey("lobby", a.ID)))
		require.True(t, harness.KeyExists(t, raw, w.ConnKey("lobby", talker.ID)))

		n, err := s1.Presence().CleanExpired(ctx, "lobby") // entries of both servers
		require.NoError(t, err)
		require.Equal(t, 2, n)
		for _, s := range []*harness.Server{s1, s2} {
			n, err := s.Presence().CleanExpired(ctx, "lobby")
			require.NoError(t, err)
			require.Zero(t, n)
		}
		for _, p := range watchers {
			for _, other := range []*harness.Peer{a, b} {
				p.Expect(2*time.Second, "leave", other.ID)
			}
		}
		require.Equal(t, []string{talker.ID}, s2.Present("lobby"))
		a.Call("mesh/noop", nil)
		b.Call("mesh/noop", nil)
		for _, p := range watchers {
			for _, other := range []*harness.Peer{a, b} {
				w.Eventually(2*time.Second, func() bool { return p.Count("join", other.ID) == 2 }, "%s returns: %v", other.ID, p.Got())
				require.Equal(t, 1, p.Count("leave", other.ID))
			}
		}
		require.Zero(t, log.Sent("config"))
		require.NotZero(t, log.Sent("evalsha"))
		channels, err := raw.PubSubChannels(ctx, "__key*").Result()
		require.NoError(t, err)
		require.Empty(t, channels)
	})
}

// A connection whose entry another server has cleaned up returns at its next frame,
// however long the TTL is.
func TestReturnAfterCleanExpiredByAnotherServer(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		const ttl = time.Minute
		s1, s2 := w.Server(harness.ExpirationOff), w.Server(harness.ExpirationOff)
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{TTL: ttl})
		}
		watchers := harness.Subscribers("lobby", s1, s2)
		for i := range 7 { // at different moments between two refreshes of the owner
			a := s2.Dial()
			a.Join("lobby")
			w.Sleep(time.Duration(i) * 3 * time.Second)
			a.FallSilent()
			w.Sleep(ttl + 1100*time.Millisecond) // the key has run out
			n, err := s1.Presence().CleanExpired(t.Context(), "lobby")
			require.NoError(t, err)
			require.Equal(t, 1, n)
			a.Call("mesh/noop", nil)
			for _, p := range watchers {
				w.Eventually(time.Second, func() bool { return p.Count("join", a.ID) == 2 }, "round %d: no return", i)
			}
			a.Close()
			for _, p := range watchers {
				w.Eventually(time.Second, func() bool { return p.Count("leave", a.ID) == 2 }, "round %d: no leave", i)
			}
		}
	})
}

// With expiration on, the same servers subscribe to expired events. TestExpirationOff
// relies on that.
func TestExpirationOnAsksForEvents(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		var log harness.CommandLog
		s := w.Server(log.Logging)
		require.NotZero(t, log.Sent("config"))
		require.True(t, s.Stats().ExpiredEventsWorking)
		channels, err := w.Client().PubSubChannels(t.Context(), "__key*").Result()
		require.NoError(t, err)
		require.NotEmpty(t, channels)
	})
}

// Silence ends entries even if CONFIG is forbidden or no expired event arrives.
func TestSilenceNeedsNoExpiredEvents(t *testing.T) {
	t.Parallel()
	for name, opt := range map[string]meshtest.Option{
		"forbidden": meshtest.WithConfigForbidden(), "lost": meshtest.WithoutExpiredEvents(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s1, s2 := w.Server(), w.Server()
				for _, s := range []*harness.Server{s1, s2} {
					s.Track(".*", mesh.PresenceOptions{TTL: 2 * time.Second})
					require.False(t, s.Stats().ExpiredEventsWorking)
				}
				watchers := harness.Subscribers("lobby", s1, s2)
				a := s1.Dial()
				a.Join("lobby")
				a.State("lobby", map[string]any{"n": 1}, map[string]any{"expireAfter": 500})
				a.FallSilent()
				for _, p := range watchers {
					p.Expect(3*time.Second, "leave", a.ID)
				}
				w.Sleep(time.Minute)
				for _, p := range watchers {
					require.Equal(t, 1, p.Count("leave", ""))
					p.ExpectStates(0, a.ID, `{"n":1}`, "null")
				}
			}, opt)
		})
	}
}

func TestADeadServersEntriesLeaveWithItsLease(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		lease := time.Second
		if w.Virtual {
			lease = 10 * time.Second
		}
		s1, s2 := w.Tracked(harness.LeaseOf(lease)), w.Tracked(harness.LeaseOf(lease))
		victim, line := w.Mortal(harness.LeaseOf(lease))
		victim.Track(".*", mesh.PresenceOptions{})
		watchers := harness.Subscribers("lobby", s1, s2)
		own := victim.Dial()
		own.Subscribe("lobby")
		stays := s1.Dial()
		stays.Join("lobby")
		var lost []*harness.Peer
		for range 5 {
			p := victim.Dial()
			p.Join("lobby")
			p.State("lobby", map[string]any{"n": 1})
			lost = append(lost, p)
		}
		w.Sleep(lease + lease/2) // the other servers are in contact
		line.Cut()
		for _, p := range lost {
			p.Close()
		}
		cut := time.Now()
		for _, p := range watchers {
			for _, other := range lost {
				p.Expect(lease+time.Second-time.Since(cut), "leave", other.ID)
			}
		}
		require.Greater(t, time.Since(cut), lease/2, "the server was declared dead before its lease ran out")
		require.Equal(t, []string{stays.ID}, s2.Present("lobby"))
		line.Mend() // the server notices that it was declared dead
		w.Sleep(lease)
		for _, p := range watchers {
			for _, other := range lost {
				require.Equal(t, 1, p.Count("join", other.ID))
				require.Equal(t, 1, p.Count("leave", other.ID))
				p.ExpectStates(0, other.ID, `{"n":1}`)
			}
			require.Equal(t, 0, p.Count("leave", stays.ID))
		}
		require.Equal(t, []string{stays.ID}, s2.Present("lobby"), "an entry came back")
		w.Eventually(5*time.Second, func() bool { return own.Count("leave", "") == len(lost) }, "the subscription on the server is repaired: %v", own.Got())
		require.Equal(t, 0, own.Count("leave", stays.ID))
	})
}

// Keys that run out before a dead owner's lease are noticed by their expired events.
func TestExpiredEventsAreFasterThanALongLease(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		lease := 30 * time.Second
		s1, s2, s3 := w.Server(harness.LeaseOf(lease)), w.Server(harness.LeaseOf(lease)), w.Server(harness.LeaseOf(lease))
		victim, line := w.Mortal(harness.LeaseOf(lease))
		for _, s := range []*harness.Server{s1, s2, s3, victim} {
			s.Track("^short", mesh.PresenceOptions{TTL: 3 * time.Second})
			s.Track(".*", mesh.PresenceOptions{})
		}
		short, plain := harness.Subscribers("short", s1, s2, s3), harness.Subscribers("plain", s1, s2, s3)
		a := victim.Dial()
		a.Join("short")
		a.Join("plain")
		w.Sleep(lease + time.Second)
		require.Equal(t, "true", a.State("plain", map[string]any{"n": 1}, map[string]any{"expireAfter": 2000}))
		line.Cut()
		cut := time.Now()
		key := testhook.PartsOf(victim.Server).Keys.Conn("short", a.ID)
		gone := cut.Add(w.Client().PTTL(t.Context(), key).Val()).UnixMilli()
		for _, p := range plain { // a room without a TTL, and a state with one
			p.ExpectStates(2500*time.Millisecond, a.ID, `{"n":1}`, "null")
		}
		for _, p := range short { // the key lives for TTL + 1 s, and the owner's turn is half a second
			u := p.Expect(4850*time.Millisecond-time.Since(cut), "leave", a.ID)
			require.GreaterOrEqual(t, u.Timestamp, gone+500, "before the owner's turn is over")
		}
		require.Greater(t, time.Since(cut), time.Second)
		for _, p := range plain {
			require.Equal(t, 0, p.Count("leave", ""), "without a TTL the entry ends with the lease")
		}
		for _, p := range plain {
			p.Expect(lease+time.Second-time.Since(cut), "leave", a.ID)
		}
		w.Sleep(lease)
		for i := range short {
			require.Equal(t, 1, short[i].Count("leave", ""))
			require.Equal(t, 1, plain[i].Count("leave", ""))
			plain[i].ExpectStates(0, a.ID, `{"n":1}`, "null")
		}
	})
}

// With expiration off, an expired entry of a dead owner stays until CleanExpired or
// until the lease runs out. Its leave is reported once.
func TestCleanExpiredEndsADeadServersEntries(t *testing.T) {
	t.Parallel()
	for _, clean := range []bool{true, false} {
		name := map[bool]string{true: "CleanExpired", false: "lease"}[clean]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				lease := 20 * time.Second
				s1, s2 := w.Server(harness.ExpirationOff, harness.LeaseOf(lease)), w.Server(harness.ExpirationOff, harness.LeaseOf(lease))
				victim, line := w.Mortal(harness.ExpirationOff, harness.LeaseOf(lease))
				for _, s := range []*harness.Server{s1, s2, victim} {
					s.Track(".*", mesh.PresenceOptions{TTL: 2 * time.Second})
				}
				watchers := harness.Subscribers("lobby", s1, s2)
				a := victim.Dial()
				a.Join("lobby")
				w.Sleep(lease + time.Second)
				line.Cut()
				w.Sleep(8 * time.Second)
				for _, p := range watchers {
					require.Equal(t, 0, p.Count("leave", ""))
				}
				if clean {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					counts := make([]int, 2)
					var wg sync.WaitGroup
					for i, s := range []*harness.Server{s1, s2} { // at the same time: only one of them ends the entry
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
						p.Expect(100*time.Millisecond, "leave", a.ID)
					}
				}
				w.Sleep(lease)
				for _, p := range watchers {
					require.Equal(t, 1, p.Count("leave", a.ID))
				}
			})
		})
	}
}

// An outage of all servers that is longer than any lease ends no entry.
func TestAnOutageLongerThanTheLeaseEndsNoEntry(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct{ begin, end func(*meshtest.Redis) }{
		"cut":  {(*meshtest.Redis).Cut, (*meshtest.Redis).Heal},
		"hang": {(*meshtest.Redis).Hang, (*meshtest.Redis).Resume},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				servers := []*harness.Server{w.Server(), w.Server(), w.Server()}
				for _, s := range servers {
					s.Track("^short", mesh.PresenceOptions{TTL: 3 * time.Second})
					s.Track(".*", mesh.PresenceOptions{})
				}
				watchers := slices.Concat(harness.Subscribers("short", servers...), harness.Subscribers("plain", servers...))
				var ids []string
				for range 2 {
					for _, s := range servers {
						p := s.Dial()
						p.Join("short")
						p.Join("plain")
						ids = append(ids, p.ID)
					}
				}
				w.Sleep(15 * time.Second)
				fault.begin(w.Mem)
				w.Sleep(35 * time.Second)
				fault.end(w.Mem)
				w.Sleep(30 * time.Second)
				for _, p := range watchers {
					require.Equal(t, 0, p.Count("leave", ""), "%v", p.Got())
					require.Equal(t, len(ids), p.Count("join", ""), "%v", p.Got())
				}
				for _, s := range servers {
					require.ElementsMatch(t, ids, s.Present("short"))
					require.ElementsMatch(t, ids, s.Present("plain"))
				}
				w.Sleep(10 * time.Second)
				p := servers[0].Dial()
				p.Join("plain")
				for _, watcher := range watchers[3:] {
					watcher.Expect(time.Second, "join", p.ID)
				}
			})
		})
	}
}

func TestFlushAllIsRepairedWithinAHeartbeat(t *testing.T) {
	t.Parallel()
	// The test deletes all keys of the cluster.
	harness.EverywhereOn(t, func(t *testing.T) *harness.World { return harness.OwnCluster(t) }, func(t *testing.T, w *harness.World) {
		lease := 1500 * time.Millisecond
		if w.Virtual {
			lease = 10 * time.Second
		}
		servers := []*harness.Server{w.Server(harness.LeaseOf(lease)), w.Server(harness.LeaseOf(lease)), w.Server(harness.LeaseOf(lease))}
		for _, s := range servers {
			s.Track("^short", mesh.PresenceOptions{TTL: 2 * time.Second})
			s.Track(".*", mesh.PresenceOptions{})
		}
		rooms := []string{"plain", "short"}
		watchers := slices.Concat(harness.Subscribers("plain", servers...), harness.Subscribers("short", servers...))
		var ids []string
		for _, s := range servers {
			for range 3 {
				p := s.Dial()
				for _, room := range rooms {
					p.Join(room)
					require.Equal(t, "true", p.State(room, map[string]any{"of": p.ID}))
				}
				ids = append(ids, p.ID)
			}
		}
		for _, p := range watchers {
			w.Eventually(2*time.Second, func() bool { return p.Count("state", "") == len(ids) }, "all states arrive")
		}
		w.EachNode(func(c redis.UniversalClient) { require.NoError(t, c.FlushAll(t.Context()).Err()) })
		for _, room := range rooms {
			w.Eventually(lease/3+time.Second, func() bool { return len(servers[0].Present(room)) == len(ids) }, "the members of %q", room)
			members, err := servers[1].Presence().Members(t.Context(), room)
			require.NoError(t, err)
			for _, m := range members {
				require.JSONEq(t, `{"of":"`+m.ID+`"}`, string(m.State))
			}
		}
		w.Sleep(lease + 2*time.Second) // unconfirmed members would have left by now
		for _, p := range watchers {
			require.Equal(t, 0, p.Count("leave", ""), "%v", p.Got())
			require.Equal(t, len(ids), p.Count("join", ""), "%v", p.Got())
			require.Equal(t, len(ids), p.Count("state", ""), "%v", p.Got())
		}
		for _, room := range rooms {
			for _, s := range servers {
				require.ElementsMatch(t, ids, s.Present(room))
				require.ElementsMatch(t, ids, s.Dial().Subscribe(room).IDs(t))
			}
		}
	})
}

// Every server receives expired events, but only one of them looks at Redis for each.
// So the cost does not grow with the number of servers.
func TestHintsCostTheSameWithMoreServers(t *testing.T) {
	t.Parallel()
	const entries = 20
	looks := map[int]int{}
	for _, servers := range []int{2, 6} {
		t.Run(fmt.Sprintf("servers=%d", servers), func(t *testing.T) {
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				var log harness.CommandLog
				long := func(o *mesh.Options) { o.LeaseTTL = time.Minute }
				var living []*harness.Server
				for range servers {
					s := w.Server(long, log.Logging)
					s.Track(".*", mesh.PresenceOptions{TTL: 2 * time.Second})
					living = append(living, s)
				}
				s, line := w.Mortal(long)
				s.Track(".*", mesh.PresenceOptions{TTL: 2 * time.Second})
				w.Sleep(2 * time.Minute) // all servers are in contact
				for i := range entries {
					s.Dial().Join(fmt.Sprintf("room %d", i%5))
				}
				watcher := living[0].Dial()
				watcher.Subscribe("room 0")
				line.Cut()
				before := log.Sent("hget")
				w.Sleep(10 * time.Second)

				require.Len(t, watcher.Got(), entries/5, "leaves: %v", watcher.Got())
				var acted uint64
				for _, l := range living {
					acted += l.Stats().ExpiredEventsUsed
				}
				require.EqualValues(t, entries, acted)
				looks[servers] = log.Sent("hget") - before
				require.NotZero(t, looks[servers])
			})
		})
	}
	require.LessOrEqual(t, looks[6], 2*looks[2], "it would be three times as many if each server looked")
}
