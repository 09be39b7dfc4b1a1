package keys

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/store"
)

var _ store.Keys = Space{}

var (
	plainKeys   = Space{Prefix: "mesh:", Spread: 1}
	clusterKeys = Space{Prefix: "mesh:", Spread: 64, Cluster: true}
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
	k := Space{Prefix: "mesh:", DB: 3, Spread: 1}
	for want, got := range map[string]string{
		"mesh:presence:members:lobby": k.Members("lobby"),
		"mesh:presence:conn:lobby:c1": k.Conn("lobby", "c1"),
		// The seed fixes this name.
		"mesh:presence:state:lobby:c1": k.State("lobby", "c1"),
		"mesh:presence:seq:lobby":      k.Seq("lobby"),
		"mesh:presence:users:lobby":    k.Users("lobby"),
		"mesh:presence:recount:lobby":  k.Recount("lobby"),
		"mesh:presence:owned:i1":       k.Owned(0, "i1"),
		"mesh:presence:rooms":          k.Rooms(0),
		"mesh:presence:kept":           k.Kept(0),
		"mesh:fence:i1":                k.Fence(0, "i1"),
		"mesh:instances":               k.Instances(),
		"mesh:dead":                    k.Dead(),
		"mesh:server-name:i1":          k.Name("i1"),
		"mesh:format":                  k.Format(),
		"mesh:connection-meta:c1":      k.ConnMeta("c1"),
		"mesh:room-meta:lobby":         k.RoomMeta("lobby"),
		"mesh:@3:presence:events:":     k.EventsPrefix(),
		"mesh:@3:server:i1":            k.ServerChannel("i1"),
		"mesh:@3:ended":                k.EndedChannel(),
	} {
		assert.Equal(t, want, got)
	}
	assert.Equal(t, 1, Space{}.Buckets())
	assert.Zero(t, k.RoomBucket("lobby"))
	assert.Zero(t, k.ConnBucket("c1"))
	assert.Regexp(t, `^mesh:canary:[0-9a-f]{16}$`, k.Canary())
	assert.NotEqual(t, k.Canary(), k.Canary())
}

// The hash of rooms and connections to buckets is part of the layout. All servers of a
// group must agree on it.
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
	assert.Equal(t, "mesh:{5}:presence:kept", k.Kept(5))
	assert.Equal(t, "mesh:{52}:presence:users:lobby", k.Users("lobby"))
	assert.Equal(t, "mesh:{52}:presence:recount:lobby", k.Recount("lobby"))
	assert.Equal(t, []string{"mesh:{0}:instances", "mesh:{0}:dead", "mesh:{0}:server-name:i1", "mesh:{0}:format"},
		[]string{k.Instances(), k.Dead(), k.Name("i1"), k.Format()})
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
		"mesh:presence:members:r:c", "mesh:presence:seq:r:c", "mesh:presence:users:r:c", "mesh:presence:kept", "mesh:presence:owned:r:c", "mesh:presence:rooms",
		"mesh:fence:i", "mesh:connection-meta:c", "mesh:canary:00", "mesh:presence:connr:c", "mesh:presence:conn:r:c d",
		"xmesh:presence:conn:r:c", "mesh:{1}:presence:conn:r:c",
	} {
		_, ok := plainKeys.ParseExpired(key)
		assert.False(t, ok, key)
		_, ok = clusterKeys.ParseExpired(key)
		assert.False(t, ok, key)
	}
	other := clusterKeys
	other.Spread = 32
	var foreign int
	for i := range 100 {
		if _, ok := clusterKeys.ParseExpired(other.Conn(fmt.Sprint("r", i), "c")); !ok {
			foreign++
		}
	}
	assert.Positive(t, foreign, "keys of a layout with other buckets")
	_, ok := plainKeys.ParseExpired(clusterKeys.Conn("r", "c"))
	assert.False(t, ok)
}

// FuzzKeys compares the names of two rooms and two connections. Whatever bytes they
// contain, different things have different names, and names parse back to their parts.
func FuzzKeys(f *testing.F) {
	f.Add("lobby", "c1", "lobby:conn:c1", "c2")
	f.Add("a:b", "c", "a", "b")
	f.Add("{1}", "c", "}{", "c")
	f.Add("*", "c", "\n", "c")
	f.Add("", "c", ":", "c")
	f.Add("a\xff", "☃", "a", "c\x00")
	f.Add("x}:presence:conn:y", "c", "conn:x", "c")
	f.Fuzz(func(t *testing.T, room1, conn1, room2, conn2 string) {
		// Names are distinct for any connection id without a colon. Only valid ids
		// parse back.
		conn1, conn2 = strings.ReplaceAll(conn1, ":", ""), strings.ReplaceAll(conn2, ":", "")
		for _, k := range []Space{plainKeys, clusterKeys, {Prefix: "app:mesh:", Spread: 3, Cluster: true}} {
			one, two := namesOf(k, room1, conn1), namesOf(k, room2, conn2)
			seen := make(map[string]string)
			for kind, key := range one {
				require.NotContains(t, seen, key, "%s and %s", kind, seen[key])
				seen[key] = kind
			}
			for kind, key := range two {
				if twin, ok := seen[key]; ok {
					require.Equal(t, kind, twin, key)
					require.True(t, sameSubject(kind, room1, conn1, room2, conn2), "%s: %q", kind, key)
				}
			}
			checkParse(t, k, room1, conn1)
			checkSlots(t, k, room1, one)
		}
	})
}

// namesOf returns all names that belong to a room, a connection, or both.
func namesOf(k Space, room, conn string) map[string]string {
	return map[string]string{
		"room members": k.Members(room), "room seq": k.Seq(room), "room meta": k.RoomMeta(room),
		"room users": k.Users(room), "room recount": k.Recount(room), "kept": k.Kept(k.RoomBucket(room)),
		"both conn": k.Conn(room, conn), "both state": k.State(room, conn),
		"conn meta": k.ConnMeta(conn), "conn owned": k.Owned(0, conn), "conn fence": k.Fence(0, conn), "conn server name": k.Name(conn),
		"rooms": k.Rooms(k.RoomBucket(room)), "instances": k.Instances(), "dead": k.Dead(), "format": k.Format(),
		"room channel": k.EventsPrefix() + room, "conn channel": k.ServerChannel(conn), "ended channel": k.EndedChannel(),
	}
}

func sameSubject(kind, room1, conn1, room2, conn2 string) bool {
	switch word, _, _ := strings.Cut(kind, " "); word {
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

func checkParse(t *testing.T, k Space, room, conn string) {
	t.Helper()
	valid := ValidateConnectionID(conn) == nil
	for want, key := range map[Kind]string{ConnExpired: k.Conn(room, conn), StateExpired: k.State(room, conn)} {
		e, ok := k.ParseExpired(key)
		require.Equal(t, valid, ok, "%q", key)
		if ok {
			require.Equal(t, []string{room, conn}, []string{e.Room, e.Conn})
			require.Equal(t, want, e.Kind)
		}
	}
	for kind, key := range namesOf(k, room, conn) {
		if _, ok := k.ParseExpired(key); ok {
			require.Contains(t, kind, "both ", "%q", key)
		}
	}
	if e, ok := k.ParseExpired(room); ok { // room is any text
		build := map[Kind]func(string, string) string{ConnExpired: k.Conn, StateExpired: k.State}[e.Kind]
		require.Equal(t, room, build(e.Room, e.Conn))
	}
}

func checkSlots(t *testing.T, k Space, room string, names map[string]string) {
	t.Helper()
	if !k.Cluster {
		return
	}
	slot := clusterSlot(k.Owned(k.RoomBucket(room), "i"))
	for kind, key := range names {
		shared := kind == "rooms" || kind == "kept" || strings.HasPrefix(kind, "both ") || strings.HasPrefix(kind, "room ")
		if shared && !strings.HasSuffix(kind, "channel") {
			require.Equal(t, slot, clusterSlot(key), "%s: %q", kind, key)
		}
	}
}

func TestValidateConnectionID(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"c", "a-b_c.d~", "☃", "{x}", strings.Repeat("x", 128)} {
		assert.NoError(t, ValidateConnectionID(id), id)
	}
	for _, id := range []string{"", "a:b", "a b", "a\tb", "a\x00", "a\u0085", "a\u2003b", "a\xff", strings.Repeat("x", 129)} {
		assert.ErrorIs(t, ValidateConnectionID(id), errs.InvalidConnectionID, "%q", id)
	}
}

func TestValidateRoomName(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"lobby", "a:b", "a b", "{1}*", "lobby:conn:X", "☃", "12345678"} {
		assert.NoError(t, ValidateRoomName(name, 8+len(name)), name)
	}
	for _, name := range []string{"", "a\nb", "a\x7f", "\u009f", "a\xff", "123456789"} {
		assert.ErrorIs(t, ValidateRoomName(name, 8), errs.InvalidRoom, "%q", name)
	}
	assert.NoError(t, ValidateRoomName(strings.Repeat("x", 1<<16), -1), "a negative limit means no limit")
	err := ValidateRoomName(strings.Repeat("☃", 1000), 8)
	assert.Less(t, len(err.Error()), 300, "the error repeats the whole name")
	assert.True(t, utf8.ValidString(err.Error()))
}

// FuzzExpired checks ParseExpired with any key. It must accept the exact names of
// entries and states, and no other key.
func FuzzExpired(f *testing.F) {
	for _, k := range []Space{plainKeys, clusterKeys} {
		for _, room := range []string{"lobby", "a:b", "", "}:presence:conn:x", "{1}", "\n*", "conn:", "\xff"} {
			f.Add(k.Conn(room, "c"))
			f.Add(k.State(room, "c"))
			f.Add(k.Members(room))
		}
	}
	f.Fuzz(func(t *testing.T, key string) {
		for _, k := range []Space{plainKeys, clusterKeys} {
			e, ok := k.ParseExpired(key)
			if !ok {
				continue
			}
			require.NoError(t, ValidateConnectionID(e.Conn))
			require.Equal(t, key, map[Kind]func(string, string) string{ConnExpired: k.Conn, StateExpired: k.State}[e.Kind](e.Room, e.Conn))
			require.NotEqual(t, key, k.Members(e.Room))
		}
	})
}
