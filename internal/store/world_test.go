package store

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// world is one Redis with a store on it.
type world struct {
	*testing.T
	*Store
	rdb  *redis.Client     // a second client
	mem  *meshtest.Redis   // the embedded Redis, or nil
	real *redistest.Server // the Redis server process, or nil

	numbers map[string]uint64 // of the last batch, by incarnation
	sub     *redis.PubSub
}

// everywhere runs a test on the embedded Redis, in virtual time, and on a real one. In
// virtual time no call is late because the machine is busy.
func everywhere(t *testing.T, f func(w *world)) {
	t.Helper()
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) { f(newWorld(t, nil)) })
	})
	t.Run("redis", func(t *testing.T) {
		t.Parallel()
		f(newWorld(t, redistest.Start(t)))
	})
}

func newWorld(t *testing.T, server *redistest.Server) *world {
	t.Helper()
	w := &world{T: t, real: server, numbers: make(map[string]uint64)}
	var client *redis.Client
	if server != nil {
		client, w.rdb = server.Client(t), server.Client(t)
	} else {
		w.mem = meshtest.StartRedis(t)
		client, w.rdb = w.mem.Client(), w.mem.Client()
	}
	w.Store = New(client, testKeys{buckets: 1})
	return w
}

// commit runs ops as the next batch of an incarnation.
func (w *world) commit(inc string, ops ...Op) []OpResult {
	w.Helper()
	w.numbers[inc]++
	res, err := w.Store.Commit(w.Context(), 0, inc, w.numbers[inc], 0, ops)
	require.NoError(w, err)
	require.Len(w, res, len(ops))
	return res
}

// again sends ops under the number of the last batch.
func (w *world) again(inc string, ops ...Op) ([]OpResult, error) {
	return w.Store.Commit(w.Context(), 0, inc, w.numbers[inc], 0, ops)
}

// ok commits ops that all have to succeed, at most MaxOps per call, so that each call
// is in time on a busy machine too.
func (w *world) ok(inc string, ops ...Op) []OpResult {
	w.Helper()
	var res []OpResult
	for part := range slices.Chunk(ops, MaxOps) {
		res = append(res, w.commit(inc, part...)...)
	}
	for i, r := range res {
		require.NoError(w, r.Err)
		require.Equal(w, string(Done), string(r.Status), "op %d", i)
	}
	return res
}

// listen subscribes to the events of all rooms and to the server channels.
func (w *world) listen() {
	w.Helper()
	w.sub = w.rdb.PSubscribe(w.Context(), w.keys.EventsPrefix()+"*", w.keys.ServerChannel("")+"*", "end")
	w.Cleanup(func() { _ = w.sub.Close() })
	for range 3 {
		_, err := w.sub.Receive(w.Context())
		require.NoError(w, err)
	}
}

// message is one published message.
type message struct{ channel, payload string }

// heard returns the messages since the last call.
func (w *world) heard() []message {
	w.Helper()
	require.NoError(w, w.rdb.Publish(w.Context(), "end", "").Err())
	var list []message
	for {
		m, err := w.sub.ReceiveMessage(w.Context())
		require.NoError(w, err)
		if m.Channel == "end" {
			return list
		}
		list = append(list, message{m.Channel, m.Payload})
	}
}

// event is an event with its room.
type event struct {
	Room string
	Event
}

// events returns the events since the last call.
func (w *world) events() []event {
	w.Helper()
	var list []event
	for _, m := range w.heard() {
		room, ok := strings.CutPrefix(m.channel, w.keys.EventsPrefix())
		if !ok {
			continue
		}
		e, err := DecodeEvent(m.payload)
		require.NoError(w, err, "%q", m.payload)
		list = append(list, event{room, e})
	}
	return list
}

// kinds returns the types of events as text.
func kinds(events []event) string {
	var b strings.Builder
	for _, e := range events {
		b.WriteByte(byte(e.Type))
	}
	return b.String()
}

// record reads an entry that must exist.
func (w *world) record(room, conn string) Record {
	w.Helper()
	r, ok, err := w.Store.Record(w.Context(), room, conn)
	require.NoError(w, err)
	require.True(w, ok, "no record of %s in %s", conn, room)
	return r
}

func (w *world) absent(room, conn string) {
	w.Helper()
	_, ok, err := w.Store.Record(w.Context(), room, conn)
	require.NoError(w, err)
	require.False(w, ok, "a record of %s in %s", conn, room)
}

func (w *world) position(room string) Position {
	w.Helper()
	p, err := w.Positions(w.Context(), []string{room})
	require.NoError(w, err)
	return p[0]
}

// owned lists the index of an incarnation.
func (w *world) owned(inc string) []EntryRef {
	w.Helper()
	var all []EntryRef
	for cursor := uint64(0); ; {
		refs, next, err := w.OwnedPage(w.Context(), 0, inc, cursor)
		require.NoError(w, err)
		for _, r := range refs {
			if !slices.Contains(all, r) {
				all = append(all, r)
			}
		}
		if cursor = next; cursor == 0 {
			break
		}
	}
	slices.SortFunc(all, func(a, b EntryRef) int {
		return strings.Compare(fmt.Sprint(a), fmt.Sprint(b))
	})
	return all
}

func (w *world) rooms() []string {
	w.Helper()
	var all []string
	require.NoError(w, w.Rooms(w.Context(), func(room string) bool {
		all = append(all, room)
		return true
	}))
	slices.Sort(all)
	return slices.Compact(all)
}

func (w *world) owners(room string) map[string]string {
	w.Helper()
	at, err := w.rdb.Get(w.Context(), w.keys.Seq(room)).Result()
	if errors.Is(err, redis.Nil) {
		at, err = "none 0 -", nil
	}
	require.NoError(w, err)
	owners := make(map[string]string)
	counts, _, ok := decodeCounts(at)
	require.True(w, ok, at)
	for _, c := range counts {
		if c.incarnation != NoOwner {
			owners[c.incarnation] = c.entries
		}
	}
	names, err := w.OwnersIn(w.Context(), room)
	require.NoError(w, err)
	require.Len(w, names, len(owners))
	return owners
}

// pttl returns the life of a key. 0 means that it does not exist, -1 that it has no
// end.
func (w *world) pttl(key string) time.Duration {
	w.Helper()
	d, err := w.rdb.PTTL(w.Context(), key).Result()
	require.NoError(w, err)
	switch d {
	case -2:
		return 0
	case -1:
		return -1
	}
	return max(d, 1)
}

// expectTTL asserts the remaining life of a key, with a tolerance for slow machines.
func (w *world) expectTTL(d time.Duration, key string) {
	w.Helper()
	got := w.pttl(key)
	require.LessOrEqual(w, got, d, key)
	require.Greater(w, got, d-5*time.Second, key)
	require.Positive(w, got, key)
}

// dump returns every key with its value, without TTLs.
func (w *world) dump() map[string]string {
	w.Helper()
	out := make(map[string]string)
	keys, err := w.rdb.Keys(w.Context(), "*").Result()
	require.NoError(w, err)
	for _, key := range keys {
		kind, err := w.rdb.Type(w.Context(), key).Result()
		require.NoError(w, err)
		var v any
		switch kind {
		case "string":
			v, err = w.rdb.Get(w.Context(), key).Result()
		case "hash":
			v, err = w.rdb.HGetAll(w.Context(), key).Result()
		case "set":
			v, err = w.rdb.SMembersMap(w.Context(), key).Result()
		case "zset":
			v, err = w.rdb.ZRangeWithScores(w.Context(), key, 0, -1).Result()
		}
		require.NoError(w, err)
		out[key] = fmt.Sprint(v) // maps print sorted
	}
	return out
}

// permanent returns the keys without a TTL.
func (w *world) permanent() []string {
	w.Helper()
	var list []string
	for key := range w.dump() {
		if w.pttl(key) == -1 {
			list = append(list, key)
		}
	}
	slices.Sort(list)
	return list
}

// waitExpired waits until a key has expired.
func (w *world) waitExpired(key string) {
	w.Helper()
	require.Eventually(w, func() bool { return w.pttl(key) == 0 }, 2*time.Minute, 2*time.Millisecond, key)
}

// clockProof returns a valid clock proof.
func (w *world) clockProof() ClockProof {
	w.Helper()
	now, err := w.rdb.Time(w.Context()).Result()
	require.NoError(w, err)
	return ClockProof{Now: now.UnixMilli(), Tolerance: 5 * time.Second}
}

// whileDead calls f while an incarnation is fenced, and then restores its fence.
func (w *world) whileDead(inc string, f func()) {
	w.Helper()
	key := w.keys.Fence(0, inc)
	number, err := w.rdb.Get(w.Context(), key).Result()
	if !errors.Is(err, redis.Nil) {
		require.NoError(w, err)
	}
	require.NoError(w, w.rdb.Set(w.Context(), key, "dead", 24*time.Hour).Err())
	f()
	if number == "" {
		require.NoError(w, w.rdb.Del(w.Context(), key).Err())
		return
	}
	require.NoError(w, w.rdb.Set(w.Context(), key, number, 24*time.Hour).Err())
}

func (w *world) cleanUp(items ...CleanUpItem) string {
	w.Helper()
	list, err := w.CleanUp(w.Context(), w.clockProof(), items)
	require.NoError(w, err)
	return statuses(list)
}

func statuses(list []CleanUpStatus) string {
	var b strings.Builder
	for _, s := range list {
		b.WriteByte(byte(s))
	}
	return b.String()
}

func join(room, conn, entry string) Op {
	return Op{Kind: OpJoin, Room: room, Conn: conn, Entry: entry}
}

func joinTTL(room, conn, entry string, ttl time.Duration) Op {
	return Op{Kind: OpJoin, Room: room, Conn: conn, Entry: entry, TTL: ttl, Left: ttl + time.Second}
}

func leave(room, conn, entry string) Op {
	return Op{Kind: OpLeave, Room: room, Conn: conn, Entry: entry, Cause: CauseLeft}
}
