package store

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// BenchmarkCommit measures the processor time of an op in Redis and in this process,
// with full batches one after the other.
//
//	go test -run '^$' -bench Commit -benchtime 1000x ./internal/store
func BenchmarkCommit(b *testing.B) {
	for _, load := range []struct {
		name    string
		prepare []Op
		batch   func(n int) []Op
	}{
		{"join and leave/rooms that fill and empty", nil, comeAndGo(1000, nil)},
		{"join and leave/rooms of 50", residents(40, 50, nil), comeAndGo(40, nil)},
		{"join and leave/with a TTL", residents(40, 50, withTTL), comeAndGo(40, withTTL)},
		{"join and leave/with a state", residents(40, 50, withState), comeAndGo(40, withState)},
		{"state", residents(40, 50, nil), states(40, 50)},
		{"state, metadata beside it", residents(40, 50, withMeta), states(40, 50)},
		{"metadata", residents(40, 50, nil), metas(40, 50)},
		{"refresh/5 in a room", residents(2560, 5, withTTL), refreshes(2560, 5)},
		{"refresh/500 in a room", residents(20, 500, withTTL), refreshes(20, 500)},
		{"connect", nil, connects},
	} {
		b.Run(load.name, func(b *testing.B) { measureCommits(b, load.prepare, load.batch) })
	}
}

func withTTL(o *Op) { o.TTL, o.Left = time.Minute, 61*time.Second }
func withMeta(o *Op) {
	o.MetaVersion, o.Meta = 1, []byte(`{"name":"somebody","avatar":"https://example.com/a.png"}`)
}
func withState(o *Op) { o.StateVersion, o.State = 1, []byte(`{"x":123,"y":456,"tool":"pen"}`) }

// entryID returns an id of the same length as a server's.
func entryID(room, conn, life int) string { return fmt.Sprintf("E%05d%05d%05d", room, conn, life) }

func benchOp(kind OpKind, room, conn, life int) Op {
	return Op{Kind: kind, Room: "room" + strconv.Itoa(room), Conn: fmt.Sprintf("conn%06d", conn), Entry: entryID(room, conn, life), Cause: CauseLeft}
}

// residents returns joins that fill rooms.
func residents(rooms, each int, how func(*Op)) []Op {
	ops := make([]Op, 0, rooms*each)
	for i := range rooms * each {
		o := benchOp(OpJoin, i/each, i, 0)
		if how != nil {
			how(&o)
		}
		ops = append(ops, o)
	}
	return ops
}

// comeAndGo returns batches. In each batch half of the ops join, and the entries of the
// batch before leave.
func comeAndGo(rooms int, how func(*Op)) func(int) []Op {
	const half = MaxOps / 2
	return func(n int) []Op {
		ops := make([]Op, 0, MaxOps)
		for i := range half {
			j := benchOp(OpJoin, (n*half+i*7)%rooms, 100_000+(n%2)*half+i, n)
			if how != nil {
				how(&j)
			}
			ops = append(ops, j)
			if n > 0 {
				l := benchOp(OpLeave, ((n-1)*half+i*7)%rooms, 100_000+((n-1)%2)*half+i, n-1)
				l.TTL, l.Stated = j.TTL, j.State != nil
				ops = append(ops, l)
			}
		}
		return ops
	}
}

func states(rooms, each int) func(int) []Op {
	return func(n int) []Op {
		ops := make([]Op, MaxOps)
		for i := range ops {
			at := (n*MaxOps + i*each + i) % (rooms * each)
			ops[i] = benchOp(OpUpdate, at/each, at, 0)
			ops[i].StateVersion, ops[i].State = uint64(n+1), []byte(fmt.Sprintf(`{"x":%d,"y":%d,"tool":"pen"}`, n, i))
		}
		return ops
	}
}

func metas(rooms, each int) func(int) []Op {
	return func(n int) []Op {
		ops := states(rooms, each)(n)
		for i := range ops {
			ops[i].MetaVersion, ops[i].Meta, ops[i].StateVersion, ops[i].State = ops[i].StateVersion, ops[i].State, 0, nil
		}
		return ops
	}
}

func refreshes(rooms, each int) func(int) []Op {
	return func(n int) []Op {
		ops := make([]Op, MaxOps)
		for i := range ops {
			at := (n*MaxOps + i) % (rooms * each)
			ops[i] = benchOp(OpUpdate, at/each, at, 0)
			ops[i].TTL, ops[i].Left = time.Minute, 60*time.Second+time.Duration(i)*time.Millisecond
		}
		return ops
	}
}

func connects(n int) []Op {
	ops := make([]Op, MaxOps)
	for i := range ops {
		ops[i] = Op{Kind: OpConnect, Conn: fmt.Sprintf("conn%06d", (n/2)%100*MaxOps+i), MetaVersion: 1, Meta: []byte(`{"name":"somebody"}`), Fresh: true}
		if n%2 == 1 {
			ops[i] = Op{Kind: OpDisconnect, Conn: ops[i].Conn}
		}
	}
	return ops
}

func measureCommits(b *testing.B, prepare []Op, batch func(int) []Op) {
	server := redistest.Start(b)
	client := server.Client(b)
	s := New(client, testKeys{buckets: 1})
	number := uint64(0)
	commit := func(ops []Op) {
		number++
		res, err := s.Commit(b.Context(), 0, "incarnation0000000000000000", number, number-1, ops)
		require.NoError(b, err)
		for i, r := range res {
			if r.Err != nil || r.Status != Done {
				b.Fatalf("op %d of batch %d: %v %c", i, number, r.Err, r.Status)
			}
		}
	}
	for len(prepare) > 0 {
		n := min(MaxOps, len(prepare))
		commit(prepare[:n])
		prepare = prepare[n:]
	}
	n, ops := 0, 0
	next := func() []Op { n++; return batch(n - 1) }
	commit(next())
	require.NoError(b, client.ConfigResetStat(b.Context()).Err())
	redisBefore, ownBefore := usedByRedis(b, client), usedByUs(b)
	for b.Loop() {
		list := next()
		commit(list)
		ops += len(list)
	}
	per := float64(ops) / 1e6
	b.ReportMetric((usedByRedis(b, client)-redisBefore)/per, "redis-µs/op")
	b.ReportMetric((usedByUs(b)-ownBefore)/per, "go-µs/op")
	commands, inside := usedByCommands(b, client)
	b.ReportMetric(inside/float64(ops), "commands-µs/op")
	b.ReportMetric(float64(commands)/float64(ops), "commands/op")
}

// BenchmarkCleanUp measures the clean-up after a server with 10,000 entries in 1,000
// rooms.
//
//	go test -run '^$' -bench CleanUp -benchtime 3x ./internal/store
func BenchmarkCleanUp(b *testing.B) {
	server := redistest.Start(b)
	client := server.Client(b)
	s := New(client, testKeys{buckets: 1})
	const rooms, each = 1000, 10
	used, ended := 0.0, 0
	for n := range b.N {
		inc := fmt.Sprintf("incarnation%016d", n)
		number := uint64(0)
		for part := range slices.Chunk(residents(rooms, each, withTTL), MaxOps) {
			number++
			_, err := s.Commit(b.Context(), 0, inc, number, number-1, part)
			require.NoError(b, err)
		}
		require.NoError(b, s.Fence(b.Context(), 0, inc))
		before := usedByRedis(b, client)
		for cursor := uint64(0); ; {
			refs, next, err := s.OwnedPage(b.Context(), 0, inc, cursor)
			require.NoError(b, err)
			items := make([]CleanUpItem, len(refs))
			for i, r := range refs {
				items[i] = CleanUpItem{Mode: GroundDead, Room: r.Room, Conn: r.Conn, Entry: r.Entry, Incarnation: inc}
			}
			now, err := client.Time(b.Context()).Result()
			require.NoError(b, err)
			statuses, err := s.CleanUp(b.Context(), ClockProof{Now: now.UnixMilli(), Tolerance: time.Minute}, items)
			require.NoError(b, err)
			for _, st := range statuses {
				if st == Ended {
					ended++
				}
			}
			if cursor = next; cursor == 0 {
				break
			}
		}
		used += usedByRedis(b, client) - before
	}
	require.Equal(b, rooms*each*b.N, ended)
	b.ReportMetric(used*1e6/float64(ended), "redis-µs/entry")
}

// BenchmarkCheck measures the key checks of a server with 100,000 rooms and about as
// many keys of entries or connections. Each heartbeat checks about half of them. The
// metric redis-%/heartbeat is the share of the 3.3 seconds between two heartbeats.
//
//	go test -run '^$' -bench Check -benchtime 10x ./internal/store
func BenchmarkCheck(b *testing.B) {
	const rooms, inc, interval = 100_000, "incarnation0000000000000000", 10.0 / 3
	server := redistest.Start(b)
	client := server.Client(b)
	s := New(client, testKeys{buckets: 1})
	number := uint64(0)
	for part := range slices.Chunk(residents(rooms, 1, withTTL), MaxOps) {
		number++
		_, err := s.Commit(b.Context(), 0, inc, number, number-1, part)
		require.NoError(b, err)
	}
	names, keys := make([]string, rooms), make([]KeyRef, rooms)
	for i := range names {
		o := benchOp(OpJoin, i, i, 0)
		names[i], keys[i] = o.Room, KeyRef{Kind: KeyConn, Room: o.Room, Conn: o.Conn}
	}
	for _, load := range []struct {
		name  string
		rooms []string
		keys  []KeyRef
	}{{"rooms", names, nil}, {"keys", nil, keys}} {
		b.Run(load.name, func(b *testing.B) {
			before, own := usedByRedis(b, client), usedByUs(b)
			for b.Loop() {
				for part := range slices.Chunk(load.rooms, CheckSize) {
					c, err := s.Check(b.Context(), 0, inc, CheckList{Rooms: part})
					require.NoError(b, err)
					require.Equal(b, RoomCheck{Members: true, Listed: true, Entries: 1}, c.Rooms[len(part)-1])
				}
				for part := range slices.Chunk(load.keys, CheckSize) {
					c, err := s.Check(b.Context(), 0, inc, CheckList{Keys: part})
					require.NoError(b, err)
					require.Empty(b, c.Missing)
				}
			}
			used := (usedByRedis(b, client) - before) / float64(b.N)
			b.ReportMetric(used*1e9/rooms, "redis-ns/key")
			b.ReportMetric(used/2*100/interval, "redis-%/heartbeat")
			b.ReportMetric((usedByUs(b)-own)*1e9/rooms/float64(b.N), "go-ns/key")
		})
	}
}

// usedByRedis returns the processor time that a Redis has used so far, in seconds.
func usedByRedis(b *testing.B, client *redis.Client) (total float64) {
	info, err := client.Info(b.Context(), "cpu").Result()
	require.NoError(b, err)
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name == "used_cpu_user" || name == "used_cpu_sys" {
			v, err := strconv.ParseFloat(value, 64)
			require.NoError(b, err)
			total += v
		}
	}
	return total
}

// usedByUs returns the processor time that this process has used so far, in seconds.
func usedByUs(b *testing.B) float64 {
	var r syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &r))
	return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
}

var stat = regexp.MustCompile(`cmdstat_(\w+):calls=(\d+),usec=(\d+)`)

// usedByCommands returns the number of commands that scripts have run since the last
// reset, and the time that they took according to Redis, in µs.
func usedByCommands(b *testing.B, client *redis.Client) (calls int, usec float64) {
	info, err := client.Info(b.Context(), "commandstats").Result()
	require.NoError(b, err)
	for _, m := range stat.FindAllStringSubmatch(info, -1) {
		if m[1] == "evalsha" || m[1] == "info" || m[1] == "config" {
			continue
		}
		n, _ := strconv.Atoi(m[2])
		t, _ := strconv.ParseFloat(m[3], 64)
		calls, usec = calls+n, usec+t
	}
	return calls, usec
}
