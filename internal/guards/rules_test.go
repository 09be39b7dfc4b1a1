package guards

import (
	"context"
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
	re := func(s string) Pattern { return Pattern{Regexp: regexp.MustCompile(s)} }
	for name, tc := range map[string]struct {
		rules   []given
		room    string
		tracked bool
		ttl     time.Duration
		guards  []string
		joins   []string
	}{
		"no rules":               {room: "lobby"},
		"none matches":           {rules: []given{{p: Pattern{Exact: "lobby"}}, {p: re("^x")}}, room: "hall"},
		"exact":                  {rules: []given{{p: Pattern{Exact: "lobby"}, ttl: 2 * time.Second, guard: "g", join: "j"}}, room: "lobby", tracked: true, ttl: 2 * time.Second, guards: []string{"g"}, joins: []string{"j"}},
		"exact is no pattern":    {rules: []given{{p: Pattern{Exact: "a.c"}}}, room: "abc"},
		"regexp is not anchored": {rules: []given{{p: re("admin"), guard: "g"}}, room: "the-admin-room", tracked: true, guards: []string{"g"}},
		"exact TTL wins":         {rules: []given{{p: re("."), ttl: 5 * time.Second}, {p: Pattern{Exact: "lobby"}, ttl: 2 * time.Second}}, room: "lobby", tracked: true, ttl: 2 * time.Second},
		"exact TTL wins, even 0": {rules: []given{{p: re("."), ttl: 5 * time.Second}, {p: Pattern{Exact: "lobby"}}}, room: "lobby", tracked: true},
		"first pattern's TTL":    {rules: []given{{p: re("."), ttl: 5 * time.Second}, {p: re("l"), ttl: 2 * time.Second}}, room: "lobby", tracked: true, ttl: 5 * time.Second},
		"first pattern that matches": {
			rules: []given{{p: re("x"), ttl: 5 * time.Second}, {p: re("l"), ttl: 2 * time.Second}}, room: "lobby", tracked: true, ttl: 2 * time.Second},
		"every guard": {
			rules: []given{{p: re("."), guard: "broad", join: "j1"}, {p: Pattern{Exact: "lobby"}, guard: "narrow"}, {p: re("^l"), guard: "l", join: "j2"}, {p: re("x"), guard: "x"}},
			room:  "lobby", tracked: true, guards: []string{"narrow", "broad", "l"}, joins: []string{"j1", "j2"}},
		"a broad rule without guard opens nothing": {
			rules: []given{{p: Pattern{Exact: "lobby"}, guard: "narrow"}, {p: re(".")}}, room: "lobby", tracked: true, guards: []string{"narrow"}},
		"same name replaces": {
			rules: []given{{p: Pattern{Exact: "lobby"}, ttl: 2 * time.Second, guard: "old"}, {p: Pattern{Exact: "lobby"}, guard: "new"}},
			room:  "lobby", tracked: true, guards: []string{"new"}},
		"same expression replaces, in its place": {
			rules: []given{{p: re("."), ttl: 2 * time.Second, guard: "old"}, {p: re("l"), ttl: 3 * time.Second, guard: "l"}, {p: re("."), ttl: 4 * time.Second, guard: "new"}},
			room:  "lobby", tracked: true, ttl: 4 * time.Second, guards: []string{"new", "l"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mark, asked := marks()
			var s RuleSet
			for _, g := range tc.rules {
				o := Options{TTL: g.ttl, StateInterval: g.ttl / 100}
				if g.guard != "" {
					o.Guard = mark(g.guard)
				}
				if g.join != "" {
					o.JoinGuard = mark(g.join)
				}
				s.Add(g.p, o)
			}
			for range 2 { // the second answer is from the cache
				r := s.Match(tc.room)
				assert.Equal(t, tc.tracked, r.Tracked)
				assert.Equal(t, tc.ttl, r.TTL)
				assert.Equal(t, tc.ttl/100, r.StateInterval)
				assert.Equal(t, tc.guards, asked(r.guards))
				assert.Equal(t, tc.joins, asked(r.joinGuards))
			}
		})
	}
}

func TestRuleSetVersions(t *testing.T) {
	t.Parallel()
	var s RuleSet
	s.Add(Pattern{Regexp: regexp.MustCompile("^a")}, Options{})
	before := s.Match("b")
	assert.False(t, before.Tracked)
	s.Add(Pattern{Exact: "b"}, Options{})
	after := s.Match("b")
	assert.True(t, after.Tracked, "what was kept is forgotten")
	assert.Greater(t, after.version, before.version)
	other := s.Match("abc").version
	s.Add(Pattern{Exact: "c"}, Options{})
	s.Add(Pattern{Regexp: regexp.MustCompile("^z")}, Options{})
	require.True(t, s.Remove(Pattern{Exact: "c"}))
	require.True(t, s.Remove(Pattern{Regexp: regexp.MustCompile("^z")}))
	assert.Equal(t, after.version, s.Match("b").version, "rules about other rooms change nothing")
	assert.Equal(t, other, s.Match("abc").version)
}

func TestMatchCache(t *testing.T) {
	t.Parallel()
	var s RuleSet
	s.Add(Pattern{Regexp: regexp.MustCompile("^room-[0-9]+$")}, Options{TTL: time.Second})
	cache := &s.cache
	for i := range 5 * matchesKept {
		require.True(t, s.Match(fmt.Sprintf("room-%d", i)).Tracked)
		_, _, used := cache.get("room-0")
		require.True(t, used, "what is in use stays")
		s.Match("room-0")
		require.LessOrEqual(t, len(cache.young)+len(cache.old), 2*matchesKept)
	}
	long := strings.Repeat("x", longName)
	require.True(t, s.Match("room-1").Tracked)
	require.False(t, s.Match(long).Tracked)
	_, _, kept := cache.get(long)
	assert.False(t, kept, "long names are not kept")
	for i := range 3 * matchesKept {
		s.Match(fmt.Sprintf("room-%d", 10+i))
	}
	_, _, kept = cache.get("room-1")
	assert.False(t, kept, "what is not used goes")
}

func TestRuleSetConcurrent(t *testing.T) {
	t.Parallel()
	var s RuleSet
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for n := range 50 {
				p := Pattern{Exact: fmt.Sprintf("room-%d-%d", i, n)}
				if n%2 == 0 {
					p = Pattern{Regexp: regexp.MustCompile(fmt.Sprintf("^room-%d-%d$", i, n))}
				}
				s.Add(p, Options{})
			}
		})
		wg.Go(func() {
			var last [50]uint64
			for n := range 500 {
				r := s.Match(fmt.Sprintf("room-%d-%d", i, n%50))
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
			assert.True(t, s.Match(fmt.Sprintf("room-%d-%d", i, n)).Tracked)
		}
	}
}

func TestRemovingRules(t *testing.T) {
	t.Parallel()
	var s RuleSet
	re := func(expr string) Pattern { return Pattern{Regexp: regexp.MustCompile(expr)} }
	for _, p := range []Pattern{Pattern{Exact: "a"}, re("a"), {}} {
		assert.False(t, s.Remove(p), "%v", p)
	}
	s.Add(re("^a"), Options{TTL: time.Second})
	s.Add(re("b"), Options{TTL: 2 * time.Second})
	s.Add(Pattern{Exact: "ab"}, Options{TTL: 3 * time.Second})
	last := s.Match("ab").version
	now := func(want time.Duration) {
		t.Helper()
		r := s.Match("ab")
		assert.Equal(t, want, r.TTL)
		assert.Equal(t, want > 0, r.Tracked)
		assert.Greater(t, r.version, last)
		last = r.version
	}
	require.True(t, s.Remove(Pattern{Exact: "ab"}))
	now(time.Second)
	assert.False(t, s.Remove(Pattern{Exact: "ab"}), "it is gone")
	require.True(t, s.Remove(re("^a")))
	now(2 * time.Second)
	assert.False(t, s.Remove(re("^a")))
	require.True(t, s.Remove(re("b")))
	now(0)
	s.Add(re("b"), Options{TTL: 2 * time.Second})
	now(2 * time.Second)
	s.Add(re("^a"), Options{TTL: time.Second})
	now(2 * time.Second) // given again, it comes last
	s.Add(Pattern{Exact: "ab"}, Options{TTL: 3 * time.Second})
	now(3 * time.Second)
}

// Removed rules are not kept for ever, and versions do not go back when they are dropped.
func TestRemovedRulesAreForgotten(t *testing.T) {
	t.Parallel()
	var s RuleSet
	s.Add(Pattern{Exact: "stays"}, Options{})
	last := make(map[string]uint64)
	rises := func(room string) {
		t.Helper()
		v := s.Match(room).version
		require.GreaterOrEqual(t, v, last[room])
		last[room] = v
	}
	for i := range 3 * namesRemoved {
		name := fmt.Sprint("room", i)
		s.Add(Pattern{Exact: name}, Options{})
		rises(name)
		require.True(t, s.Remove(Pattern{Exact: name}))
		rises(name)
		rises("stays")
		rises("room0")
		require.False(t, s.Match(name).Tracked)
		require.LessOrEqual(t, len(s.exact), namesRemoved+2)
	}
	for i := range 5 * patternsRemoved {
		p := Pattern{Regexp: regexp.MustCompile(fmt.Sprintf("^room%d$", i))}
		s.Add(p, Options{})
		require.True(t, s.Remove(p))
		rises("room1")
		rises("stays")
		require.LessOrEqual(t, len(s.patterns), patternsRemoved+1)
	}
	assert.True(t, s.Match("stays").Tracked)
}

// Adding and removing a name does not copy the others. The test is not parallel because
// allocations are counted for the whole process.
func TestAddingANameCopiesNothing(t *testing.T) {
	var s RuleSet
	for i := range 20_000 {
		s.Add(Pattern{Exact: fmt.Sprint("room", i)}, Options{})
	}
	n := 0
	allocs := testing.AllocsPerRun(1000, func() {
		n++
		s.Add(Pattern{Exact: fmt.Sprint("new", n)}, Options{})
		if n%2 == 0 && !s.Remove(Pattern{Exact: fmt.Sprint("new", n-1)}) {
			t.Error("not removed")
		}
	})
	assert.Less(t, allocs, 10.0)
}

// Whatever rules are added and removed, a room has the sum of its rules. Its version
// changes if and only if one of them changes.
func TestRulesAgainstAModel(t *testing.T) {
	t.Parallel()
	type given struct {
		p Pattern
		o Options
	}
	exprs := []string{"a", "^b", "c$", "."}
	names := []string{"a", "b", "ab", "bc", "abc", "x"}
	var s RuleSet
	var model []given // in the order they were given
	versions := make(map[string]uint64)
	dice := rand.New(rand.NewPCG(rand.Uint64(), 0))
	for range 5000 {
		p := Pattern{Exact: names[dice.IntN(len(names))]}
		if dice.IntN(2) == 0 {
			p = Pattern{Regexp: regexp.MustCompile(exprs[dice.IntN(len(exprs))])}
		}
		at := slices.IndexFunc(model, func(g given) bool { return g.p.String() == p.String() })
		o := Options{TTL: time.Duration(1+dice.IntN(9)) * time.Second}
		switch remove := dice.IntN(2) == 0; {
		case remove:
			require.Equal(t, at >= 0, s.Remove(p))
			if at < 0 {
				continue
			}
			model = slices.Delete(model, at, at+1)
		case at >= 0:
			model[at].o = o
			s.Add(p, o)
		default:
			model = append(model, given{p, o})
			s.Add(p, o)
		}
		for _, room := range names {
			var want time.Duration
			for _, g := range model {
				if g.p.Regexp != nil && g.p.Regexp.MatchString(room) && want == 0 {
					want = g.o.TTL
				}
			}
			if i := slices.IndexFunc(model, func(g given) bool { return g.p.Regexp == nil && g.p.Exact == room }); i >= 0 {
				want = model[i].o.TTL
			}
			r := s.Match(room)
			require.Equal(t, want, r.TTL, "%s: %v", room, model)
			about := p.Regexp == nil && p.Exact == room || p.Regexp != nil && p.Regexp.MatchString(room)
			require.Equal(t, about, r.version != versions[room], "%s, %v changed", room, p)
			versions[room] = r.version
		}
	}
}

func BenchmarkMatchCached(b *testing.B) {
	var s RuleSet
	s.Add(Pattern{Regexp: regexp.MustCompile("^(a|b)+c.*$")}, Options{})
	s.Add(Pattern{Regexp: regexp.MustCompile("room-[0-9]+")}, Options{})
	for b.Loop() {
		s.Match("room-12345")
	}
}

// marks returns a function that makes guards, and one that asks guards and returns their
// marks.
func marks() (mark func(string) Func, asked func([]Func) []string) {
	var list []string
	mark = func(name string) Func {
		return func(context.Context, Member, string) (bool, error) {
			list = append(list, name)
			return true, nil
		}
	}
	asked = func(guards []Func) []string {
		list = nil
		for _, g := range guards {
			_, _ = g(context.Background(), Member{}, "")
		}
		return list
	}
	return mark, asked
}

// The guards of the numbers of a room are the OccupancyGuards of its rules. The Guard of a
// rule without one takes its place.
func TestOccupancyGuards(t *testing.T) {
	t.Parallel()
	type given struct {
		p                Pattern
		guard, occupancy string // "": none
	}
	re := func(s string) Pattern { return Pattern{Regexp: regexp.MustCompile(s)} }
	for name, tc := range map[string]struct {
		rules []given
		want  []string
	}{
		"no guard":            {rules: []given{{p: re(".")}}},
		"the Guard":           {rules: []given{{p: re("."), guard: "g"}}, want: []string{"g"}},
		"a guard of its own":  {rules: []given{{p: re("."), guard: "g", occupancy: "o"}}, want: []string{"o"}},
		"only for numbers":    {rules: []given{{p: re("."), occupancy: "o"}}, want: []string{"o"}},
		"of one of the rules": {rules: []given{{p: re("l"), guard: "g1"}, {p: re("."), guard: "g2", occupancy: "o2"}, {p: re("b"), guard: "g3"}}, want: []string{"g1", "o2", "g3"}},
		"of several rules":    {rules: []given{{p: re("l"), occupancy: "o1"}, {p: re("b"), guard: "g2", occupancy: "o2"}, {p: Pattern{Exact: "lobby"}}}, want: []string{"o1", "o2"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked []string
			mark := func(name string) Func {
				if name == "" {
					return nil
				}
				return func(context.Context, Member, string) (bool, error) {
					asked = append(asked, name)
					return true, nil
				}
			}
			var s RuleSet
			for _, g := range tc.rules {
				s.Add(g.p, Options{Guard: mark(g.guard), OccupancyGuard: mark(g.occupancy), OccupancyInterval: 7 * time.Second})
			}
			q := Question{Room: "lobby", Occupancy: true, rule: s.Match("lobby")}
			require.Len(t, q.guardRules(), len(tc.want))
			for _, guard := range q.guards() {
				_, _ = guard(t.Context(), Member{}, "lobby")
			}
			require.Equal(t, tc.want, asked)
			require.Equal(t, 7*time.Second, q.rule.OccupancyInterval)
			require.Zero(t, s.Match("").OccupancyInterval)
		})
	}
}

// The rule of an exact name that takes a grace or a cap of a pattern from its room is
// found, and no rule with bounds of its own.
func TestHiddenBounds(t *testing.T) {
	t.Parallel()
	var s RuleSet
	hidden := func() []any {
		name, pattern, more := s.Hidden()
		return []any{name, pattern, more}
	}
	doc := Pattern{Regexp: regexp.MustCompile("^doc:")}
	s.Add(doc, Options{TTL: time.Second})
	s.Add(Pattern{Exact: "doc:2"}, Options{})
	assert.Equal(t, []any{"", "", 0}, hidden())
	s.Add(doc, Options{MaxUsers: 3})
	assert.Equal(t, []any{"doc:2", "^doc:", 0}, hidden())
	s.Add(Pattern{Exact: "doc:1"}, Options{})
	s.Add(Pattern{Exact: "doc:3"}, Options{Grace: time.Second})
	s.Add(Pattern{Exact: "lobby"}, Options{})
	assert.Equal(t, []any{"doc:1", "^doc:", 1}, hidden())
	s.Remove(doc)
	assert.Equal(t, []any{"", "", 0}, hidden())
}
