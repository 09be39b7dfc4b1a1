package attack

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// storms use what is allowed, as fast as it goes.
var storms = []attack{
	{"a thousand rooms", harness.ChildConfig{Limits: unlimited}, perEnemy + spare, thousandRooms},
	{"states as large and as many as may be", harness.ChildConfig{}, 8*perEnemy + spare, largeStates},
	{"metadata in a hundred rooms", harness.ChildConfig{Metadata: true}, metadataEnemies*perEnemy + spare, metadataStorm},
	{"subscribing and not", harness.ChildConfig{Limits: unlimited}, perEnemy + spare, subscribeStorm},
	{"subscribing to ever new rooms", harness.ChildConfig{Limits: unlimited}, perEnemy + spare, mirrorChurn},
	{"visiting ever new rooms", harness.ChildConfig{Limits: unlimited}, perEnemy + spare, passingVisits},
	{"joining and leaving", harness.ChildConfig{Limits: unlimited}, perEnemy + spare, joinStorm},
}

const metadataEnemies = 8

const stormFor = 3 * time.Second

// rally sends requests in pairs, each when the pair before it was answered,
// for a while. It returns how many were answered, by code.
func (e *enemy) rally(d time.Duration, pair func(i int) (first, second string)) map[string]int {
	e.t.Helper()
	codes := map[string]int{}
	for i, end := 0, time.Now().Add(d); time.Now().Before(end); i++ {
		first, second := pair(i)
		for _, body := range []string{first, second} {
			require.NoError(e.t, e.text(`{"id":1,`+body+`}`))
		}
		for range 2 {
			answer, err := e.until(`{"id":1,`)
			require.NoError(e.t, err)
			codes[codeIn(answer)]++
		}
	}
	return codes
}

func body(command, room, more string) string {
	return fmt.Sprintf(`"command":"mesh/%s","payload":{"roomName":%q%s}`, command, room, more)
}

// thousandRooms: a hundred are allowed, then ELIMIT.
func thousandRooms(t *testing.T, f *fort) {
	e := dialEnemy(t, f.Addr)
	codes := map[string]int{}
	for i := range 1000 {
		for _, command := range []string{"mesh/join-room", "mesh/subscribe-presence"} {
			codes[command+codeIn(e.call(command, fmt.Sprintf(`{"roomName":"room%d"}`, i)))]++
		}
	}
	assert.Equal(t, map[string]int{
		"mesh/join-room": 100, "mesh/join-roomELIMIT": 900, "mesh/subscribe-presence": 100, "mesh/subscribe-presenceELIMIT": 900,
	}, codes)
	g := f.gauge()
	assert.Equal(t, 101, g.Stats.Entries)
	assert.Equal(t, 101, g.Stats.Watched)
	e.gone()
}

// largeStates: four publish the largest states that there may be, as often as
// they may, in the room where the neighbours are.
func largeStates(t *testing.T, f *fort) {
	const n = 4
	f.each(n, func(int) error {
		e, _, err := tryEnemy(t, f.Addr)
		if err != nil {
			return err
		}
		if err := e.text(`{"id":1,` + body("join-room", home, "") + `}`); err != nil {
			return err
		}
		ended := e.listen()
		state := `,"state":{"x":"` + strings.Repeat("x", 8<<10-8) + `"}`
		e.flood(100, stormFor, func(i int) string { return fmt.Sprintf(`{"id":%d,%s}`, i, body("publish-presence-state", home, state)) })
		e.bye()
		r := <-ended
		if r.codes[""] == 0 || len(r.codes) > 1 {
			return fmt.Errorf("answered with %v", r.codes)
		}
		return wantCode(r, websocket.CloseNormalClosure)
	})
}

// metadataStorm: each change rewrites an entry per room, with the metadata in
// it: one command, a megabyte and a half for Redis.
func metadataStorm(t *testing.T, f *fort) {
	metadata := strings.Repeat("x", 16<<10-16)
	f.each(metadataEnemies, func(n int) error {
		e, _, err := tryEnemy(t, f.Addr)
		if err != nil {
			return err
		}
		for i := range 100 {
			if err := e.text(fmt.Sprintf(`{"id":1,%s}`, body("join-room", fmt.Sprintf("room%d-%d", n, i), ""))); err != nil {
				return err
			}
			if _, err := e.until(`{"id":1,`); err != nil {
				return err
			}
		}
		ended := e.listen()
		e.flood(20, stormFor, func(i int) string {
			return fmt.Sprintf(`{"id":%d,"command":"mesh/set-my-connection-metadata","payload":{"metadata":"%08d%s"}}`, i, i, metadata)
		})
		e.bye()
		r := <-ended
		if r.codes[""] == 0 {
			return fmt.Errorf("answers %v", r.codes)
		}
		return wantCode(r, websocket.CloseNormalClosure)
	})
}

// subscribeStorm: a room that is mirrored already costs Redis nothing.
func subscribeStorm(t *testing.T, f *fort) {
	before := f.gauge().Stats
	e := dialEnemy(t, f.Addr)
	codes := e.rally(stormFor, func(int) (string, string) {
		return body("subscribe-presence", "stormy", ""), body("unsubscribe-presence", "stormy", "")
	})
	after := f.gauge().Stats
	t.Logf("%d answers, %d Redis calls, %d snapshots", codes[""], after.RedisCalls-before.RedisCalls, harness.Reads(after)-harness.Reads(before))
	assert.Len(t, codes, 1, "%v", codes)
	assert.LessOrEqual(t, harness.Reads(after)-harness.Reads(before), uint64(3), "it is read once, not each time")
	e.gone()
}

// mirrorChurn: each room is mirrored anew, and let go a little after.
func mirrorChurn(t *testing.T, f *fort) {
	before := f.gauge().Stats
	e, begun := dialEnemy(t, f.Addr), time.Now()
	ended := e.listen()
	sent := e.flood(300, stormFor, func(i int) string {
		command := []string{"subscribe-presence", "unsubscribe-presence"}[i%2]
		return fmt.Sprintf(`{"id":%d,%s}`, i, body(command, fmt.Sprintf("new%d", i/2), ""))
	})
	f.within(patience, func() bool { return e.answered.Load() == int64(sent) }, "all are answered")
	after := f.gauge().Stats
	e.bye()
	r := <-ended
	t.Logf("%d commands, answers %v, %d watched, %d snapshots, %d Redis calls", sent, r.codes, after.Watched,
		harness.Reads(after)-harness.Reads(before), after.RedisCalls-before.RedisCalls)
	most := mostNew(begun)
	assert.Positive(t, r.codes["ELIMIT"])
	assert.LessOrEqual(t, after.Watched, before.Watched+most)
	assert.LessOrEqual(t, harness.Reads(after)-harness.Reads(before), uint64(most))
	require.NoError(t, wantCode(r, websocket.CloseNormalClosure))
}

// mostNew is the number of new rooms that a connection may have begun to use.
func mostNew(since time.Time) int { return 300 * (1 + int(time.Since(since)/time.Minute)) }

// passingVisits: each room is joined and left. Redis remembers no more of them
// than the limit of new rooms lets in, and not for long.
func passingVisits(t *testing.T, f *fort) {
	e, begun := dialEnemy(t, f.Addr), time.Now()
	ended := e.listen()
	sent := e.flood(300, stormFor, func(i int) string {
		command := []string{"join-room", "leave-room"}[i%2]
		return fmt.Sprintf(`{"id":%d,%s}`, i, body(command, fmt.Sprintf("passing%d", i/2), ""))
	})
	f.within(patience, func() bool { return e.answered.Load() == int64(sent) }, "all are answered")
	keys, err := f.redis.Keys(t.Context(), "mesh:presence:seq:passing*").Result()
	require.NoError(t, err)
	assert.NotEmpty(t, keys)
	assert.LessOrEqual(t, len(keys), mostNew(begun))
	for _, key := range keys {
		left, err := f.redis.PTTL(t.Context(), key).Result()
		require.NoError(t, err)
		assert.LessOrEqual(t, left, 15*time.Second, key)
	}
	e.bye()
	r := <-ended
	assert.Positive(t, r.codes["ELIMIT"], "%v", r.codes)
	require.NoError(t, wantCode(r, websocket.CloseNormalClosure))
}

// joinStorm: the neighbours' room sees every single one, and Redis one call
// for one change at most.
func joinStorm(t *testing.T, f *fort) {
	before := f.gauge().Stats
	e := dialEnemy(t, f.Addr)
	codes := e.rally(stormFor, func(int) (string, string) {
		return body("join-room", home, ""), body("leave-room", home, "")
	})
	after := f.gauge().Stats
	t.Logf("%d answers, %d changes in %d batches", codes[""], after.Changes-before.Changes, after.Batches-before.Batches)
	assert.Len(t, codes, 1, "%v", codes)
	assert.LessOrEqual(t, after.Batches-before.Batches, after.Changes-before.Changes)
	e.gone()
}
