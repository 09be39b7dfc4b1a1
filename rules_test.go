package mesh

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestRuleSetPrecedence(t *testing.T) {
	t.Parallel()
	type given struct {
		p     Pattern
		ttl   time.Duration // and a hundredth of it for the interval between states
		guard string        // "": none
		join  string
	}
	re := func(s string) Pattern { return Regexp(regexp.MustCompile(s)) }
	for name, tc := range map[string]struct {
		rules   []given
		room    string
		tracked bool
		ttl     time.Duration
		guards  []string
		joins   []string
	}{
		"no rules":               {room: "lobby"},
		"none matches":           {rules: []given{{p: Exact("lobby")}, {p: re("^x")}}, room: "hall"},
		"exact":                  {rules: []given{{p: Exact("lobby"), ttl: 2 * time.Second, guard: "g", join: "j"}}, room: "lobby", tracked: true, ttl: 2 * time.Second, guards: []string{"g"}, joins: []string{"j"}},
		"exact is no pattern":    {rules: []given{{p: Exact("a.c")}}, room: "abc"},
		"regexp is not anchored": {rules: []given{{p: re("admin"), guard: "g"}}, room: "the-admin-room", tracked: true, guards: []string{"g"}},
		"exact TTL wins":         {rules: []given{{p: re("."), ttl: 5 * time.Second}, {p: Exact("lobby"), ttl: 2 * time.Second}}, room: "lobby", tracked: true, ttl: 2 * time.Second},
		"exact TTL wins, even 0": {rules: []given{{p: re("."), ttl: 5 * time.Second}, {p: Exact("lobby")}}, room: "lobby", tracked: true},
		"first pattern's TTL":    {rules: []given{{p: re("."), ttl: 5 * time.Second}, {p: re("l"), ttl: 2 * time.Second}}, room: "lobby", tracked: true, ttl: 5 * time.Second},
		"first pattern that matches": {
			rules: []given{{p: re("x"), ttl: 5 * time.Second}, {p: re("l"), ttl: 2 * time.Second}}, room: "lobby", tracked: true, ttl: 2 * time.Second},
		"every guard": {
			rules: []given{{p: re("."), guard: "broad", join: "j1"}, {p: Exact("lobby"), guard: "narrow"}, {p: re("^l"), guard: "l", join: "j2"}, {p: re("x"), guard: "x"}},
			room:  "lobby", tracked: true, guards: []string{"narrow", "broad", "l"}, joins: []string{"j1", "j2"}},
		"a broad rule without guard opens nothing": {
			rules: []given{{p: Exact("lobby"), guard: "narrow"}, {p: re(".")}}, room: "lobby", tracked: true, guards: []string{"narrow"}},
		"same name replaces": {
			rules: []given{{p: Exact("lobby"), ttl: 2 * time.Second, guard: "old"}, {p: Exact("lobby"), guard: "new"}},
			room:  "lobby", tracked: true, guards: []string{"new"}},
		"same expression replaces, in its place": {
			rules: []given{{p: re("."), ttl: 2 * time.Second, guard: "old"}, {p: re("l"), ttl: 3 * time.Second, guard: "l"}, {p: re("."), ttl: 4 * time.Second, guard: "new"}},
			room:  "lobby", tracked: true, ttl: 4 * time.Second, guards: []string{"new", "l"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mark, asked := marks()
			var s ruleSet
			for _, g := range tc.rules {
				o := PresenceOptions{TTL: g.ttl, StateInterval: g.ttl / 100}
				if g.guard != "" {
					o.Guard = mark(g.guard)
				}
				if g.join != "" {
					o.JoinGuard = mark(g.join)
				}
				require.NoError(t, s.add(g.p, o))
			}
			for range 2 { // the second answer is from the cache
				r := s.match(tc.room)
				assert.Equal(t, tc.tracked, r.tracked)
				assert.Equal(t, tc.ttl, r.ttl)
				assert.Equal(t, tc.ttl/100, r.interval)
				assert.Equal(t, tc.guards, asked(r.guards))
				assert.Equal(t, tc.joins, asked(r.joinGuards))
			}
		})
	}
}

func TestRuleSetVersions(t *testing.T) {
	t.Parallel()
	var s ruleSet
	require.NoError(t, s.add(Regexp(regexp.MustCompile("^a")), PresenceOptions{}))
	before := s.match("b")
	assert.False(t, before.tracked)
	require.NoError(t, s.add(Exact("b"), PresenceOptions{}))
	after := s.match("b")
	assert.True(t, after.tracked, "what was kept is forgotten")
	assert.Greater(t, after.version, before.version)
	other := s.match("abc").version
	require.NoError(t, s.add(Exact("c"), PresenceOptions{}))
	require.NoError(t, s.add(Regexp(regexp.MustCompile("^z")), PresenceOptions{}))
	require.True(t, s.remove(Exact("c")))
	require.True(t, s.remove(Regexp(regexp.MustCompile("^z"))))
	assert.Equal(t, after.version, s.match("b").version, "rules about other rooms change nothing")
	assert.Equal(t, other, s.match("abc").version)
	require.Error(t, s.add(Exact(""), PresenceOptions{}))
	assert.Equal(t, after.version, s.match("b").version, "a refused rule changes nothing")
}

func TestMatchCache(t *testing.T) {
	t.Parallel()
	var s ruleSet
	require.NoError(t, s.add(Regexp(regexp.MustCompile("^room-[0-9]+$")), PresenceOptions{TTL: time.Second}))
	cache := &s.cache
	for i := range 5 * matchesKept {
		require.True(t, s.match(fmt.Sprintf("room-%d", i)).tracked)
		_, _, used := cache.get("room-0")
		require.True(t, used, "what is in use stays")
		s.match("room-0")
		require.LessOrEqual(t, len(cache.young)+len(cache.old), 2*matchesKept)
	}
	long := strings.Repeat("x", longName)
	require.True(t, s.match("room-1").tracked)
	require.False(t, s.match(long).tracked)
	_, _, kept := cache.get(long)
	assert.False(t, kept, "long names are not kept")
	for i := range 3 * matchesKept {
		s.match(fmt.Sprintf("room-%d", 10+i))
	}
	_, _, kept = cache.get("room-1")
	assert.False(t, kept, "what is not used goes")
}

func TestRuleSetConcurrent(t *testing.T) {
	t.Parallel()
	var s ruleSet
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for n := range 50 {
				p := Exact(fmt.Sprintf("room-%d-%d", i, n))
				if n%2 == 0 {
					p = Regexp(regexp.MustCompile(fmt.Sprintf("^room-%d-%d$", i, n)))
				}
				if err := s.add(p, PresenceOptions{}); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			var last [50]uint64
			for n := range 500 {
				r := s.match(fmt.Sprintf("room-%d-%d", i, n%50))
				if r.version < last[n%50] {
					t.Error("versions went back")
				}
				last[n%50] = r.version
			}
		})
	}
	wg.Wait()
	for i := range 4 {
		for n := range 50 {
			assert.True(t, s.match(fmt.Sprintf("room-%d-%d", i, n)).tracked)
		}
	}
}

func TestRemovingRules(t *testing.T) {
	t.Parallel()
	var s ruleSet
	re := func(expr string) Pattern { return Regexp(regexp.MustCompile(expr)) }
	for _, p := range []Pattern{Exact("a"), re("a"), {}, Exact(""), Regexp(nil)} {
		assert.False(t, s.remove(p), "%v", p)
	}
	require.NoError(t, s.add(re("^a"), PresenceOptions{TTL: time.Second}))
	require.NoError(t, s.add(re("b"), PresenceOptions{TTL: 2 * time.Second}))
	require.NoError(t, s.add(Exact("ab"), PresenceOptions{TTL: 3 * time.Second}))
	last := s.match("ab").version
	now := func(want time.Duration) {
		t.Helper()
		r := s.match("ab")
		assert.Equal(t, want, r.ttl)
		assert.Equal(t, want > 0, r.tracked)
		assert.Greater(t, r.version, last)
		last = r.version
	}
	require.True(t, s.remove(Exact("ab")))
	now(time.Second)
	assert.False(t, s.remove(Exact("ab")), "it is gone")
	require.True(t, s.remove(re("^a")))
	now(2 * time.Second)
	assert.False(t, s.remove(re("^a")))
	require.True(t, s.remove(re("b")))
	now(0)
	require.NoError(t, s.add(re("b"), PresenceOptions{TTL: 2 * time.Second}))
	now(2 * time.Second)
	require.NoError(t, s.add(re("^a"), PresenceOptions{TTL: time.Second}))
	now(2 * time.Second) // given again, it comes last
	require.NoError(t, s.add(Exact("ab"), PresenceOptions{TTL: 3 * time.Second}))
	now(3 * time.Second)
}

// Removed rules are not kept for ever, and versions do not go back for it.
func TestRemovedRulesAreForgotten(t *testing.T) {
	t.Parallel()
	var s ruleSet
	require.NoError(t, s.add(Exact("stays"), PresenceOptions{}))
	last := make(map[string]uint64)
	rises := func(room string) {
		t.Helper()
		v := s.match(room).version
		require.GreaterOrEqual(t, v, last[room])
		last[room] = v
	}
	for i := range 3 * namesRemoved {
		name := fmt.Sprint("room", i)
		require.NoError(t, s.add(Exact(name), PresenceOptions{}))
		rises(name)
		require.True(t, s.remove(Exact(name)))
		rises(name)
		rises("stays")
		rises("room0")
		require.False(t, s.match(name).tracked)
		require.LessOrEqual(t, len(s.exact), namesRemoved+2)
	}
	for i := range 5 * patternsRemoved {
		p := Regexp(regexp.MustCompile(fmt.Sprintf("^room%d$", i)))
		require.NoError(t, s.add(p, PresenceOptions{}))
		require.True(t, s.remove(p))
		rises("room1")
		rises("stays")
		require.LessOrEqual(t, len(s.patterns), patternsRemoved+1)
	}
	assert.True(t, s.match("stays").tracked)
}

// A name is added and removed without a copy of the others. Not parallel:
// allocations are counted for the whole process.
func TestAddingANameCopiesNothing(t *testing.T) {
	var s ruleSet
	for i := range 20_000 {
		require.NoError(t, s.add(Exact(fmt.Sprint("room", i)), PresenceOptions{}))
	}
	n := 0
	allocs := testing.AllocsPerRun(1000, func() {
		n++
		if err := s.add(Exact(fmt.Sprint("new", n)), PresenceOptions{}); err != nil {
			t.Error(err)
		}
		if n%2 == 0 && !s.remove(Exact(fmt.Sprint("new", n-1))) {
			t.Error("not removed")
		}
	})
	assert.Less(t, allocs, 10.0)
}

// For any rules added and removed, a room has the sum of its rules, and its version
// changes if and only if one of them does.
func TestRulesAgainstAModel(t *testing.T) {
	t.Parallel()
	type given struct {
		p Pattern
		o PresenceOptions
	}
	exprs := []string{"a", "^b", "c$", "."}
	names := []string{"a", "b", "ab", "bc", "abc", "x"}
	var s ruleSet
	var model []given // in the order they were given
	versions := make(map[string]uint64)
	dice := rand.New(rand.NewPCG(rand.Uint64(), 0))
	for range 5000 {
		p := Exact(names[dice.IntN(len(names))])
		if dice.IntN(2) == 0 {
			p = Regexp(regexp.MustCompile(exprs[dice.IntN(len(exprs))]))
		}
		at := slices.IndexFunc(model, func(g given) bool { return g.p.String() == p.String() })
		o := PresenceOptions{TTL: time.Duration(1+dice.IntN(9)) * time.Second}
		switch remove := dice.IntN(2) == 0; {
		case remove:
			require.Equal(t, at >= 0, s.remove(p))
			if at < 0 {
				continue
			}
			model = slices.Delete(model, at, at+1)
		case at >= 0:
			model[at].o = o
			require.NoError(t, s.add(p, o))
		default:
			model = append(model, given{p, o})
			require.NoError(t, s.add(p, o))
		}
		for _, room := range names {
			var want time.Duration
			for _, g := range model {
				if g.p.kind == patternRegexp && g.p.re.MatchString(room) && want == 0 {
					want = g.o.TTL
				}
			}
			if i := slices.IndexFunc(model, func(g given) bool { return g.p.exact == room }); i >= 0 {
				want = model[i].o.TTL
			}
			r := s.match(room)
			require.Equal(t, want, r.ttl, "%s: %v", room, model)
			about := p.exact == room || p.kind == patternRegexp && p.re.MatchString(room)
			require.Equal(t, about, r.version != versions[room], "%s, %v changed", room, p)
			versions[room] = r.version
		}
	}
}

func BenchmarkMatchCached(b *testing.B) {
	var s ruleSet
	require.NoError(b, errors.Join(
		s.add(Regexp(regexp.MustCompile("^(a|b)+c.*$")), PresenceOptions{}),
		s.add(Regexp(regexp.MustCompile("room-[0-9]+")), PresenceOptions{}),
	))
	for b.Loop() {
		s.match("room-12345")
	}
}
