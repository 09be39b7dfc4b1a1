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

func TestInvalidRules(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		p    Pattern
		o    PresenceOptions
		err  error
		text string // in the message
	}{
		"zero pattern":      {err: ErrInvalidPattern, text: "zero Pattern"},
		"nil regexp":        {p: Regexp(nil), err: ErrInvalidPattern, text: "nil *regexp.Regexp"},
		"empty name":        {p: Exact(""), err: ErrInvalidPattern, text: "empty name"},
		"control":           {p: Exact("a\nb"), err: ErrInvalidPattern, text: "control character"},
		"not UTF-8":         {p: Exact("a\xff"), err: ErrInvalidPattern, text: "UTF-8"},
		"negative TTL":      {p: Exact("a"), o: PresenceOptions{TTL: -time.Second}, err: ErrInvalidOptions, text: "TTL is -1s"},
		"short TTL":         {p: Exact("a"), o: PresenceOptions{TTL: 999 * time.Millisecond}, err: ErrInvalidOptions, text: "TTL is 999ms"},
		"short interval":    {p: Exact("a"), o: PresenceOptions{StateInterval: 9 * time.Millisecond}, err: ErrInvalidOptions, text: "StateInterval is 9ms"},
		"long interval":     {p: Exact("a"), o: PresenceOptions{StateInterval: time.Minute + 1}, err: ErrInvalidOptions, text: "StateInterval is 1m0.000000001s"},
		"negative interval": {p: Exact("a"), o: PresenceOptions{StateInterval: -time.Second}, err: ErrInvalidOptions, text: "StateInterval is -1s"},
		"largest TTL":       {p: Exact("a"), o: PresenceOptions{TTL: 1<<63 - 1}, err: ErrInvalidOptions, text: `pattern "a"`},
		"TTL without unit":  {p: Regexp(regexp.MustCompile("a")), o: PresenceOptions{TTL: 60_000}, err: ErrInvalidOptions, text: "TTL is 60µs"},
	} {
		n := &core{}
		before := n.access.rules.Match("a")
		err := n.trackPresence(tc.p, tc.o)
		require.ErrorIs(t, err, tc.err, name)
		assert.ErrorContains(t, err, tc.text, name)
		assert.False(t, n.access.rules.Match("a").Tracked, name)
		assert.Equal(t, before, n.access.rules.Match("a"), "an invalid rule changes nothing")
	}
	n := &core{}
	for _, p := range []Pattern{{}, Exact(""), Regexp(nil)} {
		assert.False(t, n.untrackPresence(p), "%v", p)
	}
}
