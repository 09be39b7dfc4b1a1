package mesh

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	plainKeys   = keyspace{prefix: "mesh:", buckets: 1}
	clusterKeys = keyspace{prefix: "mesh:", buckets: 64, cluster: true}
)

// clusterSlot is the hash slot that a Redis cluster gives a key.
func clusterSlot(key string) int {
	if i := strings.IndexByte(key, '{'); i >= 0 {
		if j := strings.IndexByte(key[i+1:], '}'); j > 0 {
			key = key[i+1 : i+1+j]
		}
	}
	var crc uint16
	for i := range len(key) {
		crc ^= uint16(key[i]) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
	}
	return int(crc % 16384)
}

func TestKeyNames(t *testing.T) {
	t.Parallel()
	k := keyspace{prefix: "mesh:", db: 3, buckets: 1}
	for want, got := range map[string]string{
		"mesh:presence:members:lobby": k.Members("lobby"),
		"mesh:presence:conn:lobby:c1": k.Conn("lobby", "c1"),
		// The seed fixes this name.
		"mesh:presence:state:lobby:c1": k.State("lobby", "c1"),
		"mesh:presence:seq:lobby":      k.Seq("lobby"),
		"mesh:presence:owned:i1":       k.Owned(0, "i1"),
		"mesh:presence:rooms":          k.Rooms(0),
		"mesh:fence:i1":                k.Fence(0, "i1"),
		"mesh:instances":               k.Instances(),
		"mesh:dead":                    k.Dead(),
		"mesh:format":                  k.Format(),
		"mesh:connection-meta:c1":      k.ConnMeta("c1"),
		"mesh:room-meta:lobby":         k.RoomMeta("lobby"),
		"mesh:@3:presence:events:":     k.EventsPrefix(),
		"mesh:@3:server:i1":            k.Control("i1"),
		"mesh:@3:ended":                k.Ended(),
	} {
		assert.Equal(t, want, got)
	}
	assert.Equal(t, 1, keyspace{}.Buckets())
	assert.Zero(t, k.RoomBucket("lobby"))
	assert.Zero(t, k.ConnBucket("c1"))
	assert.Regexp(t, `^mesh:canary:[0-9a-f]{16}$`, k.Canary())
	assert.NotEqual(t, k.Canary(), k.Canary())
}

// The spreading is part of the layout: servers of one Redis must agree on it.
func TestKeyNamesCluster(t *testing.T) {
	t.Parallel()
	k := clusterKeys
	assert.Equal(t, []int{52, 11, 46}, []int{k.RoomBucket("lobby"), k.RoomBucket(""), k.ConnBucket("c1")})
	assert.Equal(t, "mesh:{52}:presence:members:lobby", k.Members("lobby"))
	assert.Equal(t, "mesh:{52}:presence:conn:lobby:c1", k.Conn("lobby", "c1"))
	assert.Equal(t, "mesh:{52}:presence:state:lobby:c1", k.State("lobby", "c1"))
	assert.Equal(t, "mesh:{46}:connection-meta:c1", k.ConnMeta("c1"))
	assert.Equal(t, "mesh:{5}:presence:owned:i1", k.Owned(5, "i1"))
	assert.Equal(t, "mesh:{5}:fence:i1", k.Fence(5, "i1"))
	assert.Equal(t, "mesh:{5}:presence:rooms", k.Rooms(5))
	assert.Equal(t, []string{"mesh:{0}:instances", "mesh:{0}:dead", "mesh:{0}:format"},
		[]string{k.Instances(), k.Dead(), k.Format()})
	assert.Equal(t, "mesh:@0:presence:events:", k.EventsPrefix())
}

// Buckets must spread over the masters of a cluster, and rooms over buckets.
func TestKeySpread(t *testing.T) {
	t.Parallel()
	for masters, most := range map[int]int{3: 22, 5: 14} {
		perMaster := make([]int, masters)
		for b := range clusterKeys.Buckets() {
			perMaster[clusterSlot(clusterKeys.Rooms(b))*masters/16384]++
		}
		t.Logf("%d buckets over %d masters: %v", clusterKeys.Buckets(), masters, perMaster)
		for _, n := range perMaster {
			assert.LessOrEqual(t, n, most)
			assert.GreaterOrEqual(t, n, 64/masters*3/4)
		}
	}
	const perBucket = 500
	for _, form := range []string{"room:%d", "%08d", "user-%d-inbox", "%d:☃"} {
		rooms := make([]int, clusterKeys.Buckets())
		for i := range perBucket * clusterKeys.Buckets() {
			rooms[clusterKeys.RoomBucket(fmt.Sprintf(form, i))]++
		}
		for b, n := range rooms {
			assert.InDelta(t, perBucket, n, perBucket/4, "%s in bucket %d", form, b)
		}
	}
}

func TestParseExpiredForeign(t *testing.T) {
	t.Parallel()
	for _, key := range []string{
		"", "mesh:", "mesh", "other:presence:conn:r:c", "mesh:presence:conn:", "mesh:presence:conn:r", "mesh:presence:conn:r:",
		"mesh:presence:members:r:c", "mesh:presence:seq:r:c", "mesh:presence:owned:r:c", "mesh:presence:rooms",
		"mesh:fence:i", "mesh:connection-meta:c", "mesh:canary:00", "mesh:presence:connr:c", "mesh:presence:conn:r:c d",
		"xmesh:presence:conn:r:c", "mesh:{1}:presence:conn:r:c",
	} {
		_, _, _, ok := plainKeys.parseExpired(key)
		assert.False(t, ok, key)
		_, _, _, ok = clusterKeys.parseExpired(key)
		assert.False(t, ok, key)
	}
	other := clusterKeys
	other.buckets = 32
	var foreign int
	for i := range 100 {
		if _, _, _, ok := clusterKeys.parseExpired(other.Conn(fmt.Sprint("r", i), "c")); !ok {
			foreign++
		}
	}
	assert.Positive(t, foreign, "a layout of other buckets")
	_, _, _, ok := plainKeys.parseExpired(clusterKeys.Conn("r", "c"))
	assert.False(t, ok)
}

// FuzzKeys holds two rooms and two connections against each other: whatever
// bytes are in the names, what differs has different names, and names parse
// back to what they were built from.
func FuzzKeys(f *testing.F) {
	f.Add("lobby", "c1", "lobby:conn:c1", "c2")
	f.Add("a:b", "c", "a", "b")
	f.Add("{1}", "c", "}{", "c")
	f.Add("*", "c", "\n", "c")
	f.Add("", "c", ":", "c")
	f.Add("a\xff", "☃", "a", "c\x00")
	f.Add("x}:presence:conn:y", "c", "conn:x", "c")
	f.Fuzz(func(t *testing.T, room1, conn1, room2, conn2 string) {
		// Names hold for any connection id without a colon; only valid ones
		// parse back.
		conn1, conn2 = strings.ReplaceAll(conn1, ":", ""), strings.ReplaceAll(conn2, ":", "")
		for _, k := range []keyspace{plainKeys, clusterKeys, {prefix: "app:mesh:", buckets: 3, cluster: true}} {
			one, two := namesOf(k, room1, conn1), namesOf(k, room2, conn2)
			seen := make(map[string]string)
			for what, key := range one {
				require.NotContains(t, seen, key, "%s and %s", what, seen[key])
				seen[key] = what
			}
			for what, key := range two {
				if twin, ok := seen[key]; ok {
					require.Equal(t, what, twin, key)
					require.True(t, sameSubject(what, room1, conn1, room2, conn2), "%s: %q", what, key)
				}
			}
			checkParse(t, k, room1, conn1)
			checkSlots(t, k, room1, one)
		}
	})
}

// namesOf builds every name of a room, of a connection, and of both.
func namesOf(k keyspace, room, conn string) map[string]string {
	return map[string]string{
		"room members": k.Members(room), "room seq": k.Seq(room), "room meta": k.RoomMeta(room),
		"both conn": k.Conn(room, conn), "both state": k.State(room, conn),
		"conn meta": k.ConnMeta(conn), "conn owned": k.Owned(0, conn), "conn fence": k.Fence(0, conn),
		"rooms": k.Rooms(k.RoomBucket(room)), "instances": k.Instances(), "dead": k.Dead(), "format": k.Format(),
		"room channel": k.EventsPrefix() + room, "conn channel": k.Control(conn), "ended channel": k.Ended(),
	}
}

func sameSubject(what, room1, conn1, room2, conn2 string) bool {
	switch word, _, _ := strings.Cut(what, " "); word {
	case "room":
		return room1 == room2
	case "conn":
		return conn1 == conn2
	case "both":
		return room1 == room2 && conn1 == conn2
	default:
		return true
	}
}

func checkParse(t *testing.T, k keyspace, room, conn string) {
	t.Helper()
	valid := validateConnectionID(conn) == nil
	for want, key := range map[expiryKind]string{expiredConn: k.Conn(room, conn), expiredState: k.State(room, conn)} {
		kind, r, c, ok := k.parseExpired(key)
		require.Equal(t, valid, ok, "%q", key)
		if ok {
			require.Equal(t, []string{room, conn}, []string{r, c})
			require.Equal(t, want, kind)
		}
	}
	for what, key := range namesOf(k, room, conn) {
		if _, _, _, ok := k.parseExpired(key); ok {
			require.Contains(t, what, "both ", "%q", key)
		}
	}
	if kind, r, c, ok := k.parseExpired(room); ok { // any text at all
		build := map[expiryKind]func(string, string) string{expiredConn: k.Conn, expiredState: k.State}[kind]
		require.Equal(t, room, build(r, c))
	}
}

func checkSlots(t *testing.T, k keyspace, room string, names map[string]string) {
	t.Helper()
	if !k.cluster {
		return
	}
	slot := clusterSlot(k.Owned(k.RoomBucket(room), "i"))
	for what, key := range names {
		shared := what == "rooms" || strings.HasPrefix(what, "both ") || strings.HasPrefix(what, "room ")
		if shared && !strings.HasSuffix(what, "channel") {
			require.Equal(t, slot, clusterSlot(key), "%s: %q", what, key)
		}
	}
}

func TestValidateConnectionID(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"c", "a-b_c.d~", "☃", "{x}", strings.Repeat("x", 128)} {
		assert.NoError(t, validateConnectionID(id), id)
	}
	for _, id := range []string{"", "a:b", "a b", "a\tb", "a\x00", "a\u0085", "a\u2003b", "a\xff", strings.Repeat("x", 129)} {
		assert.ErrorIs(t, validateConnectionID(id), ErrInvalidConnectionID, "%q", id)
	}
}

func TestValidateRoomName(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"lobby", "a:b", "a b", "{1}*", "lobby:conn:X", "☃", "12345678"} {
		assert.NoError(t, validateRoomName(name, 8+len(name)), name)
	}
	for _, name := range []string{"", "a\nb", "a\x7f", "\u009f", "a\xff", "123456789"} {
		assert.ErrorIs(t, validateRoomName(name, 8), ErrInvalidRoom, "%q", name)
	}
	assert.NoError(t, validateRoomName(strings.Repeat("x", 1<<16), -1), "negative: no limit")
	err := validateRoomName(strings.Repeat("☃", 1000), 8)
	assert.Less(t, len(err.Error()), 300, "an error must not repeat everything it was sent")
	assert.True(t, utf8.ValidString(err.Error()))
}

// expiryLog records what an expiryListener says and logs.
type expiryLog struct {
	*expiryListener
	mu   sync.Mutex // guards all below
	said []string
	logs []string
}

func newExpiryLog(client redis.UniversalClient, keys keyspace) *expiryLog {
	h := &expiryLog{}
	h.expiryListener = newExpiryListener(expiryConfig{
		Client: client, Keys: keys, Logger: slog.New(h),
		Hint: func(kind expiryKind, room, conn string) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.said = append(h.said, fmt.Sprintf("%c %s %s", kind, room, conn))
		},
	})
	return h
}

func (h *expiryLog) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (h *expiryLog) WithAttrs([]slog.Attr) slog.Handler           { return h }
func (h *expiryLog) WithGroup(string) slog.Handler                { return h }
func (h *expiryLog) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.String()
		return true
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.logs = append(h.logs, text)
	return nil
}

func (h *expiryLog) heard() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.said...)
}

func (h *expiryLog) logged() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.logs...)
}

func TestExpiryListenerHints(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := meshtest.StartRedis(t).Client()
		h := newExpiryLog(client, plainKeys)
		h.Start(t.Context())
		defer h.Stop()
		require.True(t, h.Working())
		for _, key := range []string{
			plainKeys.Conn("a:b", "c"), "mesh:presence:seq:a", "elsewhere", plainKeys.State("a\n", "d"),
		} {
			require.NoError(t, client.Set(t.Context(), key, "", time.Second).Err())
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		require.ElementsMatch(t, []string{"c a:b c", "s a\n d"}, h.heard())
		time.Sleep(5 * time.Minute)
		require.True(t, h.Working())
		require.Empty(t, h.logged())
	})
}

func TestExpiryListenerSilent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := meshtest.StartRedis(t, meshtest.WithConfigForbidden())
		h := newExpiryLog(s.Client(), plainKeys)
		began := time.Now()
		h.Start(t.Context())
		defer h.Stop()
		require.LessOrEqual(t, time.Since(began), expirySettleTime)
		synctest.Wait()
		require.False(t, h.Working())
		logs := h.logged()
		require.Len(t, logs, 1)
		require.Contains(t, logs[0], "notify-keyspace-events to include Ex")
		require.Contains(t, logs[0], "__keyevent@0__:expired")
		for range 5 { // neither time nor outages repeat it
			time.Sleep(2 * time.Minute)
			s.CutOnce()
		}
		require.Len(t, h.logged(), 1)
	})
}

func TestExpiryListenerAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := meshtest.StartRedis(t)
		s.Cut()
		h := newExpiryLog(s.Client(), plainKeys)
		began := time.Now()
		h.Start(t.Context())
		defer h.Stop()
		require.LessOrEqual(t, time.Since(began), expirySettleTime)
		require.False(t, h.Working())
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		h.Start(ended) // waits no longer than its context
		s.Heal()
		time.Sleep(10 * time.Second)
		require.True(t, h.Working())
		require.Empty(t, h.logged())
	})
}

func TestExpiryListenerRedis(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Args("--notify-keyspace-events", "Kg"))
	ctx := t.Context()
	client := redis.NewClient(&redis.Options{Addr: s.Addr(), DB: 2})
	defer client.Close()
	keys := keyspace{prefix: "mesh:", db: 2, buckets: 1}
	h := newExpiryLog(client, keys)
	h.Start(ctx)
	defer h.Stop()
	require.True(t, h.Working())
	require.Equal(t, "gxKE", client.ConfigGet(ctx, "notify-keyspace-events").Val()["notify-keyspace-events"])
	require.NoError(t, client.Set(ctx, keys.Conn("r", "c"), "", 20*time.Millisecond).Err())
	require.Eventually(t, func() bool {
		client.Exists(ctx, keys.Conn("r", "c"))
		return len(h.heard()) > 0
	}, 10*time.Second, 5*time.Millisecond)
	h.Stop()
	require.Equal(t, []string{"c r c"}, h.heard())
	require.Empty(t, h.logged())
}

func TestExpiryListenerForbidden(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t, redistest.Args("--rename-command", "CONFIG", "")).Client(t)
	h := newExpiryLog(client, plainKeys)
	h.Start(t.Context())
	defer h.Stop()
	require.Eventually(t, func() bool { return len(h.logged()) > 0 }, 10*time.Second, 5*time.Millisecond)
	require.False(t, h.Working())
	require.NoError(t, client.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	require.Eventually(t, func() bool { // the flag and the probe were looked at again
		n, _ := client.InfoMap(t.Context(), "commandstats").Result()
		return strings.HasPrefix(n["Commandstats"]["cmdstat_set"], "calls=2,")
	}, 10*time.Second, 5*time.Millisecond)
	h.Stop()
	require.Len(t, h.logged(), 1)
}
