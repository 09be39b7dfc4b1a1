package redistest

import (
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// finds waits until a key has a value. The client notices a failover only when it reloads
// its state, once a minute or on demand.
func finds(t *testing.T, client *redis.ClusterClient, key, value string) {
	t.Helper()
	require.Eventually(t, func() bool {
		got, err := client.Get(t.Context(), key).Result()
		if err != nil {
			client.ReloadState(t.Context())
			return false
		}
		require.Equal(t, value, got)
		return true
	}, 2*time.Minute, 50*time.Millisecond, key)
}

// The parts share one cluster. Slots move while they are in use, and a replica takes the
// place of a killed master.
func TestCluster(t *testing.T) {
	t.Parallel()
	began := time.Now()
	c := StartCluster(t)
	t.Logf("complete after %v", time.Since(began).Round(time.Millisecond))
	client := c.Client(t)
	for i := range 300 {
		require.NoError(t, client.Set(t.Context(), fmt.Sprint(i), i, 0).Err())
	}
	holds := func() {
		t.Helper()
		for i := range 300 {
			finds(t, client, fmt.Sprint(i), fmt.Sprint(i))
		}
	}
	holds()

	slot := c.SlotOf("{tag}")
	from := c.Owner(slot)
	to := (from + 1) % c.Shards()
	for i := range 100 {
		require.NoError(t, client.Set(t.Context(), fmt.Sprintf("{tag}%d", i), "v", 0).Err())
	}
	m := c.BeginMove(slot, to)
	require.Equal(t, 10, m.Keys(10))
	script := redis.NewScript(`return redis.call('MGET', KEYS[1], KEYS[2])`)
	err := script.Run(t.Context(), client, []string{"{tag}nowhere", "{tag}99"}).Err()
	require.ErrorContains(t, err, "TRYAGAIN", "half of it is where the slot is not yet")
	m.Finish()
	require.Equal(t, to, c.Owner(slot))
	require.NoError(t, script.Run(t.Context(), client, []string{"{tag}nowhere", "{tag}99"}).Err())
	for i := range 100 {
		require.Equal(t, "v", client.Get(t.Context(), fmt.Sprintf("{tag}%d", i)).Val())
	}

	replica := c.Replica(0)
	require.NotNil(t, replica)
	killed := time.Now()
	dead := c.KillMaster(0)
	c.WaitForFailover(0)
	t.Logf("failed over after %v", time.Since(killed).Round(time.Millisecond))
	require.Same(t, replica, c.Master(0))
	require.Nil(t, c.Replica(0))
	holds()
	c.Restart(0)
	require.Same(t, dead, c.Replica(0))
	holds()
}

// Data that a detached replica has missed is lost with its master.
func TestClusterLosesWhatAReplicaMissed(t *testing.T) {
	t.Parallel()
	c := StartCluster(t)
	client := c.Client(t)
	key := "k"
	shard := c.Owner(c.SlotOf(key))
	require.NoError(t, client.Set(t.Context(), key, "old", 0).Err())
	require.Eventually(t, func() bool { // Set does not wait for replication
		return c.admin(c.Replica(shard)).Do(t.Context(), "dbsize").Val() == int64(1)
	}, 2*time.Minute, 5*time.Millisecond)
	c.Detach(shard)
	require.NoError(t, client.Set(t.Context(), key, "new", 0).Err())
	c.KillMaster(shard)
	c.WaitForFailover(shard)
	finds(t, client, key, "old")
	c.Attach(shard)
	c.Restart(shard)
}
