package meshdebug

import (
	"encoding/json"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// lags is a histogram with only the methods that the page uses.
type lags uint64

func (l lags) Count() uint64 { return uint64(l) }
func (l lags) Quantile(q float64) time.Duration {
	return time.Duration(q * float64(100*time.Millisecond))
}

func TestFigures(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		field string
		value any
		want  figure
	}{
		{"LeftAsked", uint64(0), figure{Name: "Left asked", Value: "0", Zero: true}},
		{"RedisCalls", uint64(1234567), figure{Name: "Redis calls", Value: "1\u202f234\u202f567"}},
		{"GuardsHanging", int64(-12345), figure{Name: "Guards hanging", Value: "−12\u202f345"}},
		{"LeaseAge", 2345 * time.Millisecond, figure{Name: "Lease age", Value: "2.3 s"}},
		{"LeaseAge", time.Duration(-1), figure{Name: "Lease age", Value: "never"}},
		{"ExpiredEventsWorking", true, figure{Name: "Expired events working", Value: "yes"}},
		{"CanDeclareDead", false, figure{Name: "Can declare dead", Value: "no"}},
		{"Closed", map[string]int64{}, figure{Name: "Closed", Value: "0", Zero: true}},
		{"Closed", map[string]int64{"peer": 0, "slow": 0}, figure{Name: "Closed", Value: "0", Zero: true}},
		{"Closed", map[string]uint64{"slow": 2000, "peer": 0, "flood": 1}, figure{Name: "Closed", Parts: []figure{
			{Name: "flood", Value: "1"}, {Name: "slow", Value: "2\u202f000"},
		}}},
		{"EventLag", lags(0), figure{Name: "Event lag", Value: "none", Zero: true}},
		{"EventLag", lags(1000), figure{Name: "Event lag", Value: "median ≤ 50 ms, 99 % ≤ 99 ms", Parts: []figure{{Name: "of", Value: "1\u202f000"}}}},
		{"Ratio", .5, figure{Name: "Ratio", Value: "0.5"}},
	} {
		assert.Equal(t, c.want, stat{c.field, c.value}.figure(), "%s %v", c.field, c.value)
	}
}

// The page and the JSON show every field of mesh.Stats, including fields that are added
// later.
func TestEveryFieldIsShown(t *testing.T) {
	t.Parallel()
	s := statsOf(mesh.Stats{})
	require.NotEmpty(t, s)
	data, err := json.Marshal(s)
	require.NoError(t, err)
	var object map[string]any
	require.NoError(t, json.Unmarshal(data, &object))
	assert.Len(t, object, len(s))
	assert.Len(t, append(s.Headline(), s.Rest()...), len(s)-1, "all but the incarnation, which is in the heading")
	assert.Len(t, s.Headline(), len(headline))
}

func TestStatsAsJSON(t *testing.T) {
	t.Parallel()
	data, err := json.Marshal(stats{
		{"LeaseAge", 1500 * time.Millisecond}, {"Other", time.Duration(-1)}, {"Closed", map[string]int64{"a": 1}}, {"Rooms", 3},
	})
	require.NoError(t, err)
	assert.JSONEq(t, `{"leaseAgeSeconds":1.5,"otherSeconds":-1,"closed":{"a":1},"rooms":3}`, string(data))
}

func TestDurations(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "0 s", 500: "0 µs", 5 * time.Microsecond: "5 µs", 999 * time.Millisecond: "999 ms", time.Second: "1.0 s",
		59_990 * time.Millisecond: "59.9 s", time.Minute: "1 min", 61 * time.Second: "1 min 1 s", time.Hour: "1 h",
		90 * time.Minute: "1 h 30 min", 47*time.Hour + time.Minute: "47 h 1 min", 50 * time.Hour: "2 days",
		-1500 * time.Millisecond: "−1.5 s", math.MaxInt64: "106751 days",
	} {
		assert.Equal(t, want, duration(d))
	}
}

func TestShortIDs(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]string{
		"": "", "0123456789": "0123456789", "0123456789A": "01234567…", "0123456ä89AB": "0123456…", "0123456789\xff": "0123456789\xff",
	} {
		assert.Equal(t, want, short(id))
	}
}

func TestShownData(t *testing.T) {
	t.Parallel()
	assert.Equal(t, shown{Line: `{"a":1}`}, dataOf(json.RawMessage(`{ "a" : 1 }`)))
	assert.Equal(t, shown{Line: "not JSON"}, dataOf(json.RawMessage("not JSON")))
	long := dataOf(json.RawMessage(`["0123456789","0123456789","0123456789","0123456789","01234567ää","ä"]`))
	assert.Equal(t, `["0123456789","0123456789","0123456789","0123456789","01234567ä…`, long.Line)
	assert.Contains(t, long.Whole, "[\n  \"0123456789\",\n")
}

func TestLeaseBar(t *testing.T) {
	t.Parallel()
	bar := func(left, age time.Duration) int {
		return server{LeaseLeft: seconds(left), LeaseAge: seconds(age)}.Left()
	}
	assert.Equal(t, 75, bar(7500*time.Millisecond, 2500*time.Millisecond))
	assert.Equal(t, 0, bar(-time.Second, 11*time.Second))
	assert.Equal(t, 0, bar(0, 0))
	assert.Equal(t, 0, bar(time.Second, -2*time.Second))
	assert.Equal(t, seconds(time.Second), server{LeaseLeft: seconds(-time.Second)}.LapsedFor())
	assert.Zero(t, server{LeaseLeft: seconds(time.Second)}.LapsedFor())
}

// A page of a large room may have no members although more follow.
func TestPageWithoutMembersLinksToTheNext(t *testing.T) {
	t.Parallel()
	for next, want := range map[string]bool{"0.64.": true, "": false} {
		p := &page{
			View: viewRoom, query: query{view: viewRoom, room: "lobby", cursor: "0.32."},
			Room: &roomPart{Name: "lobby", Epoch: "e", Total: 5000, Next: next}, Watched: new(watchedPart),
		}
		out := render(p, http.StatusOK)
		require.NoError(t, out.err)
		require.Equal(t, want, strings.Contains(out.body.String(), "?cursor=0.64.&amp;room=lobby"), out.body.String())
	}
}
