package peer

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"github.com/centrifugal/centrifuge"
)

// NewPresence returns Centrifuge's Redis presence manager and the broker that publishes
// join and leave.
func NewPresence(addr string) (*centrifuge.Node, *centrifuge.RedisPresenceManager, *centrifuge.RedisBroker, error) {
	node, err := centrifuge.New(centrifuge.Config{})
	if err != nil {
		return nil, nil, nil, err
	}
	shard, err := centrifuge.NewRedisShard(node, centrifuge.RedisShardConfig{Address: addr})
	if err != nil {
		return nil, nil, nil, err
	}
	shards := []*centrifuge.RedisShard{shard}
	broker, err := centrifuge.NewRedisBroker(node, centrifuge.RedisBrokerConfig{Shards: shards})
	if err != nil {
		return nil, nil, nil, err
	}
	presence, err := centrifuge.NewRedisPresenceManager(node, centrifuge.RedisPresenceManagerConfig{Shards: shards})
	if err != nil {
		return nil, nil, nil, err
	}
	node.SetBroker(broker)
	node.SetPresenceManager(presence)
	return node, presence, broker, nil
}

func startCentrifuge(cfg Config) (http.Handler, func(context.Context) error, error) {
	node, _, _, err := NewPresence(cfg.Redis)
	if err != nil {
		return nil, nil, err
	}
	info, err := json.Marshal(person)
	if err != nil {
		return nil, nil, err
	}
	node.OnConnecting(func(context.Context, centrifuge.ConnectEvent) (centrifuge.ConnectReply, error) {
		return centrifuge.ConnectReply{Credentials: &centrifuge.Credentials{UserID: "user-4711", Info: info}}, nil
	})
	node.OnConnect(func(c *centrifuge.Client) {
		c.OnSubscribe(func(_ centrifuge.SubscribeEvent, cb centrifuge.SubscribeCallback) {
			cb(centrifuge.SubscribeReply{Options: centrifuge.SubscribeOptions{
				EmitPresence: true, EmitJoinLeave: true, PushJoinLeave: true,
			}}, nil)
		})
		c.OnPublish(func(_ centrifuge.PublishEvent, cb centrifuge.PublishCallback) { cb(centrifuge.PublishReply{}, nil) })
		c.OnPresence(func(_ centrifuge.PresenceEvent, cb centrifuge.PresenceCallback) { cb(centrifuge.PresenceReply{}, nil) })
	})
	if err := node.Run(); err != nil {
		return nil, nil, err
	}
	handler := centrifuge.NewWebsocketHandler(node, centrifuge.WebsocketConfig{
		CheckOrigin:        func(*http.Request) bool { return true },
		ReadBufferSize:     512,
		UseWriteBufferPool: true,
		WriteTimeout:       10 * time.Second,
		PingPongConfig:     centrifuge.PingPongConfig{PingInterval: time.Hour, PongTimeout: time.Minute},
	})
	return handler, node.Shutdown, nil
}
