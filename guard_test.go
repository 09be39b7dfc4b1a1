package mesh

import (
	"regexp"
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

func TestRefusedRules(t *testing.T) {
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
		n := &core{}
		before := n.access.rules.Match("a")
		err := n.trackPresence(tc.p, tc.o)
		require.ErrorIs(t, err, tc.is, name)
		assert.ErrorContains(t, err, tc.says, name)
		assert.False(t, n.access.rules.Match("a").Tracked, name)
		assert.Equal(t, before, n.access.rules.Match("a"), "a refused rule changes nothing")
	}
	n := &core{}
	for _, p := range []Pattern{{}, Exact(""), Regexp(nil)} {
		assert.False(t, n.untrackPresence(p), "%v", p)
	}
}
