package mesh

import (
	"context"
	"encoding/json"
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

	"github.com/meshpresence/mesh/internal/redistest"
)

func mustCompile(expr string) *regexp.Regexp { return regexp.MustCompile(expr) }

// keyLife returns how long a key has to live; 0: it is not there or lives on.
func keyLife(t *testing.T, c redis.UniversalClient, key string) time.Duration {
	t.Helper()
	d, err := c.PTTL(t.Context(), key).Result()
	require.NoError(t, err)
	return max(d, 0)
}

// keyExists reports whether a key is there.
func keyExists(t *testing.T, c redis.UniversalClient, key string) bool {
	t.Helper()
	n, err := c.Exists(t.Context(), key).Result()
	require.NoError(t, err)
	return n == 1
}

// subscribers connects one subscriber of a room to each server.
func subscribers(room string, servers ...*testServer) []*peer {
	list := make([]*peer, len(servers))
	for i, s := range servers {
		s.w.t.Helper()
		list[i] = s.dial()
		list[i].subscribe(room)
	}
	return list
}

// commandLog is a hook that notes which commands a client sends.
type commandLog struct {
	mu    sync.Mutex // guards names
	names []string
}

func (l *commandLog) DialHook(next redis.DialHook) redis.DialHook { return next }

func (l *commandLog) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		l.note(cmd)
		return next(ctx, cmd)
	}
}

func (l *commandLog) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		l.note(cmds...)
		return next(ctx, cmds)
	}
}

func (l *commandLog) note(cmds ...redis.Cmder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range cmds {
		l.names = append(l.names, strings.ToLower(c.Name()))
	}
}

// sent returns how many commands of that name were sent ("": of any).
func (l *commandLog) sent(name string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, s := range l.names {
		if name == "" || s == name {
			n++
		}
	}
	return n
}

// counts returns how many commands of each name were sent.
func (l *commandLog) counts() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	counts := make(map[string]int)
	for _, s := range l.names {
		counts[s]++
	}
	return counts
}

// logging has a server's commands noted.
func (l *commandLog) logging(o *Options) {
	if c, ok := o.Redis.(*redis.ClusterClient); ok {
		c.OnNewNode(func(node *redis.Client) { node.AddHook(l) })
		return
	}
	o.Redis.AddHook(l)
}

func TestJoinAndLeaveAreToldOnce(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		watcher, a := s1.dial(), s2.dial()
		require.Empty(t, watcher.subscribe("lobby").ids(t))
		require.Equal(t, []string{a.id}, a.join("lobby").ids(t))
		watcher.expect(2*time.Second, "join", a.id)
		a.close()
		watcher.expect(2*time.Second, "leave", a.id)
		w.sleep(200 * time.Millisecond)
		require.Equal(t, 1, watcher.count("join", ""))
		require.Equal(t, 1, watcher.count("leave", ""))
	})
}

func TestLeavingOneRoomLeavesTheOther(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		one, two := subscribers("one", s1, s2), subscribers("two", s1, s2)
		a := s1.dial()
		a.join("one")
		a.join("two")
		a.leave("one")
		a.leave("one") // it is not in any more: nobody is told
		for i := range one {
			one[i].expect(2*time.Second, "leave", a.id)
			two[i].expect(2*time.Second, "join", a.id)
		}
		w.sleep(200 * time.Millisecond)
		for i := range one {
			require.Equal(t, 1, one[i].count("leave", ""))
			require.Equal(t, 0, two[i].count("leave", ""))
		}
		a.close()
		for i := range one {
			two[i].expect(2*time.Second, "leave", a.id)
			require.Equal(t, 1, one[i].count("leave", ""))
		}
	})
}

func TestOneIsToldAboutOneself(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		a := w.tracked().dial()
		a.subscribe("lobby")
		require.Equal(t, []string{a.id}, a.join("lobby").ids(t))
		a.expect(2*time.Second, "join", a.id)
		require.Equal(t, "true", a.state("lobby", map[string]any{"typing": true}))
		require.JSONEq(t, `{"typing":true}`, string(a.expect(2*time.Second, "state", a.id).State))
		a.leave("lobby")
		a.expect(2*time.Second, "leave", a.id)
		require.Len(t, a.got(), 3)
	})
}

func TestPresenceIsPerConnectionNotPerUser(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked(func(o *Options) {
			o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
				return map[string]string{"userId": r.Header.Get("X-User")}, nil
			}
		})
		alice := http.Header{"X-User": {"alice"}}
		watcher, tab1, tab2 := s.dial(), s.dial(alice), s.dial(alice)
		watcher.subscribe("lobby")
		tab1.join("lobby")
		require.ElementsMatch(t, []string{tab1.id, tab2.id}, tab2.join("lobby").ids(t))
		for _, tab := range []*peer{tab1, tab2} {
			u := watcher.expect(2*time.Second, "join", tab.id)
			require.JSONEq(t, `{"userId":"alice"}`, string(u.Metadata))
		}
		tab1.state("lobby", map[string]any{"tab": 1})
		tab2.state("lobby", map[string]any{"tab": 2})
		watcher.expect(2*time.Second, "state", tab2.id)
		tab1.close()
		watcher.expect(2*time.Second, "leave", tab1.id)
		v := watcher.subscribe("lobby")
		require.Equal(t, []string{tab2.id}, v.ids(t), "the other tab is still there")
		require.JSONEq(t, `{"tab":2}`, string(v.States[tab2.id]))
		require.Equal(t, 0, watcher.count("leave", tab2.id))
	})
}

func TestTheTTLOfARoomIsThatOfItsRule(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s, raw := w.server(), w.client()
		for _, r := range []struct {
			pattern Pattern
			ttl     time.Duration
		}{
			{Regexp(mustCompile("^a")), 20 * time.Second},
			{Regexp(mustCompile("^ab")), 30 * time.Second},
			{Exact("a"), 10 * time.Second},
			{Exact("abc"), 0},
			{Exact("twice"), 50 * time.Second},
			{Exact("twice"), 60 * time.Second},
			{Regexp(mustCompile("^more")), 50 * time.Second},
			{Regexp(mustCompile("more")), 70 * time.Second},
			{Regexp(mustCompile("^more")), 60 * time.Second},
		} {
			require.NoError(t, s.TrackPresence(r.pattern, PresenceOptions{TTL: r.ttl}))
		}
		for room, ttl := range map[string]time.Duration{
			"a":     10 * time.Second, // its own name wins
			"ab":    20 * time.Second, // the first expression wins
			"abc":   0,                // its own name wins, with no TTL too
			"twice": 60 * time.Second, // the same name again replaces
			"more":  60 * time.Second, // so does the same expression, in its old place
		} {
			a := s.dial()
			a.subscribe(room)
			a.join(room)
			life := keyLife(t, raw, w.connKey(room, a.id))
			if ttl == 0 {
				require.Zero(t, life, room)
				continue
			}
			require.Greater(t, life, ttl-time.Second, room)
			require.LessOrEqual(t, life, ttl+time.Second, room)
		}
		a := s.dial()
		require.Equal(t, []string{a.id}, a.join("b").ids(t), "no rule: members, and no events")
		require.False(t, a.room("mesh/subscribe-presence", "b").Success)
		require.Zero(t, keyLife(t, raw, w.connKey("b", a.id)))
	})
}

func TestABadRuleChangesNothing(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server()
		a := s.dial()
		for name, r := range map[string]struct {
			pattern Pattern
			opts    PresenceOptions
			want    error
		}{
			"zero pattern":  {Pattern{}, PresenceOptions{}, ErrInvalidPattern},
			"empty name":    {Exact(""), PresenceOptions{}, ErrInvalidPattern},
			"control":       {Exact("a\nb"), PresenceOptions{}, ErrInvalidPattern},
			"nil regexp":    {Regexp(nil), PresenceOptions{}, ErrInvalidPattern},
			"short TTL":     {Exact("lobby"), PresenceOptions{TTL: 999 * time.Millisecond}, ErrInvalidOptions},
			"negative TTL":  {Exact("lobby"), PresenceOptions{TTL: -time.Second}, ErrInvalidOptions},
			"long TTL":      {Exact("lobby"), PresenceOptions{TTL: 366 * 24 * time.Hour}, ErrInvalidOptions},
			"bad on regexp": {Regexp(mustCompile("lobby")), PresenceOptions{TTL: time.Millisecond}, ErrInvalidOptions},
		} {
			require.ErrorIs(t, s.TrackPresence(r.pattern, r.opts), r.want, name)
			require.False(t, a.room("mesh/subscribe-presence", "lobby").Success, name)
		}
	})
}

func TestARuleAddedWhileRunningTakesHoldAtOnce(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s, raw := w.server(), w.client()
		a, watcher := s.dial(), s.dial()
		a.join("lobby")
		require.False(t, watcher.room("mesh/subscribe-presence", "lobby").Success)
		require.Equal(t, "false", a.state("lobby", map[string]any{"n": 1}))

		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{TTL: 20 * time.Second}))
		require.Equal(t, []string{a.id}, watcher.subscribe("lobby").ids(t), "who was in already is present")
		require.Equal(t, "true", a.state("lobby", map[string]any{"n": 1}))
		watcher.expect(2*time.Second, "state", a.id)
		w.eventually(2*time.Second, func() bool { return keyLife(t, raw, w.connKey("lobby", a.id)) > 19*time.Second }, "no TTL")

		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{TTL: 100 * time.Second}))
		w.eventually(2*time.Second, func() bool { return keyLife(t, raw, w.connKey("lobby", a.id)) > 99*time.Second }, "no longer TTL")

		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{}))
		w.eventually(2*time.Second, func() bool { return !keyExists(t, raw, w.connKey("lobby", a.id)) }, "still a TTL")

		// A narrow rule for some does not end what another allows.
		only := func(_ context.Context, m Member, _ string) (bool, error) { return m.ID == a.id, nil }
		a.subscribe("lobby")
		require.NoError(t, s.TrackPresence(Regexp(mustCompile("^lob")), PresenceOptions{Guard: only}))
		w.eventually(2*time.Second, func() bool { return watcher.pushed("mesh/presence-ended") == 1 }, "the watcher may not see it any more")
		b := s.dial()
		b.join("lobby")
		a.expect(2*time.Second, "join", b.id)
		require.Equal(t, 0, watcher.count("join", b.id))
		require.Equal(t, 0, a.pushed("mesh/presence-ended"))
		require.Equal(t, 0, a.count("leave", ""), "a rule ends nobody's presence")
	})
}

// A rule that changes while the one before it is still being written holds.
func TestRulesThatFollowEachOtherQuickly(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s, raw := w.server(), w.client()
		a := s.dial()
		a.join("lobby")
		track := func(ttl time.Duration) {
			require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{TTL: ttl}))
		}
		for range 50 {
			track(100 * time.Second)
			w.eventually(2*time.Second, func() bool { return keyExists(t, raw, w.connKey("lobby", a.id)) }, "it has no key")
			track(0)
			w.eventually(2*time.Second, func() bool { return !keyExists(t, raw, w.connKey("lobby", a.id)) }, "the key would run out, and end who is alive")
		}
	})
}

func TestManagerSaysWhoIsPresent(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s1, s2 := w.server(), w.server()
		require.NoError(t, s1.TrackPresence(Exact("lobby"), PresenceOptions{}))
		require.NoError(t, s2.TrackPresence(Exact("lobby"), PresenceOptions{}))
		a, b, c := s1.dial(), s1.dial(), s2.dial()
		for _, room := range []string{"lobby", "untracked"} {
			for _, p := range []*peer{a, b, c} {
				p.join(room)
			}
		}
		require.NoError(t, s1.Connections().SetMetadata(ctx, b.id, map[string]string{"name": "B"}, MetadataOptions{}))
		require.Equal(t, "true", c.state("lobby", map[string]any{"typing": true}))
		for _, s := range []*testServer{s1, s2} {
			for _, room := range []string{"lobby", "untracked"} {
				ids, err := s.Presence().PresentConnections(ctx, room)
				require.NoError(t, err)
				require.ElementsMatch(t, []string{a.id, b.id, c.id}, ids)
				n, err := s.Presence().Count(ctx, room)
				require.NoError(t, err)
				require.Equal(t, 3, n)
			}
			w.eventually(2*time.Second, func() bool {
				members, err := s.Presence().Members(ctx, "lobby")
				require.NoError(t, err)
				byID := make(map[string]Member)
				for _, m := range members {
					byID[m.ID] = m
				}
				return byID[a.id].Metadata == nil && byID[a.id].State == nil &&
					string(byID[b.id].Metadata) == `{"name":"B"}` && string(byID[c.id].State) == `{"typing":true}`
			}, "members with metadata and states")
		}
		n, err := s1.Presence().Count(ctx, "nobody")
		require.NoError(t, err)
		require.Zero(t, n)
		_, err = s1.Presence().Members(ctx, "")
		require.ErrorIs(t, err, ErrInvalidRoom)
		_, err = s1.Presence().Count(ctx, "a\x00")
		require.ErrorIs(t, err, ErrInvalidRoom)
	})
}

func TestSubscribingToAWatchedRoomCostsRedisNothing(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		members := make([]*peer, 5)
		for i := range members {
			members[i] = s.dial()
			members[i].join("lobby")
		}
		s.dial().subscribe("lobby")
		late := make([]*peer, 20)
		for i := range late {
			late[i] = s.dial()
		}
		w.sleep(100 * time.Millisecond)
		before := w.mem.Mini().CommandCount()
		for _, p := range late { // no time passes: nothing else is done
			require.Len(t, p.subscribe("lobby").ids(t), len(members))
			require.True(t, p.room("mesh/get-presence-state", "lobby").Success)
			require.Equal(t, "true", string(p.call("mesh/unsubscribe-presence", map[string]any{"roomName": "lobby"})))
		}
		require.Equal(t, before, w.mem.Mini().CommandCount())
	})
}

func TestAnIdleServerIsFrugal(t *testing.T) {
	t.Parallel()
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		embedded(t, func(t *testing.T, w *world) {
			var log commandLog
			w.tracked(log.logging)
			w.sleep(30 * time.Second)
			before, all := log.sent(""), w.mem.Mini().CommandCount()
			w.sleep(time.Minute)
			require.NotZero(t, log.sent("")-before, "it renews its lease")
			require.LessOrEqual(t, log.sent("")-before, 120)
			require.LessOrEqual(t, w.mem.Mini().CommandCount()-all, 120, "those inside scripts included")
		})
	})
	t.Run("redis", func(t *testing.T) {
		t.Parallel()
		w := &world{t: t, real: redistest.Start(t)}
		raw := w.client()
		w.tracked()
		w.sleep(time.Second)
		before, began := commandCalls(t, raw), time.Now()
		w.sleep(5 * time.Second)
		after := commandCalls(t, raw)
		allowed := 2*time.Since(began).Seconds() + 6 // a renewal more or less at the ends
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

// commandCalls returns how often each command was executed, those inside
// scripts included.
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

func TestNothingButKeysWithATTLRemains(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx, raw := t.Context(), w.client()
		s1, s2 := w.server(), w.server()
		for _, s := range []*testServer{s1, s2} {
			s.track("^ttl", PresenceOptions{TTL: 5 * time.Second})
			s.track(".*", PresenceOptions{})
		}
		rooms := []string{"ttl", "plain", "a:b", "{x}", "conn:y"}
		for i, s := range []*testServer{s1, s2, s1, s2} {
			p := s.dial()
			require.NoError(t, s.Connections().SetMetadata(ctx, p.id, map[string]int{"n": i}, MetadataOptions{}))
			for _, room := range rooms {
				p.subscribe(room)
				p.join(room)
				require.Equal(t, "true", p.state(room, map[string]any{"n": i}, map[string]any{"expireAfter": 60_000 * (i % 2)}))
			}
			switch i {
			case 0:
				p.close()
			case 1:
				for _, room := range rooms {
					p.leave(room)
				}
			} // the others are there until Shutdown
		}
		s1.shutdown()
		s2.shutdown()
		keys, format := w.inStore(), w.keys().Format()
		require.Contains(t, keys, format)
		for _, key := range keys {
			if key != format {
				require.NotZero(t, keyLife(t, raw, key), "%q stays for ever", key)
			}
		}
	})
}

// audience is what a peer knows of the one room that it watches, folded from
// what it was told, frame by frame.
type audience struct {
	members  map[string]string // connection id -> state, "" without one
	epoch    string
	seq      uint64
	watching bool
	repairs  int
}

// follow folds everything that a peer was told. It returns the first thing
// that does not fit what was told before.
func (p *peer) follow(room string) (a audience, err error) {
	p.mu.Lock()
	frames := slices.Clone(p.frames)
	p.mu.Unlock()
	for i, f := range frames {
		switch f.Command {
		case "mesh/subscribe-presence":
			err = a.answer(f.Payload)
		case "mesh/unsubscribe-presence":
			a.watching = false
		case "mesh/presence-update":
			var u update
			if err = json.Unmarshal(f.Payload, &u); err == nil {
				err = a.apply(room, u)
			}
		}
		if err != nil {
			return a, fmt.Errorf("frame %d of %s: %w: %s", i, p.id, err, f.Payload)
		}
	}
	return a, nil
}

func (a *audience) answer(payload json.RawMessage) error {
	var v view
	var members []Member
	if err := json.Unmarshal(payload, &v); err != nil {
		return err
	}
	if err := json.Unmarshal(v.Present, &members); err != nil {
		return err
	}
	if v.Epoch == a.epoch && v.Seq < a.seq {
		return fmt.Errorf("snapshot of seq %d after %d", v.Seq, a.seq)
	}
	a.epoch, a.seq, a.watching = v.Epoch, v.Seq, v.Success
	a.members = make(map[string]string)
	for _, m := range members {
		if _, twice := a.members[m.ID]; twice {
			return fmt.Errorf("%s is in the snapshot twice", m.ID)
		}
		a.members[m.ID] = string(v.States[m.ID])
	}
	return nil
}

func (a *audience) apply(room string, u update) error {
	state, present := a.members[u.ConnectionID]
	switch {
	case !a.watching:
		return fmt.Errorf("update without subscription")
	case u.RoomName != room:
		return fmt.Errorf("update of another room")
	case a.epoch == u.Epoch && u.Seq < a.seq:
		return fmt.Errorf("seq %d after %d", u.Seq, a.seq)
	case u.Type == "join" && present:
		return fmt.Errorf("join of a member")
	case u.Type != "join" && !present:
		return fmt.Errorf("%s of someone who is not in", u.Type)
	case u.Type == "state" && state == "" && string(u.State) == "null":
		return fmt.Errorf("end of a state that there was not")
	}
	a.epoch, a.seq = u.Epoch, u.Seq
	if u.Repair {
		a.repairs++
	}
	switch u.Type {
	case "join":
		a.members[u.ConnectionID] = ""
	case "leave":
		delete(a.members, u.ConnectionID)
	case "state":
		if a.members[u.ConnectionID] = string(u.State); string(u.State) == "null" {
			a.members[u.ConnectionID] = ""
		}
	}
	return nil
}

// churn does random things with a peer in a room, and returns the peer that
// it goes on with.
func churn(s *testServer, p *peer, room string, rng *rand.Rand, steps int) *peer {
	for i := range steps {
		switch what := rng.IntN(20); {
		case what < 6:
			p.join(room)
		case what < 10:
			p.leave(room)
		case what < 15:
			p.state(room, map[string]any{"i": i})
		case what < 17:
			p.state(room, map[string]any{"i": i}, map[string]any{"expireAfter": 20 + rng.IntN(100)})
		case what < 19:
			p.call("mesh/clear-presence-state", map[string]any{"roomName": room})
		default:
			p.close()
			p = s.dial()
		}
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
	}
	return p
}

func TestEverySubscriberComesToTheTruth(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const room, seed = "lobby", 20240817
		servers := []*testServer{w.tracked(), w.tracked(), w.tracked()}
		steady := subscribers(room, servers...)
		fickle := []*peer{servers[0].dial(), servers[1].dial(), servers[2].dial()}
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				s := servers[i%len(servers)]
				churn(s, s.dial(), room, rand.New(rand.NewPCG(seed, uint64(i))), 60)
			})
		}
		for i, p := range fickle { // they come and go in the middle of it
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(100+i)))
				for range 10 {
					p.subscribe(room)
					time.Sleep(time.Duration(rng.IntN(80)) * time.Millisecond)
					p.call("mesh/unsubscribe-presence", map[string]any{"roomName": room})
				}
				p.subscribe(room)
			})
		}
		wg.Wait()
		w.sleep(500 * time.Millisecond) // the last states have expired, the last events come
		members, err := servers[0].Presence().Members(t.Context(), room)
		require.NoError(t, err)
		truth := make(map[string]string)
		for _, m := range members {
			truth[m.ID] = string(m.State)
		}
		require.NotEmpty(t, truth)
		for _, p := range slices.Concat(steady, fickle) {
			var a audience
			w.eventually(5*time.Second, func() bool {
				a, err = p.follow(room)
				require.NoError(t, err)
				return maps.Equal(truth, a.members)
			}, "%s has not come to the truth, of %d members", p.id, len(truth))
			if w.virtual { // in real time an event may dawdle for so long that it is taken for lost
				require.Zero(t, a.repairs, "nothing was lost")
			}
		}
		require.Greater(t, len(steady[0].got()), 200)
	})
}
