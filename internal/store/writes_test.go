package store

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// joinOf returns a join, refreshOf a refresh.
func joinOf(room, conn string) Op {
	return Op{Kind: OpJoin, Room: room, Conn: conn, Entry: "E" + conn, TTL: time.Second, Left: 2 * time.Second}
}

func refreshOf(room, conn string) Op {
	return Op{Kind: OpUpdate, Room: room, Conn: conn, Entry: "E" + conn, TTL: time.Second, Left: 2 * time.Second}
}

// Redis refuses the attempt to write exactly if it refuses a refresh.
func TestTryWriteFailsLikeARefresh(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		begin, end func(ctx context.Context, c *redis.Client) error
		refuses    bool
	}{
		"no replicas": {set("min-replicas-to-write", "1"), set("min-replicas-to-write", "0"), true},
		"read only":   {replicaOf("127.0.0.1", "1"), replicaOf("NO", "ONE"), true},
		"memory full": {set("maxmemory", "1"), set("maxmemory", "0"), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, server := t.Context(), redistest.Start(t)
			admin := server.Client(t)
			s := New(server.Client(t), testKeys{buckets: 1})
			number := uint64(0)
			commit := func(ops ...Op) error {
				number++
				results, err := s.Commit(ctx, 0, "I", number, 0, ops)
				for _, r := range results {
					if err == nil {
						err = r.Err
					}
				}
				return err
			}
			require.NoError(t, commit(joinOf("r", "a")))
			before := s.Writes(0)
			require.False(t, before.Last.IsZero())
			require.False(t, before.Since.IsZero())
			require.Zero(t, before.Failed)

			require.NoError(t, c.begin(ctx, admin))
			refused := commit(refreshOf("r", "a"))
			tried := s.TryWrite(ctx, 0)
			require.Equal(t, c.refuses, refused != nil, "%v", refused)
			require.Equal(t, c.refuses, tried != nil, "%v", tried)
			w := s.Writes(0)
			require.Equal(t, c.refuses, w.Since.IsZero())
			require.Equal(t, !c.refuses, w.Failed.IsZero())
			require.False(t, w.Broken, "it answered")
			if !c.refuses {
				require.ErrorIs(t, commit(joinOf("r", "b")), ErrFull)
				_, _, err := s.SetRoomMeta(ctx, "r", 0, []byte("{}"))
				require.ErrorIs(t, err, ErrFull)
				require.Zero(t, s.Writes(0).Failed, "a lack of memory says nothing about other writes")
			}

			require.NoError(t, c.end(ctx, admin))
			require.NoError(t, s.TryWrite(ctx, 0))
			require.False(t, s.Writes(0).Since.IsZero())
			require.NoError(t, admin.Set(ctx, s.keys.Members("odd"), "odd", 0).Err())
			require.ErrorIs(t, commit(joinOf("odd", "a")), ErrData)
			require.False(t, s.Writes(0).Since.IsZero(), "a key of another type is no outage")
		})
	}
}

func set(name, value string) func(context.Context, *redis.Client) error {
	return func(ctx context.Context, c *redis.Client) error { return c.ConfigSet(ctx, name, value).Err() }
}

func replicaOf(host, port string) func(context.Context, *redis.Client) error {
	return func(ctx context.Context, c *redis.Client) error { return c.Do(ctx, "REPLICAOF", host, port).Err() }
}

// A Redis that always refuses a read or an administrative command still takes writes.
func TestForbiddenReadIsNoFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := meshtest.StartRedis(t)
		client := redis.NewClient(mem.Options())
		defer func() { _ = client.Close() }()
		s := New(client, testKeys{buckets: 2})
		ctx := t.Context()
		for b := range 2 {
			require.NoError(t, s.TryWrite(ctx, b))
		}
		for _, text := range []string{
			"NOPERM this user has no permissions to run the 'info' command",
			"ERR unknown command `INFO`, with args beginning with: `server`",
		} {
			mem.SetError(text)
			_, ok := s.Generation(ctx)
			require.False(t, ok)
			_, err := s.Publish(ctx, s.keys.ServerChannel("I"), "")
			require.ErrorIs(t, err, ErrUnavailable)
			_, err = s.OwnedSize(ctx, 0, "I")
			require.ErrorIs(t, err, ErrUnavailable)
			for b := range 2 {
				require.Zero(t, s.Writes(b).Failed, text)
			}
			require.Error(t, s.TryWrite(ctx, 0))
			require.Equal(t, time.Now(), s.Writes(0).Failed, "no write is taken")
			require.Zero(t, s.Writes(1).Failed)
			mem.SetError("")
			time.Sleep(time.Second)
			s.slots[0].health.now = Writes{}
		}
	})
}

// This covers which errors count as failures, and since when writes succeed again.
func TestWritesSinceAFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := meshtest.StartRedis(t)
		opts := mem.Options()
		opts.MaxRetries = -1
		client := redis.NewClient(opts)
		defer func() { _ = client.Close() }()
		s := New(client, testKeys{buckets: 2})
		ctx := t.Context()
		for b := range 2 {
			require.NoError(t, s.TryWrite(ctx, b))
			time.Sleep(time.Second)
		}
		first := s.Writes(0)

		gone, cancel := context.WithCancel(ctx)
		cancel()
		require.Error(t, s.TryWrite(gone, 0))
		short, cancel := context.WithTimeout(ctx, time.Millisecond)
		mem.Hang()
		_, err := s.OwnedSize(short, 0, "I")
		cancel()
		require.Error(t, err)
		mem.Resume()
		require.Equal(t, first, s.Writes(0), "a caller that gives up early is no failure")
		for range cap(s.slots[0].reads) {
			s.slots[0].reads <- struct{}{}
		}
		_, err = s.OwnedSize(ctx, 0, "I")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, first, s.Writes(0), "a call that was never sent is no failure")
		for range cap(s.slots[0].reads) {
			<-s.slots[0].reads
		}
		mem.Hang()
		_, err = s.OwnedSize(ctx, 1, "I")
		require.Error(t, err)
		mem.Resume()
		require.True(t, s.Writes(0).Broken, "no answer")
		time.Sleep(10 * time.Second)
		require.NoError(t, s.TryWrite(ctx, 0))
		time.Sleep(10 * time.Second)

		mem.SetError("READONLY You can't write against a read only replica.")
		_, err = s.OwnedSize(ctx, 0, "I")
		require.Error(t, err)
		w := s.Writes(0)
		require.Equal(t, time.Now(), w.Failed)
		require.Zero(t, w.Since)
		require.False(t, w.Broken)
		require.Zero(t, s.Writes(1).Failed, "each node fails alone")
		require.Error(t, s.Ping(ctx))
		require.Equal(t, time.Now(), s.Writes(1).Failed, "this call has no bucket")
		mem.SetError("")
		time.Sleep(time.Second)
		_, err = s.OwnedSize(ctx, 0, "I")
		require.NoError(t, err)
		require.Zero(t, s.Writes(0).Since, "a read proves nothing")
		require.NoError(t, s.TryWrite(ctx, 0))
		require.Equal(t, time.Now(), s.Writes(0).Since)
		since := time.Now()
		time.Sleep(time.Second)
		require.NoError(t, s.TryWrite(ctx, 0))
		require.Equal(t, since, s.Writes(0).Since)
		require.Equal(t, time.Now(), s.Writes(0).Last)

		s.MayHaveFailed()
		require.True(t, s.Writes(0).Broken)
		time.Sleep(time.Millisecond)
		require.NoError(t, s.TryWrite(ctx, 0))
		require.True(t, s.Writes(0).Broken)
		mem.SetError("LOADING")
		require.Error(t, s.TryWrite(ctx, 0))
		require.True(t, s.Writes(0).Broken, "the same outage")
		mem.SetError("")
		time.Sleep(time.Millisecond)
		require.NoError(t, s.TryWrite(ctx, 0))
		time.Sleep(time.Minute)
		mem.SetError("OOM for once")
		require.Error(t, s.TryWrite(ctx, 0))
		require.False(t, s.Writes(0).Broken, "another one")
		require.Zero(t, s.Writes(0).Since, "the attempt itself needs no memory")
		mem.SetError("")
	})
}
