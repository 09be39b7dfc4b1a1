package peer

import (
	"time"

	"github.com/centrifugal/centrifuge"
)

// NewRecoverableMap returns Centrifuge's Redis map broker for presence in recoverable
// mode, with its default stream. Entries expire after keyTTL.
func NewRecoverableMap(addr string, keyTTL time.Duration) (*centrifuge.Node, *centrifuge.RedisMapBroker, error) {
	node, err := centrifuge.New(centrifuge.Config{Map: centrifuge.MapConfig{
		GetMapChannelOptions: func(string) centrifuge.MapChannelOptions {
			return centrifuge.MapChannelOptions{Mode: centrifuge.MapModeRecoverable, KeyTTL: keyTTL}
		},
	}})
	if err != nil {
		return nil, nil, err
	}
	shard, err := centrifuge.NewRedisShard(node, centrifuge.RedisShardConfig{Address: addr})
	if err != nil {
		return nil, nil, err
	}
	broker, err := centrifuge.NewRedisMapBroker(node, centrifuge.RedisMapBrokerConfig{Shards: []*centrifuge.RedisShard{shard}})
	if err != nil {
		return nil, nil, err
	}
	node.SetMapBroker(broker)
	return node, broker, nil
}

// MapJoin is what Centrifuge publishes for a client that joins.
func MapJoin(info *centrifuge.ClientInfo) centrifuge.MapPublishOptions {
	return centrifuge.MapPublishOptions{ClientInfo: info, KeyMode: centrifuge.KeyModeIfNew, RefreshTTLOnSuppress: true}
}
