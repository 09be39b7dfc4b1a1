package store

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/limit"
)

// The first expired event of a replica shows that it was promoted. Later ones show
// nothing new.
func TestPromotionIsReportedOnce(t *testing.T) {
	t.Parallel()
	failovers, keys := 0, 0
	c := redis.NewClient(&redis.Options{Addr: "127.0.0.1:0"}) // never used
	defer c.Close()
	w := newExpiredWatch(redisNode{addr: "a", client: c, replica: true}, ExpiredConfig{
		Expired: func(string) { keys++ }, Failover: func() { failovers++ }, Logger: slog.New(slog.DiscardHandler), log: limit.NewLog(nil),
	}, func() {})
	for range 5 {
		w.Message("", "k")
	}
	require.Equal(t, 5, keys)
	require.Equal(t, 1, failovers)
	require.Len(t, w.recheck, 1, "it is probed from now on")
	w.setReplica(false) // the listing shows it too
	require.Equal(t, 1, failovers)
}

// listing is a cluster that only provides the list of its nodes.
type listing struct {
	redis.UniversalClient
	count atomic.Int64

	mu                sync.Mutex // guards the fields below
	masters, replicas []*redis.Client
}

func (l *listing) set(masters, replicas []*redis.Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.masters, l.replicas = masters, replicas
}

func (l *listing) ForEachMaster(ctx context.Context, f func(context.Context, *redis.Client) error) error {
	l.count.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	return each(ctx, l.masters, f)
}

func (l *listing) ForEachSlave(ctx context.Context, f func(context.Context, *redis.Client) error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return each(ctx, l.replicas, f)
}

func each(ctx context.Context, nodes []*redis.Client, f func(context.Context, *redis.Client) error) error {
	for _, n := range nodes {
		if err := f(ctx, n); err != nil {
			return err
		}
	}
	return nil
}

// absent returns a client of a node that cannot be reached.
func absent(t *testing.T, addr string) *redis.Client {
	c := redis.NewClient(&redis.Options{Addr: addr, MaxRetries: -1, Dialer: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("no route")
	}})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestLook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a, b, c := absent(t, "127.0.0.1:1"), absent(t, "127.0.0.1:2"), absent(t, "127.0.0.1:3")
		type nodes = []*redis.Client
		l := &listing{masters: nodes{a}, replicas: nodes{b}}
		var failovers atomic.Int64
		e := NewExpiredEvents(ExpiredConfig{
			Client: l, Canary: func() string { return "canary" }, Expired: func(string) {},
			Changed: func(ExpiredState, error) {}, Failover: func() { failovers.Add(1) },
		})
		e.Start()
		defer e.Stop()
		look := func() int64 {
			require.NoError(t, e.Look(t.Context()))
			return failovers.Load()
		}
		synctest.Wait()
		require.Zero(t, look(), "the first listing")

		// Many looks at the same time cost one listing.
		time.Sleep(scanEvery + freshFor)
		before := l.count.Load()
		for range 10 {
			look()
			time.Sleep(freshFor / 20)
		}
		require.EqualValues(t, 1, l.count.Load()-before)

		// A master that was not known before may have been one for a while.
		time.Sleep(freshFor)
		l.set(nodes{a, c}, nodes{b})
		require.EqualValues(t, 1, look())

		// The node is not given up because this one listing lacks it, however many
		// callers look at that time.
		time.Sleep(scanEvery - time.Duration(time.Now().UnixNano())%scanEvery + freshFor) // just after a regular listing
		l.set(nodes{a}, nodes{b})
		for range missedScans {
			look()
			time.Sleep(freshFor)
		}
		l.set(nodes{a, c}, nodes{b})
		require.EqualValues(t, 1, look())

		// Changed roles are noticed. New replicas do not count as a failover.
		time.Sleep(freshFor)
		l.set(nodes{b, c}, nodes{a, absent(t, "127.0.0.1:4")})
		require.EqualValues(t, 3, look())
	})
}
