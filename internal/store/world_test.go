package store

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// testKeys are names like those of the library. A bucket of a room is its
// length's, so that a test can choose.
type testKeys struct{ buckets int }

func (k testKeys) Buckets() int               { return k.buckets }
func (k testKeys) RoomBucket(room string) int { return len(room) % k.buckets }
func (k testKeys) ConnBucket(conn string) int { return len(conn) % k.buckets }

func (k testKeys) Members(room string) string    { return "t:presence:members:" + room }
func (k testKeys) Conn(room, conn string) string { return "t:presence:conn:" + room + ":" + conn }
func (k testKeys) State(room, conn string) string {
	return "t:presence:state:" + room + ":" + conn
}
func (k testKeys) Seq(room string) string      { return "t:presence:seq:" + room }
func (k testKeys) RoomMeta(room string) string { return "t:room-meta:" + room }
func (k testKeys) ConnMeta(conn string) string { return "t:connection-meta:" + conn }
func (k testKeys) Owned(bucket int, inc string) string {
	return "t:" + strconv.Itoa(bucket) + ":presence:owned:" + inc
}
func (k testKeys) Fence(bucket int, inc string) string {
	return "t:" + strconv.Itoa(bucket) + ":fence:" + inc
}
func (k testKeys) Rooms(bucket int) string   { return "t:" + strconv.Itoa(bucket) + ":presence:rooms" }
func (k testKeys) Instances() string         { return "t:instances" }
func (k testKeys) Dead() string              { return "t:dead" }
func (k testKeys) Format() string            { return "t:format" }
func (k testKeys) OtherFormat() string       { return "t:{0}:format" }
func (k testKeys) Canary() string            { return "t:canary" }
func (k testKeys) Clustered() bool           { return k.buckets > 1 }
func (k testKeys) Foreign() []string         { return []string{"t:theirs"} }
func (k testKeys) EventsPrefix() string      { return "t:0:presence:events:" }
func (k testKeys) Control(inc string) string { return "t:0:server:" + inc }

// world is one Redis and a store on it.
type world struct {
	*testing.T
	*Store
	rdb  *redis.Client     // beside the store's
	mem  *meshtest.Redis   // in this process, or
	real *redistest.Server // a process of its own

	numbers map[string]uint64 // of the last batch, by incarnation
	sub     *redis.PubSub
}

// everywhere runs a test on the Redis of meshtest, in virtual time, and on a
// real one. In virtual time no call is late because the machine is busy.
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

// again runs ops under the number of the last batch.
func (w *world) again(inc string, ops ...Op) ([]OpResult, error) {
	return w.Store.Commit(w.Context(), 0, inc, w.numbers[inc], 0, ops)
}

// ok is commit of ops that all have to succeed, no more at once than a call may
// carry: on a busy machine too each has to be done in time.
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

// listen begins to listen to the events of all rooms and to control channels.
func (w *world) listen() {
	w.Helper()
	w.sub = w.rdb.PSubscribe(w.Context(), w.keys.EventsPrefix()+"*", w.keys.Control("")+"*", "end")
	w.Cleanup(func() { _ = w.sub.Close() })
	for range 3 {
		_, err := w.sub.Receive(w.Context())
		require.NoError(w, err)
	}
}

// message is one message that was published.
type message struct{ channel, payload string }

// heard returns what was published since the last time.
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

// event is an event and the room it was told in.
type event struct {
	Room string
	Event
}

// events returns the events that were published since the last time.
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

// kinds says in short what events there were.
func kinds(events []event) string {
	var b strings.Builder
	for _, e := range events {
		b.WriteByte(byte(e.Type))
	}
	return b.String()
}

// record reads an entry that has to be there.
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
func (w *world) owned(inc string) []OwnedRef {
	w.Helper()
	var all []OwnedRef
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
	slices.SortFunc(all, func(a, b OwnedRef) int {
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

func (w *world) homes(room string) map[string]string {
	w.Helper()
	at, err := w.rdb.Get(w.Context(), w.keys.Seq(room)).Result()
	if errors.Is(err, redis.Nil) {
		at, err = "none 0 -", nil
	}
	require.NoError(w, err)
	homes := make(map[string]string)
	for pair := range slices.Chunk(strings.Fields(at)[3:], 2) {
		homes[pair[0]] = pair[1]
	}
	names, err := w.Homes(w.Context(), room)
	require.NoError(w, err)
	require.Len(w, names, len(homes))
	return homes
}

// pttl returns the life of a key; 0: there is none, negative: it has no end.
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

// lives asserts how long a key has to live, give or take what a slow machine
// has used up.
func (w *world) lives(d time.Duration, key string) {
	w.Helper()
	got := w.pttl(key)
	require.LessOrEqual(w, got, d, key)
	require.Greater(w, got, d-5*time.Second, key)
	require.Positive(w, got, key)
}

// dump returns every key with what it holds, without lives.
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

// eternal returns the keys without an end.
func (w *world) eternal() []string {
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

// gone waits until a key has run out.
func (w *world) gone(key string) {
	w.Helper()
	require.Eventually(w, func() bool { return w.pttl(key) == 0 }, 10*time.Second, 2*time.Millisecond, key)
}

// judgment is right about Redis's clock.
func (w *world) judgment() Judgment {
	w.Helper()
	now, err := w.rdb.Time(w.Context()).Result()
	require.NoError(w, err)
	return Judgment{Now: now.UnixMilli(), Tolerance: 5 * time.Second}
}

func (w *world) reap(items ...ReapItem) string {
	w.Helper()
	list, err := w.Reap(w.Context(), w.judgment(), items)
	require.NoError(w, err)
	return statuses(list)
}

func statuses(list []ReapStatus) string {
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
