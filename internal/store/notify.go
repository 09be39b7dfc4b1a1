package store

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/redis/go-redis/v9"
)

// notifySetting is the setting that makes Redis publish keyspace events. Its value is a
// string of flags. E selects the channels named by event, x selects expired events, and
// A stands for all events (including x, not K and E).
const notifySetting = "notify-keyspace-events"

// NotifyConfig is the part of a client that EnableExpiredEvents needs.
type NotifyConfig interface {
	ConfigGet(ctx context.Context, parameter string) *redis.MapStringStringCmd
	ConfigSet(ctx context.Context, parameter, value string) *redis.StatusCmd
}

// ExpiredChannel returns the channel on which Redis publishes the names of expired keys
// of a database.
func ExpiredChannel(db int) string { return fmt.Sprintf("__keyevent@%d__:expired", db) }

// MergeNotifyFlags adds the flags for expired events to the value of
// notify-keyspace-events. It keeps all other flags, because other software may need
// them. If change is false, nothing has to be written.
func MergeNotifyFlags(current string) (merged string, change bool) {
	merged = current
	if !strings.Contains(merged, "E") {
		merged += "E"
	}
	if !strings.ContainsAny(merged, "xA") {
		merged += "x"
	}
	return merged, merged != current
}

// EnableExpiredEvents makes one Redis node send expired events, unless it does already.
// It returns the old and the new value of the setting. Managed services often forbid
// this. Only a probe can tell whether events arrive nevertheless.
//
// Redis has no compare-and-set for settings. Servers that do this at the same time
// write the same value. A flag that other software sets between the read and the write
// is lost.
func EnableExpiredEvents(ctx context.Context, c NotifyConfig) (before, after string, err error) {
	settings, err := c.ConfigGet(ctx, notifySetting).Result()
	if err != nil {
		return "", "", fmt.Errorf("store: read %s: %w", notifySetting, err)
	}
	before, found := settings[notifySetting]
	if !found { // a value that the ACL hides, or that the service lacks, must not be overwritten
		return "", "", fmt.Errorf("store: read %s: redis does not tell", notifySetting)
	}
	after, change := MergeNotifyFlags(before)
	if !change {
		return before, before, nil
	}
	if err := c.ConfigSet(ctx, notifySetting, after).Err(); err != nil {
		return before, before, fmt.Errorf("store: set %s to %q: %w", notifySetting, after, err)
	}
	return before, after, nil
}

// redisNode is one Redis process.
type redisNode struct {
	addr    string // "" without a cluster
	client  redis.UniversalClient
	replica bool
}

// clusterNodes is implemented by *redis.ClusterClient and by types that embed it.
type clusterNodes interface {
	ForEachMaster(ctx context.Context, fn func(ctx context.Context, client *redis.Client) error) error
	ForEachSlave(ctx context.Context, fn func(ctx context.Context, client *redis.Client) error) error
}

// listNodes returns the nodes behind client: every node of a cluster, or client itself.
// Replicas are included, because keyspace events are local to a node, and a replica may
// be promoted at any moment.
func listNodes(ctx context.Context, client redis.UniversalClient) ([]redisNode, error) {
	cluster, ok := client.(clusterNodes)
	if !ok {
		return []redisNode{{client: client}}, nil
	}
	var (
		mu    sync.Mutex // guards nodes: the cluster client calls from many goroutines
		nodes []redisNode
	)
	collect := func(replica bool) func(context.Context, *redis.Client) error {
		return func(_ context.Context, c *redis.Client) error {
			mu.Lock()
			defer mu.Unlock()
			nodes = append(nodes, redisNode{addr: c.Options().Addr, client: c, replica: replica})
			return nil
		}
	}
	if err := cluster.ForEachMaster(ctx, collect(false)); err != nil {
		return nil, fmt.Errorf("store: list masters: %w", err)
	}
	if err := cluster.ForEachSlave(ctx, collect(true)); err != nil {
		return nil, fmt.Errorf("store: list replicas: %w", err)
	}
	// A node may have changed its role between the two listings. Then it counts as a
	// master, so that it is probed.
	slices.SortStableFunc(nodes, func(a, b redisNode) int { return strings.Compare(a.addr, b.addr) })
	return slices.CompactFunc(nodes, func(a, b redisNode) bool { return a.addr == b.addr }), nil
}
