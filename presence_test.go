package mesh_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

func TestJoinAndLeaveAreDeliveredOnce(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		watcher, a := s1.Dial(), s2.Dial()
		require.Empty(t, watcher.Subscribe("lobby").IDs(t))
		require.Equal(t, []string{a.ID}, a.Join("lobby").IDs(t))
		watcher.Expect(2*time.Second, "join", a.ID)
		a.Close()
		watcher.Expect(2*time.Second, "leave", a.ID)
		w.Sleep(200 * time.Millisecond)
		require.Equal(t, 1, watcher.Count("join", ""))
		require.Equal(t, 1, watcher.Count("leave", ""))
	})
}

func TestLeavingOneRoomKeepsTheOther(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		one, two := harness.Subscribers("one", s1, s2), harness.Subscribers("two", s1, s2)
		a := s1.Dial()
		a.Join("one")
		a.Join("two")
		a.Leave("one")
		a.Leave("one") // causes no second update
		for i := range one {
			one[i].Expect(2*time.Second, "leave", a.ID)
			two[i].Expect(2*time.Second, "join", a.ID)
		}
		w.Sleep(200 * time.Millisecond)
		for i := range one {
			require.Equal(t, 1, one[i].Count("leave", ""))
			require.Equal(t, 0, two[i].Count("leave", ""))
		}
		a.Close()
		for i := range one {
			two[i].Expect(2*time.Second, "leave", a.ID)
			require.Equal(t, 1, one[i].Count("leave", ""))
		}
	})
}

func TestAMemberSeesItsOwnUpdates(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		a := w.Tracked().Dial()
		a.Subscribe("lobby")
		require.Equal(t, []string{a.ID}, a.Join("lobby").IDs(t))
		a.Expect(2*time.Second, "join", a.ID)
		require.Equal(t, "true", a.State("lobby", map[string]any{"typing": true}))
		require.JSONEq(t, `{"typing":true}`, string(a.Expect(2*time.Second, "state", a.ID).State))
		a.Leave("lobby")
		a.Expect(2*time.Second, "leave", a.ID)
		require.Len(t, a.Got(), 3)
	})
}

func TestPresenceIsPerConnectionNotPerUser(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) {
			o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
				return map[string]string{"userId": r.Header.Get("X-User")}, nil
			}
		})
		alice := http.Header{"X-User": {"alice"}}
		watcher, tab1, tab2 := s.Dial(), s.Dial(alice), s.Dial(alice)
		watcher.Subscribe("lobby")
		tab1.Join("lobby")
		require.ElementsMatch(t, []string{tab1.ID, tab2.ID}, tab2.Join("lobby").IDs(t))
		for _, tab := range []*harness.Peer{tab1, tab2} {
			u := watcher.Expect(2*time.Second, "join", tab.ID)
			require.JSONEq(t, `{"userId":"alice"}`, string(u.Metadata))
		}
		tab1.State("lobby", map[string]any{"tab": 1})
		tab2.State("lobby", map[string]any{"tab": 2})
		watcher.Expect(2*time.Second, "state", tab2.ID)
		tab1.Close()
		watcher.Expect(2*time.Second, "leave", tab1.ID)
		v := watcher.Subscribe("lobby")
		require.Equal(t, []string{tab2.ID}, v.IDs(t), "the other tab is still present")
		require.JSONEq(t, `{"tab":2}`, string(v.States[tab2.ID]))
		require.Equal(t, 0, watcher.Count("leave", tab2.ID))
	})
}

func TestTTLsOfRules(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s, raw := w.Server(), w.Client()
		for _, r := range []struct {
			pattern mesh.Pattern
			ttl     time.Duration
		}{
			{mesh.Regexp(regexp.MustCompile("^a")), 20 * time.Second},
			{mesh.Regexp(regexp.MustCompile("^ab")), 30 * time.Second},
			{mesh.Exact("a"), 10 * time.Second},
			{mesh.Exact("abc"), 0},
			{mesh.Exact("twice"), 50 * time.Second},
			{mesh.Exact("twice"), 60 * time.Second},
			{mesh.Regexp(regexp.MustCompile("^more")), 50 * time.Second},
			{mesh.Regexp(regexp.MustCompile("more")), 70 * time.Second},
			{mesh.Regexp(regexp.MustCompile("^more")), 60 * time.Second},
		} {
			require.NoError(t, s.TrackPresence(r.pattern, mesh.PresenceOptions{TTL: r.ttl}))
		}
		for room, ttl := range map[string]time.Duration{
			"a":     10 * time.Second, // the exact name has precedence
			"ab":    20 * time.Second, // the first expression has precedence
			"abc":   0,                // the exact name has precedence, also without a TTL
			"twice": 60 * time.Second, // the same name replaces the rule
			"more":  60 * time.Second, // the same expression replaces the rule in its place
		} {
			a := s.Dial()
			a.Subscribe(room)
			a.Join(room)
			life := harness.KeyLife(t, raw, w.ConnKey(room, a.ID))
			if ttl == 0 {
				require.Zero(t, life, room)
				continue
			}
			require.Greater(t, life, ttl/2, room) // the key was set to TTL + 1 s
			require.LessOrEqual(t, life, ttl+time.Second, room)
		}
		a := s.Dial()
		require.Equal(t, []string{a.ID}, a.Join("b").IDs(t), "a room without a rule has members, but no events")
		require.False(t, a.Room("mesh/subscribe-presence", "b").Success)
		require.Zero(t, harness.KeyLife(t, raw, w.ConnKey("b", a.ID)))
	})
}

func TestAnInvalidRuleChangesNothing(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		a := s.Dial()
		for name, r := range map[string]struct {
			pattern mesh.Pattern
			opts    mesh.PresenceOptions
			want    error
		}{
			"zero pattern":  {mesh.Pattern{}, mesh.PresenceOptions{}, mesh.ErrInvalidPattern},
			"empty name":    {mesh.Exact(""), mesh.PresenceOptions{}, mesh.ErrInvalidPattern},
			"control":       {mesh.Exact("a\nb"), mesh.PresenceOptions{}, mesh.ErrInvalidPattern},
			"nil regexp":    {mesh.Regexp(nil), mesh.PresenceOptions{}, mesh.ErrInvalidPattern},
			"short TTL":     {mesh.Exact("lobby"), mesh.PresenceOptions{TTL: 999 * time.Millisecond}, mesh.ErrInvalidOptions},
			"negative TTL":  {mesh.Exact("lobby"), mesh.PresenceOptions{TTL: -time.Second}, mesh.ErrInvalidOptions},
			"long TTL":      {mesh.Exact("lobby"), mesh.PresenceOptions{TTL: 366 * 24 * time.Hour}, mesh.ErrInvalidOptions},
			"bad on regexp": {mesh.Regexp(regexp.MustCompile("lobby")), mesh.PresenceOptions{TTL: time.Millisecond}, mesh.ErrInvalidOptions},
		} {
			require.ErrorIs(t, s.TrackPresence(r.pattern, r.opts), r.want, name)
			require.False(t, a.Room("mesh/subscribe-presence", "lobby").Success, name)
		}
	})
}

func TestARuleAddedWhileRunningTakesEffectAtOnce(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s, raw := w.Server(), w.Client()
		a, watcher := s.Dial(), s.Dial()
		a.Join("lobby")
		require.False(t, watcher.Room("mesh/subscribe-presence", "lobby").Success)
		require.Equal(t, "false", a.State("lobby", map[string]any{"n": 1}))

		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{TTL: 20 * time.Second}))
		require.Equal(t, []string{a.ID}, watcher.Subscribe("lobby").IDs(t), "earlier members are present")
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 1}))
		watcher.Expect(2*time.Second, "state", a.ID)
		w.Eventually(2*time.Second, func() bool { return harness.KeyLife(t, raw, w.ConnKey("lobby", a.ID)) > 19*time.Second }, "the first TTL")

		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{TTL: 100 * time.Second}))
		w.Eventually(2*time.Second, func() bool { return harness.KeyLife(t, raw, w.ConnKey("lobby", a.ID)) > 99*time.Second }, "a longer TTL")

		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		w.Eventually(2*time.Second, func() bool { return !harness.KeyExists(t, raw, w.ConnKey("lobby", a.ID)) }, "the TTL has ended")

		// A rule with a guard ends only the subscriptions that the guard refuses.
		onlyA := func(_ context.Context, m mesh.Member, _ string) (bool, error) { return m.ID == a.ID, nil }
		a.Subscribe("lobby")
		require.NoError(t, s.TrackPresence(mesh.Regexp(regexp.MustCompile("^lob")), mesh.PresenceOptions{Guard: onlyA}))
		w.Eventually(2*time.Second, func() bool { return watcher.Pushed("mesh/presence-ended") == 1 }, "the watcher is refused")
		b := s.Dial()
		b.Join("lobby")
		a.Expect(2*time.Second, "join", b.ID)
		require.Equal(t, 0, watcher.Count("join", b.ID))
		require.Equal(t, 0, a.Pushed("mesh/presence-ended"))
		require.Equal(t, 0, a.Count("leave", ""), "a rule ends no entry")
	})
}

// TestRapidChangesOfARule changes a rule again while the entries are still being written
// with the previous one. The last change must take effect.
func TestRapidChangesOfARule(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s, raw := w.Server(), w.Client()
		a := s.Dial()
		a.Join("lobby")
		track := func(ttl time.Duration) {
			require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{TTL: ttl}))
		}
		for range 50 {
			track(100 * time.Second)
			w.Eventually(2*time.Second, func() bool { return harness.KeyExists(t, raw, w.ConnKey("lobby", a.ID)) }, "the key of the entry")
			track(0)
			w.Eventually(2*time.Second, func() bool { return !harness.KeyExists(t, raw, w.ConnKey("lobby", a.ID)) }, "the key is deleted, so that it cannot end the entry")
		}
	})
}

func TestManagerReturnsMembers(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s1, s2 := w.Server(), w.Server()
		require.NoError(t, s1.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		require.NoError(t, s2.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		a, b, c := s1.Dial(), s1.Dial(), s2.Dial()
		for _, room := range []string{"lobby", "untracked"} {
			for _, p := range []*harness.Peer{a, b, c} {
				p.Join(room)
			}
		}
		require.NoError(t, s1.Connections().SetMetadata(ctx, b.ID, map[string]string{"name": "B"}, mesh.MetadataOptions{}))
		require.Equal(t, "true", c.State("lobby", map[string]any{"typing": true}))
		for _, s := range []*harness.Server{s1, s2} {
			for _, room := range []string{"lobby", "untracked"} {
				ids, err := s.Presence().PresentConnections(ctx, room)
				require.NoError(t, err)
				require.ElementsMatch(t, []string{a.ID, b.ID, c.ID}, ids)
				n, err := s.Presence().Count(ctx, room)
				require.NoError(t, err)
				require.Equal(t, 3, n)
			}
			w.Eventually(2*time.Second, func() bool {
				members, err := s.Presence().Members(ctx, "lobby")
				require.NoError(t, err)
				byID := make(map[string]mesh.Member)
				for _, m := range members {
					byID[m.ID] = m
				}
				return byID[a.ID].Metadata == nil && byID[a.ID].State == nil &&
					string(byID[b.ID].Metadata) == `{"name":"B"}` && string(byID[c.ID].State) == `{"typing":true}`
			}, "members with metadata and states")
		}
		n, err := s1.Presence().Count(ctx, "empty")
		require.NoError(t, err)
		require.Zero(t, n)
		_, err = s1.Presence().Members(ctx, "")
		require.ErrorIs(t, err, mesh.ErrInvalidRoom)
		_, err = s1.Presence().Count(ctx, "a\x00")
		require.ErrorIs(t, err, mesh.ErrInvalidRoom)
	})
}

func TestSubscribingToAWatchedRoomSendsNoCommands(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		members := make([]*harness.Peer, 5)
		for i := range members {
			members[i] = s.Dial()
			members[i].Join("lobby")
		}
		s.Dial().Subscribe("lobby")
		late := make([]*harness.Peer, 20)
		for i := range late {
			late[i] = s.Dial()
		}
		w.Sleep(100 * time.Millisecond)
		before := w.Mem.Mini().CommandCount()
		for _, p := range late { // no virtual time passes, so the server does nothing else
			require.Len(t, p.Subscribe("lobby").IDs(t), len(members))
			require.True(t, p.Room("mesh/get-presence-state", "lobby").Success)
			require.Equal(t, "true", string(p.Call("mesh/unsubscribe-presence", map[string]any{"roomName": "lobby"})))
		}
		require.Equal(t, before, w.Mem.Mini().CommandCount())
	})
}

func TestAnIdleServerSendsFewCommands(t *testing.T) {
	t.Parallel()
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		harness.Embedded(t, func(t *testing.T, w *harness.World) {
			var log harness.CommandLog
			w.Tracked(log.Logging)
			w.Sleep(30 * time.Second)
			before, all := log.Sent(""), w.Mem.Mini().CommandCount()
			w.Sleep(time.Minute)
			require.NotZero(t, log.Sent("")-before, "the lease must be renewed")
			require.LessOrEqual(t, log.Sent("")-before, 120)
			require.LessOrEqual(t, w.Mem.Mini().CommandCount()-all, 120, "commands inside scripts count too")
		})
	})
	t.Run("redis", func(t *testing.T) {
		t.Parallel()
		w := &harness.World{T: t, Real: redistest.Start(t)}
		raw := w.Client()
		w.Tracked()
		w.Sleep(time.Second)
		before, began := commandCalls(t, raw), time.Now()
		w.Sleep(5 * time.Second)
		after := commandCalls(t, raw)
		allowed := 2*time.Since(began).Seconds() + 6 // for renewals at both ends
		sum := 0
		for name, n := range after {
			if name != "info" {
				sum += n - before[name]
			}
		}
		require.NotZero(t, sum)
		require.LessOrEqual(t, float64(sum), allowed, "%v then %v", before, after)
	})
}

// commandCalls returns how often each command was executed, also inside scripts.
func commandCalls(t *testing.T, c redis.UniversalClient) map[string]int {
	t.Helper()
	info, err := c.Info(t.Context(), "commandstats").Result()
	require.NoError(t, err)
	calls := make(map[string]int)
	for line := range strings.Lines(info) {
		var n int
		name, rest, ok := strings.Cut(strings.TrimPrefix(line, "cmdstat_"), ":calls=")
		if _, err := fmt.Sscanf(rest, "%d", &n); ok && err == nil {
			calls[name] = n
		}
	}
	return calls
}

func TestOnlyKeysWithATTLRemain(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx, raw := t.Context(), w.Client()
		s1, s2 := w.Server(), w.Server()
		for _, s := range []*harness.Server{s1, s2} {
			s.Track("^ttl", mesh.PresenceOptions{TTL: 5 * time.Second})
			s.Track(".*", mesh.PresenceOptions{})
		}
		rooms := []string{"ttl", "plain", "a:b", "{x}", "conn:y"}
		for i, s := range []*harness.Server{s1, s2, s1, s2} {
			p := s.Dial()
			require.NoError(t, s.Connections().SetMetadata(ctx, p.ID, map[string]int{"n": i}, mesh.MetadataOptions{}))
			for _, room := range rooms {
				p.Subscribe(room)
				p.Join(room)
				require.Equal(t, "true", p.State(room, map[string]any{"n": i}, map[string]any{"expireAfter": 60_000 * (i % 2)}))
			}
			switch i {
			case 0:
				p.Close()
			case 1:
				for _, room := range rooms {
					p.Leave(room)
				}
			} // the others stay until Shutdown
		}
		s1.End()
		s2.End()
		keys, format := w.InStore(), w.Keys().Format()
		require.Contains(t, keys, format)
		for _, key := range keys {
			if key != format {
				require.NotZero(t, harness.KeyLife(t, raw, key), "%q has no TTL", key)
			}
		}
	})
}

// churn makes random changes with a peer in a room. It dials again after a close, and
// returns the last peer.
func churn(s *harness.Server, p *harness.Peer, room string, rng *rand.Rand, steps int) *harness.Peer {
	for i := range steps {
		switch action := rng.IntN(20); {
		case action < 6:
			p.Join(room)
		case action < 10:
			p.Leave(room)
		case action < 15:
			p.State(room, map[string]any{"i": i})
		case action < 17:
			p.State(room, map[string]any{"i": i}, map[string]any{"expireAfter": 20 + rng.IntN(100)})
		case action < 19:
			p.Call("mesh/clear-presence-state", map[string]any{"roomName": room})
		default:
			p.Close()
			p = s.Dial()
		}
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
	}
	return p
}

func TestEverySubscriberConverges(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const room, seed = "lobby", 20240817
		servers := []*harness.Server{w.Tracked(), w.Tracked(), w.Tracked()}
		steady := harness.Subscribers(room, servers...)
		changing := []*harness.Peer{servers[0].Dial(), servers[1].Dial(), servers[2].Dial()}
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				s := servers[i%len(servers)]
				churn(s, s.Dial(), room, rand.New(rand.NewPCG(seed, uint64(i))), 60)
			})
		}
		for i, p := range changing { // these subscribe and unsubscribe during the changes
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(100+i)))
				for range 10 {
					p.Subscribe(room)
					time.Sleep(time.Duration(rng.IntN(80)) * time.Millisecond)
					p.Call("mesh/unsubscribe-presence", map[string]any{"roomName": room})
				}
				p.Subscribe(room)
			})
		}
		wg.Wait()
		w.Sleep(500 * time.Millisecond) // until the last states have expired and the last events have arrived
		members := func() map[string]string {
			list, err := servers[0].Presence().Members(t.Context(), room)
			require.NoError(t, err)
			states := make(map[string]string)
			for _, m := range list {
				states[m.ID] = string(m.State)
			}
			require.NotEmpty(t, states)
			return states
		}
		for _, p := range slices.Concat(steady, changing) {
			var a harness.Audience
			w.Eventually(5*time.Second, func() bool {
				var err error
				a, err = p.Follow(room)
				require.NoError(t, err)
				return maps.Equal(members(), a.Members)
			}, "%s has the members in Redis", p.ID)
			if w.Virtual { // in real time an event may be so late that the server takes it for lost
				require.Zero(t, a.Repairs, "no event was lost")
			}
		}
		require.Greater(t, len(steady[0].Got()), 200)
	})
}
