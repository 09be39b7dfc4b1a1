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

// storms use allowed requests, as fast as possible.
var storms = []attack{
	{"a thousand rooms", harness.ChildConfig{Limits: unlimited}, perAttacker + spare, thousandRooms},
	{"the largest states at the highest rate", harness.ChildConfig{}, 8*perAttacker + spare, largeStates},
	{"metadata in a hundred rooms", harness.ChildConfig{Metadata: true}, metadataAttackers*perAttacker + spare, metadataStorm},
	{"subscribing and unsubscribing", harness.ChildConfig{Limits: unlimited}, perAttacker + spare, subscribeStorm},
	{"subscribing to new rooms", harness.ChildConfig{Limits: unlimited}, perAttacker + spare, mirrorChurn},
	{"visiting new rooms", harness.ChildConfig{Limits: unlimited}, perAttacker + spare, passingVisits},
	{"joining and leaving", harness.ChildConfig{Limits: unlimited}, perAttacker + spare, joinStorm},
}

const metadataAttackers = 8

const stormFor = 3 * time.Second

// exchange sends pairs of requests for a while, each after the answers to the pair
// before. It returns the number of answers by code.
func (e *attacker) exchange(d time.Duration, pair func(i int) (first, second string)) map[string]int {
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

// thousandRooms checks that a hundred rooms are allowed, and others get ELIMIT.
func thousandRooms(t *testing.T, f *target) {
	e := dialAttacker(t, f.Addr)
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
	e.drop()
}

// largeStates makes four clients publish the largest allowed states in the room of the
// neighbours, at the highest allowed rate.
func largeStates(t *testing.T, f *target) {
	const n = 4
	f.each(n, func(int) error {
		e, _, err := tryDial(t, f.Addr)
		if err != nil {
			return err
		}
		if err := e.text(`{"id":1,` + body("join-room", home, "") + `}`); err != nil {
			return err
		}
		ended := e.listen()
		state := `,"state":{"x":"` + strings.Repeat("x", 8<<10-8) + `"}`
		e.flood(100, stormFor, func(i int) string { return fmt.Sprintf(`{"id":%d,%s}`, i, body("publish-presence-state", home, state)) })
		e.closeNormally()
		r := <-ended
		if r.codes[""] == 0 || len(r.codes) > 1 {
			return fmt.Errorf("answers %v", r.codes)
		}
		return wantCode(r, websocket.CloseNormalClosure)
	})
}

// metadataStorm changes metadata. One command rewrites an entry per room, together a
// megabyte and a half for Redis.
func metadataStorm(t *testing.T, f *target) {
	metadata := strings.Repeat("x", 16<<10-16)
	f.each(metadataAttackers, func(n int) error {
		e, _, err := tryDial(t, f.Addr)
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
		e.closeNormally()
		r := <-ended
		if r.codes[""] == 0 {
			return fmt.Errorf("answers %v", r.codes)
		}
		return wantCode(r, websocket.CloseNormalClosure)
	})
}

// subscribeStorm checks that a subscription to a room with a mirror makes no call to
// Redis.
func subscribeStorm(t *testing.T, f *target) {
	before := f.gauge().Stats
	e := dialAttacker(t, f.Addr)
	codes := e.exchange(stormFor, func(int) (string, string) {
		return body("subscribe-presence", "stormy", ""), body("unsubscribe-presence", "stormy", "")
	})
	after := f.gauge().Stats
	t.Logf("%d answers, %d Redis calls, %d snapshots", codes[""], after.RedisCalls-before.RedisCalls, harness.Reads(after)-harness.Reads(before))
	assert.Len(t, codes, 1, "%v", codes)
	assert.LessOrEqual(t, harness.Reads(after)-harness.Reads(before), uint64(3), "the room is read for each subscription")
	e.drop()
}

// mirrorChurn subscribes to new rooms, so that each gets a mirror, which is dropped
// soon after.
func mirrorChurn(t *testing.T, f *target) {
	before := f.gauge().Stats
	e, begun := dialAttacker(t, f.Addr), time.Now()
	ended := e.listen()
	sent := e.flood(300, stormFor, func(i int) string {
		command := []string{"subscribe-presence", "unsubscribe-presence"}[i%2]
		return fmt.Sprintf(`{"id":%d,%s}`, i, body(command, fmt.Sprintf("new%d", i/2), ""))
	})
	f.within(timeLimit, func() bool { return e.answered.Load() == int64(sent) }, "all commands are answered")
	after := f.gauge().Stats
	e.closeNormally()
	r := <-ended
	t.Logf("%d commands, answers %v, %d watched, %d snapshots, %d Redis calls", sent, r.codes, after.Watched,
		harness.Reads(after)-harness.Reads(before), after.RedisCalls-before.RedisCalls)
	most := mostNew(begun)
	assert.Positive(t, r.codes["ELIMIT"])
	assert.LessOrEqual(t, after.Watched, before.Watched+most)
	assert.LessOrEqual(t, harness.Reads(after)-harness.Reads(before), uint64(most))
	require.NoError(t, wantCode(r, websocket.CloseNormalClosure))
}

// mostNew is the number of new rooms that a connection may have used.
func mostNew(since time.Time) int { return 300 * (1 + int(time.Since(since)/time.Minute)) }

// passingVisits joins and leaves new rooms. Redis keeps no more of them than the limit
// of new rooms allows, and only for a short time.
func passingVisits(t *testing.T, f *target) {
	e, begun := dialAttacker(t, f.Addr), time.Now()
	ended := e.listen()
	sent := e.flood(300, stormFor, func(i int) string {
		command := []string{"join-room", "leave-room"}[i%2]
		return fmt.Sprintf(`{"id":%d,%s}`, i, body(command, fmt.Sprintf("passing%d", i/2), ""))
	})
	f.within(timeLimit, func() bool { return e.answered.Load() == int64(sent) }, "all commands are answered")
	keys, err := f.redis.Keys(t.Context(), "mesh:presence:seq:passing*").Result()
	require.NoError(t, err)
	assert.NotEmpty(t, keys)
	assert.LessOrEqual(t, len(keys), mostNew(begun))
	for _, key := range keys {
		left, err := f.redis.PTTL(t.Context(), key).Result()
		require.NoError(t, err)
		assert.LessOrEqual(t, left, 15*time.Second, key)
	}
	e.closeNormally()
	r := <-ended
	assert.Positive(t, r.codes["ELIMIT"], "%v", r.codes)
	require.NoError(t, wantCode(r, websocket.CloseNormalClosure))
}

// joinStorm joins and leaves the room of the neighbours. Each change is reported there,
// and Redis gets at most one call per change.
func joinStorm(t *testing.T, f *target) {
	before := f.gauge().Stats
	e := dialAttacker(t, f.Addr)
	codes := e.exchange(stormFor, func(int) (string, string) {
		return body("join-room", home, ""), body("leave-room", home, "")
	})
	after := f.gauge().Stats
	t.Logf("%d answers, %d changes in %d batches", codes[""], after.Changes-before.Changes, after.Batches-before.Batches)
	assert.Len(t, codes, 1, "%v", codes)
	assert.LessOrEqual(t, after.Batches-before.Batches, after.Changes-before.Changes)
	e.drop()
}
