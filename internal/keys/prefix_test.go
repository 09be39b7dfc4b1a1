package keys

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
)

// nameKind is one kind of names: their beginning, a pattern of their ends, and some
// examples of ends.
type nameKind struct {
	begin    string
	ends     *regexp.Regexp
	examples []string
}

func (n nameKind) has(name string) bool {
	rest, ok := strings.CutPrefix(name, n.begin)
	return ok && n.ends.MatchString(rest)
}

// isRandom reports whether the ends are random.
func (n nameKind) isRandom() bool { return len(n.examples) == 1 && len(n.examples[0]) >= 16 }

// kindsOf returns the kinds of names of a Space without a cluster.
func kindsOf(k Space) []nameKind {
	const inc = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	none := regexp.MustCompile(`^$`)
	room, roomConn := regexp.MustCompile(`(?s)^.+$`), regexp.MustCompile(`(?s)^.+:[^:]+$`)
	conn, random, digits := regexp.MustCompile(`^[^:\s]+$`), regexp.MustCompile(`^[A-Z2-7]{26}$`), regexp.MustCompile(`^[0-9a-f]{16}$`)
	words := []string{"x", "instances", "dead", "format", "rooms", "kept"}
	pairs := []string{"x:y", "presence:x:y", "room-meta:x:y"}
	return []nameKind{
		{k.Members(""), room, words}, {k.Seq(""), room, words}, {k.Users(""), room, words}, {k.Recount(""), room, words}, {k.RoomMeta(""), room, words}, {k.EventsPrefix(), room, words},
		{strings.TrimSuffix(k.Conn("", ""), ":"), roomConn, pairs}, {strings.TrimSuffix(k.State("", ""), ":"), roomConn, pairs},
		{k.ConnMeta(""), conn, words}, {k.Owned(0, ""), random, []string{inc}}, {k.Fence(0, ""), random, []string{inc}},
		{k.ServerChannel(""), random, []string{inc}}, {k.Prefix + "canary:", digits, []string{"0123456789abcdef"}},
		{k.Rooms(0), none, []string{""}}, {k.Kept(0), none, []string{""}}, {k.Instances(), none, []string{""}}, {k.Dead(), none, []string{""}}, {k.Format(), none, []string{""}},
		{k.OtherServerKeys()[0], none, []string{""}}, {k.OtherServerKeys()[1], none, []string{""}},
	}
}

// TestPrefixesNeverMeet checks that two allowed prefixes have no name of a key or
// channel in common, even if one prefix begins with the other.
func TestPrefixesNeverMeet(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("tries thousands of prefixes")
	}
	tried := 0
	for _, prefix := range []string{"mesh:", "a", "app1", "a:presence:"} {
		for _, db := range []int{0, 1, 10} {
			short := Space{Prefix: prefix, DB: db, Spread: 1}
			for _, more := range continuations(short) {
				if ValidatePrefix(prefix+more) != nil {
					continue
				}
				for _, otherDB := range []int{0, 1, 10} {
					tried++
					long := Space{Prefix: prefix + more, DB: otherDB, Spread: 1}
					require.Empty(t, common(short, long), "%q and %q, databases %d and %d", short.Prefix, long.Prefix, db, otherDB)
				}
			}
		}
	}
	require.Greater(t, tried, 2000)
	// Without the rule about layoutWords, two prefixes could have a name in common.
	require.NotEmpty(t, common(plainKeys, Space{Prefix: "mesh:room-meta:", Spread: 1}))
	for _, word := range layoutWords {
		require.ErrorIs(t, ValidatePrefix("mesh:"+word), errs.InvalidOptions)
	}
}

// continuations returns texts that extend a prefix to the beginning of a name.
func continuations(k Space) []string {
	list := []string{"b", "0", "1", "10", "@", "@0", "@0:", "1:"}
	for _, kind := range kindsOf(k) {
		ends := []string{""}
		if !kind.isRandom() { // no prefix contains random ends
			ends = append(ends, kind.examples...)
		}
		for _, end := range ends {
			name := strings.TrimPrefix(kind.begin+end, k.Prefix)
			for i := 1; i <= len(name); i++ {
				list = append(list, name[:i])
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// common returns the names that both Spaces have.
func common(a, b Space) []string {
	var list []string
	for _, pair := range [][2][]nameKind{{kindsOf(a), kindsOf(b)}, {kindsOf(b), kindsOf(a)}} {
		for _, theirs := range pair[0] {
			for _, end := range theirs.examples {
				if slices.ContainsFunc(pair[1], func(ours nameKind) bool { return ours.has(theirs.begin + end) }) {
					list = append(list, theirs.begin+end)
				}
			}
		}
	}
	return list
}
