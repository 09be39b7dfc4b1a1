package store

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// every calls all methods at the same time, and returns the error of each.
func every(ctx context.Context, s *Store) map[string]error {
	j := ClockProof{Tolerance: time.Hour}
	calls := map[string]func() error{
		"Commit": func() error { _, err := s.Commit(ctx, 0, "I", 9, 0, []Op{join("r", "a", "a1")}); return err },
		"CleanUp": func() error {
			_, err := s.CleanUp(ctx, j, []CleanUpItem{item(GroundDead, "r", "a", "a1", "I")})
			return err
		},
		"Snapshot":             func() error { _, err := s.Snapshot(ctx, "r"); return err },
		"Some":                 func() error { _, _, err := s.Some(ctx, "r", 5); return err },
		"Count":                func() error { _, err := s.Count(ctx, "r"); return err },
		"Record":               func() error { _, _, err := s.Record(ctx, "r", "a"); return err },
		"Positions":            func() error { _, err := s.Positions(ctx, make([]string, 600)); return err },
		"Rooms":                func() error { return s.Rooms(ctx, func(string) bool { return true }) },
		"OwnersIn":             func() error { _, err := s.OwnersIn(ctx, "r"); return err },
		"OwnedPage":            func() error { _, _, err := s.OwnedPage(ctx, 0, "I", 0); return err },
		"OwnedSize":            func() error { _, err := s.OwnedSize(ctx, 0, "I"); return err },
		"ForgetConnections":    func() error { return s.ForgetConnections(ctx, 0, "I", []string{"a"}) },
		"Register":             func() error { _, err := s.Register(ctx, "I", time.Minute); return err },
		"Renew":                func() error { _, err := s.Renew(ctx, "I", time.Minute, "", false); return err },
		"DeclareDeadIfExpired": func() error { _, err := s.DeclareDeadIfExpired(ctx, j, "I"); return err },
		"DeclareDead":          func() error { return s.DeclareDead(ctx, "I") },
		"Cleaned":              func() error { return s.RemoveDead(ctx, "I") },
		"Fence":                func() error { return s.Fence(ctx, 0, "I") },
		"Instances":            func() error { _, _, err := s.ServerLeases(ctx, 9); return err },
		"OwnedSizes":           func() error { _, err := s.OwnedSizes(ctx, []string{"I", "J"}); return err },
		"Counts":               func() error { _, err := s.Counts(ctx, []string{"r", "s"}); return err },
		"RoomsFrom":            func() error { _, err := s.RoomsFrom(ctx, "", Cursor{}, 9); return err },
		"EntriesFrom":          func() error { _, err := s.EntriesFrom(ctx, "r", Cursor{}, 9); return err },
		"CheckFormat":          func() error { return s.CheckFormat(ctx) },
		"ConnMeta":             func() error { _, err := s.ConnMeta(ctx, "a"); return err },
		"ConnMetas":            func() error { _, err := s.ConnMetas(ctx, []string{"a", "b"}); return err },
		"SetConnMeta":          func() error { _, _, err := s.SetConnMeta(ctx, "a", 0, 0, nil); return err },
		"SetRoomMeta":          func() error { _, _, err := s.SetRoomMeta(ctx, "a", 0, nil); return err },
		"DeleteRoomMeta":       func() error { return s.DeleteRoomMeta(ctx, "a") },
		"Publish":              func() error { _, err := s.Publish(ctx, "x", "y"); return err },
		"Ping":                 func() error { return s.Ping(ctx) },
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := make(map[string]error)
	for name, f := range calls {
		wg.Go(func() {
			err := f()
			mu.Lock()
			defer mu.Unlock()
			out[name] = err
		})
	}
	wg.Wait()
	return out
}

// Every call fails within 2 s if Redis is away, for all ways to be away.
func TestCallsReturnWhileRedisHangs(t *testing.T) {
	t.Parallel()
	for _, fault := range []string{"paused", "black hole", "replies lost"} {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t)
			proxy := redistest.Proxy(t, server.Addr())
			client := redis.NewClient(&redis.Options{Addr: proxy.Addr()})
			t.Cleanup(func() { _ = client.Close() })
			s := New(client, testKeys{buckets: 1})
			require.NoError(t, s.Ping(t.Context())) // puts a connection into the pool
			switch fault {
			case "paused":
				server.Pause()
				t.Cleanup(server.Resume)
			case "black hole":
				proxy.BlackHole(true)
			case "replies lost":
				proxy.DropReplies(true)
			}
			began := time.Now()
			for name, err := range every(t.Context(), s) {
				require.ErrorIs(t, err, ErrUnavailable, name)
			}
			// The next test measures the duration in virtual time.
			assert.Less(t, time.Since(began), 2*time.Minute)
			assert.NotZero(t, s.Stats().Failures)

			began = time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			_, err := s.Commit(ctx, 0, "I", 1, 0, nil)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			assert.Less(t, time.Since(began), 2*time.Minute, "its own context ends it sooner")
			require.Error(t, s.Wait(ctx), "the calls that were given up are still under way")
		})
	}
}

// In virtual time only waiting takes time.
func TestCallsReturnInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		require.NoError(t, w.Ping(t.Context()))
		w.mem.Hang()
		began := time.Now()
		for name, err := range every(t.Context(), w.Store) {
			require.ErrorIs(t, err, ErrUnavailable, name)
		}
		assert.Less(t, time.Since(began), 2*time.Second)
		w.mem.Resume()
	})
}

// An answer that has arrived is never lost. In virtual time no call reaches its limit,
// however long a goroutine waits for a processor.
func TestAnswersAreNotLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := New(nil, testKeys{buckets: 1})
		var wg sync.WaitGroup
		for range 16 { // more than there are processors, so that some wait for one
			wg.Go(func() {
				for range 5000 {
					n, err := call(t.Context(), s, func(context.Context) (int, error) { return 7, nil })
					if !assert.NoError(t, err) || !assert.Equal(t, 7, n) {
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

// Calls that were given up count until they end, so that a Redis that hangs costs no
// more than maxCalls goroutines.
func TestCallsAreBounded(t *testing.T) {
	t.Parallel()
	s := New(nil, testKeys{buckets: 1})
	hang := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	block := func() {
		_, err := call(ctx, s, func(context.Context) (int, error) { <-hang; return 0, nil })
		assert.ErrorIs(t, err, ErrUnavailable)
	}
	for range maxCalls {
		wg.Go(block)
	}
	require.Eventually(t, func() bool { return s.Stats().Calls == maxCalls }, 2*time.Minute, time.Millisecond)
	cancel()
	wg.Wait()
	block() // no slot is free
	assert.EqualValues(t, maxCalls, s.Stats().Calls)
	close(hang)
	require.NoError(t, s.Wait(t.Context()))
	_, err := call(t.Context(), s, func(context.Context) (int, error) { return 0, nil })
	require.NoError(t, err)
}

func TestGeneration(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	s := New(server.Client(t), testKeys{buckets: 1})
	one, ok := s.Generation(t.Context())
	require.True(t, ok)
	assert.NotEmpty(t, one)
	again, _ := s.Generation(t.Context())
	assert.Equal(t, one, again)
	server.Restart(true)
	var two string
	require.Eventually(t, func() bool { two, ok = s.Generation(t.Context()); return ok }, 2*time.Minute, 10*time.Millisecond)
	assert.NotEqual(t, one, two)
	server.Kill()
	_, ok = s.Generation(t.Context())
	assert.False(t, ok)
}

// A node that does not answer uses up only the slots of its own buckets.
func TestBucketsHaveTheirOwnSlots(t *testing.T) {
	t.Parallel()
	s := New(nil, testKeys{buckets: 4})
	hang := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range maxCalls {
		wg.Go(func() {
			_, err := read(ctx, s, "t:{1}:k", func(context.Context) (int, error) { <-hang; return 0, nil })
			assert.ErrorIs(t, err, ErrUnavailable)
		})
	}
	require.Eventually(t, func() bool { return s.Stats().Calls == bucketCalls }, 2*time.Minute, time.Millisecond)
	for _, key := range []string{"t:{0}:k", "t:{2}:{1}", "t:{3}:k", "t:{9}:k", "t:k"} {
		_, err := read(ctx, s, key, func(context.Context) (int, error) { return 0, nil })
		require.NoError(t, err, key)
	}
	cancel()
	wg.Wait()
	close(hang)
	require.NoError(t, s.Wait(t.Context()))
}

// A lease is renewed, however many commits, snapshots and metadata calls of one bucket
// are under way.
func TestLeaseHasItsOwnSlots(t *testing.T) {
	t.Parallel()
	for _, buckets := range []int{1, 4} {
		s := New(redistest.Start(t).Client(t), testKeys{buckets: buckets})
		for i := range s.slots {
			p := &s.slots[i]
			for range cap(p.writes) {
				p.writes <- struct{}{}
			}
			for len(p.reads) < cap(p.reads) { // without a cluster these are the slots of s too
				p.reads <- struct{}{}
			}
		}
		full, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, _, err := s.SetRoomMeta(full, "r", 0, nil)
		require.ErrorIs(t, err, context.DeadlineExceeded)

		ctx := t.Context()
		now, err := s.Register(ctx, "I", time.Minute)
		require.NoError(t, err)
		answer, err := s.Renew(ctx, "I", time.Minute, "", true)
		require.NoError(t, err)
		require.True(t, answer.Listed)
		_, err = s.DeclareDeadIfExpired(ctx, ClockProof{Now: now, Tolerance: time.Hour}, "I")
		require.NoError(t, err)
		require.NoError(t, s.DeclareDead(ctx, "I"))
		require.NoError(t, s.Fence(ctx, buckets-1, "I"))
	}
}

// Reads and single changes of clients do not delay a batch of changes. They leave
// connections of the pool to it.
func TestBatchesDoNotWaitForReads(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t).Client(t)
	s := New(client, testKeys{buckets: 1})
	assert.Less(t, cap(s.reads), client.Options().PoolSize)
	for len(s.reads) < cap(s.reads) {
		s.reads <- struct{}{}
	}
	full, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := s.Count(full, "r")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, _, err = s.SetConnMeta(full, "c", 0, 0, nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, err = s.Commit(t.Context(), 0, "I", 1, 0, []Op{{Kind: OpJoin, Room: "r", Conn: "c", Entry: "E"}})
	require.NoError(t, err)
	_, known := s.Generation(t.Context())
	assert.True(t, known)
	require.NoError(t, s.Ping(t.Context()))
	require.NoError(t, s.RemoveDead(t.Context(), "I"))
}

// The calls that clients cause leave connections of every pool to others, even if the
// pool is small or otherwise limited.
func TestSlotsFitThePool(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		pool, active, buckets int
		reads, inBucket       int
	}{
		"one connection":           {1, 0, 1, 1, 1},
		"two":                      {2, 0, 1, 1, 1},
		"three":                    {3, 0, 1, 2, 2},
		"few may be active":        {100, 8, 1, 6, 6},
		"one may be active":        {100, 1, 1, 1, 1},
		"more may be active":       {8, 100, 1, 6, 6},
		"very many":                {10_000, 0, 1, maxCalls, maxCalls},
		"a cluster's small pools":  {8, 0, 64, maxCalls, 6},
		"a cluster's single":       {1, 0, 64, maxCalls, 1},
		"a cluster's large pools":  {100, 0, 64, maxCalls, bucketCalls},
		"a cluster, few active":    {100, 4, 64, maxCalls, 3},
		"a cluster, of one bucket": {8, 0, 1, 6, 6},
	} {
		clients := []redis.UniversalClient{redis.NewClusterClient(&redis.ClusterOptions{
			Addrs: []string{"127.0.0.1:1"}, PoolSize: c.pool, MaxActiveConns: c.active,
		})}
		if c.buckets == 1 {
			clients = append(clients, redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", PoolSize: c.pool, MaxActiveConns: c.active}))
		}
		for _, client := range clients {
			s := New(client, testKeys{buckets: c.buckets})
			assert.Equal(t, c.reads, cap(s.reads), "%s, %T", name, client)
			assert.Equal(t, c.inBucket, cap(s.slots[c.buckets-1].reads), "%s, %T", name, client)
			require.NoError(t, client.Close())
		}
	}
}

// A client that disconnects during a call is not a failure of Redis, because failures
// wake operators.
func TestCallerThatGivesUpIsNoFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := New(redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"}), testKeys{})
		t.Cleanup(func() { _ = s.client.Close() })
		waits := func(ctx context.Context) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}
		gone, leave := context.WithCancel(t.Context())
		time.AfterFunc(10*time.Millisecond, leave)
		_, err := call(gone, s, waits)
		require.ErrorIs(t, err, ErrUnavailable)
		require.ErrorIs(t, err, context.Canceled)
		assert.Zero(t, s.Stats().Failures)
		late, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		_, err = call(late, s, waits)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.EqualValues(t, 1, s.Stats().Failures)
		assert.EqualValues(t, 2, s.Stats().Calls)
	})
}
