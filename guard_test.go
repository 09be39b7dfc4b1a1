package mesh

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPatternString(t *testing.T) {
	t.Parallel()
	assert.Equal(t, `"lob\"by"`, Exact(`lob"by`).String())
	assert.Equal(t, `/^.+$/`, Regexp(regexp.MustCompile("^.+$")).String())
	assert.Equal(t, "(no pattern)", Pattern{}.String())
	assert.Equal(t, "(no pattern)", Regexp(nil).String())
}

func TestRuleSetRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		p    Pattern
		o    PresenceOptions
		is   error
		says string
	}{
		"zero pattern":      {is: ErrInvalidPattern, says: "zero Pattern"},
		"nil regexp":        {p: Regexp(nil), is: ErrInvalidPattern, says: "nil *regexp.Regexp"},
		"empty name":        {p: Exact(""), is: ErrInvalidPattern, says: "empty name"},
		"control":           {p: Exact("a\nb"), is: ErrInvalidPattern, says: "control character"},
		"not UTF-8":         {p: Exact("a\xff"), is: ErrInvalidPattern, says: "UTF-8"},
		"negative TTL":      {p: Exact("a"), o: PresenceOptions{TTL: -time.Second}, is: ErrInvalidOptions, says: "TTL is -1s"},
		"short TTL":         {p: Exact("a"), o: PresenceOptions{TTL: 999 * time.Millisecond}, is: ErrInvalidOptions, says: "TTL is 999ms"},
		"short interval":    {p: Exact("a"), o: PresenceOptions{StateInterval: 9 * time.Millisecond}, is: ErrInvalidOptions, says: "StateInterval is 9ms"},
		"long interval":     {p: Exact("a"), o: PresenceOptions{StateInterval: time.Minute + 1}, is: ErrInvalidOptions, says: "StateInterval is 1m0.000000001s"},
		"negative interval": {p: Exact("a"), o: PresenceOptions{StateInterval: -time.Second}, is: ErrInvalidOptions, says: "StateInterval is -1s"},
		"TTL for ever":      {p: Exact("a"), o: PresenceOptions{TTL: 1<<63 - 1}, is: ErrInvalidOptions, says: `pattern "a"`},
		"TTL of a unit":     {p: Regexp(regexp.MustCompile("a")), o: PresenceOptions{TTL: 60_000}, is: ErrInvalidOptions, says: "TTL is 60µs"},
	} {
		var s ruleSet
		err := s.add(tc.p, tc.o)
		require.ErrorIs(t, err, tc.is, name)
		assert.ErrorContains(t, err, tc.says, name)
		assert.False(t, s.match("a").tracked, name)
	}
}

// marks returns guards that add their mark to the list when asked.
func marks() (mark func(string) Guard, asked func([]Guard) []string) {
	var list []string
	mark = func(name string) Guard {
		return func(context.Context, Member, string) (bool, error) {
			list = append(list, name)
			return true, nil
		}
	}
	asked = func(guards []Guard) []string {
		list = nil
		for _, g := range guards {
			_, _ = g(context.Background(), Member{}, "")
		}
		return list
	}
	return mark, asked
}

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
				assert.EqualValues(t, len(tc.rules), r.version)
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
	assert.True(t, after.tracked, "the cache belongs to one version")
	assert.Greater(t, after.version, before.version)
	require.Error(t, s.add(Exact(""), PresenceOptions{}))
	assert.Equal(t, after.version, s.match("b").version, "a refused rule changes nothing")
}

func TestMatchCache(t *testing.T) {
	t.Parallel()
	var s ruleSet
	require.NoError(t, s.add(Regexp(regexp.MustCompile("^room-[0-9]+$")), PresenceOptions{TTL: time.Second}))
	cache := &s.current.Load().cache
	for i := range 5 * matchesKept {
		require.True(t, s.match(fmt.Sprintf("room-%d", i)).tracked)
		_, used := cache.get("room-0")
		require.True(t, used, "what is in use stays")
		require.LessOrEqual(t, len(cache.young)+len(cache.old), 2*matchesKept)
	}
	_, kept := cache.get("room-1")
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
			var last uint64
			for n := range 500 {
				r := s.match(fmt.Sprintf("room-%d-%d", i, n%50))
				if r.version < last {
					t.Error("versions went back")
				}
				last = r.version
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
