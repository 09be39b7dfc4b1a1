package store

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/redis/go-redis/v9"
)

// notifySetting is the setting that makes Redis publish keyspace events. Its
// value is a string of flags: E turns on the channels named by event, x picks
// expired events, A stands for all picks (x among them, K and E not).
const notifySetting = "notify-keyspace-events"

// NotifyConfig is what EnableExpiredEvents needs of a client.
type NotifyConfig interface {
	ConfigGet(ctx context.Context, parameter string) *redis.MapStringStringCmd
	ConfigSet(ctx context.Context, parameter, value string) *redis.StatusCmd
}

// ExpiredChannel is the channel on which Redis names the keys of a database
// whose TTL ran out.
func ExpiredChannel(db int) string { return fmt.Sprintf("__keyevent@%d__:expired", db) }

// MergeNotifyFlags adds to the value of notify-keyspace-events what expired
// events need and keeps everything else, for somebody else may rely on it.
// Without change nothing needs to be written.
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

// EnableExpiredEvents makes one Redis node send expired events, unless it
// does. It says what the setting was and is. Managed services often forbid
// this; whether events arrive all the same, only a try can tell.
//
// Redis cannot compare and set a setting. Servers that do this at the same
// time write the same; a flag that somebody else sets between the reading and
// the writing here is lost.
func EnableExpiredEvents(ctx context.Context, c NotifyConfig) (before, after string, err error) {
	settings, err := c.ConfigGet(ctx, notifySetting).Result()
	if err != nil {
		return "", "", fmt.Errorf("store: read %s: %w", notifySetting, err)
	}
	before, found := settings[notifySetting]
	if !found { // what the ACL hides or the service lacks must not be overwritten
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

// node is one Redis process.
type node struct {
	addr    string // "" without a cluster
	client  redis.UniversalClient
	replica bool
}

// clusterNodes is what a *redis.ClusterClient, or what embeds one, offers.
type clusterNodes interface {
	ForEachMaster(ctx context.Context, fn func(ctx context.Context, client *redis.Client) error) error
	ForEachSlave(ctx context.Context, fn func(ctx context.Context, client *redis.Client) error) error
}

// listNodes returns the nodes behind client: each of a cluster, replicas
// included (keyspace events stay on the node they happen on, and a replica
// may be promoted at any moment), or client itself.
func listNodes(ctx context.Context, client redis.UniversalClient) ([]node, error) {
	cluster, ok := client.(clusterNodes)
	if !ok {
		return []node{{client: client}}, nil
	}
	var (
		mu    sync.Mutex // guards nodes: the cluster client calls from many goroutines
		nodes []node
	)
	collect := func(replica bool) func(context.Context, *redis.Client) error {
		return func(_ context.Context, c *redis.Client) error {
			mu.Lock()
			defer mu.Unlock()
			nodes = append(nodes, node{addr: c.Options().Addr, client: c, replica: replica})
			return nil
		}
	}
	if err := cluster.ForEachMaster(ctx, collect(false)); err != nil {
		return nil, fmt.Errorf("store: list masters: %w", err)
	}
	if err := cluster.ForEachSlave(ctx, collect(true)); err != nil {
		return nil, fmt.Errorf("store: list replicas: %w", err)
	}
	// Between the two a node may have changed sides: as a master it is probed.
	slices.SortStableFunc(nodes, func(a, b node) int { return strings.Compare(a.addr, b.addr) })
	return slices.CompactFunc(nodes, func(a, b node) bool { return a.addr == b.addr }), nil
}
