package harness

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// KeyLife returns the TTL of a key, or 0 if the key does not exist or has no TTL.
func KeyLife(t *testing.T, c redis.UniversalClient, key string) time.Duration {
	t.Helper()
	d, err := c.PTTL(t.Context(), key).Result()
	require.NoError(t, err)
	return max(d, 0)
}

// KeyExists reports whether a key exists.
func KeyExists(t *testing.T, c redis.UniversalClient, key string) bool {
	t.Helper()
	n, err := c.Exists(t.Context(), key).Result()
	require.NoError(t, err)
	return n == 1
}

// Subscribers connects one subscriber of a room to each server.
func Subscribers(room string, servers ...*Server) []*Peer {
	list := make([]*Peer, len(servers))
	for i, s := range servers {
		s.W.T.Helper()
		list[i] = s.Dial()
		list[i].Subscribe(room)
	}
	return list
}

// CommandLog is a hook that records the commands of a client.
type CommandLog struct {
	mu    sync.Mutex // guards names
	names []string
}

func (l *CommandLog) DialHook(next redis.DialHook) redis.DialHook { return next }

func (l *CommandLog) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		l.note(cmd)
		return next(ctx, cmd)
	}
}

func (l *CommandLog) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		l.note(cmds...)
		return next(ctx, cmds)
	}
}

func (l *CommandLog) note(cmds ...redis.Cmder) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range cmds {
		l.names = append(l.names, strings.ToLower(c.Name()))
	}
}

// Sent returns the number of commands with a name. An empty name means all commands.
func (l *CommandLog) Sent(name string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, s := range l.names {
		if name == "" || s == name {
			n++
		}
	}
	return n
}

// Counts returns the number of commands by name.
func (l *CommandLog) Counts() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	counts := make(map[string]int)
	for _, s := range l.names {
		counts[s]++
	}
	return counts
}

// Logging records the commands of a server.
func (l *CommandLog) Logging(o *mesh.Options) {
	if c, ok := o.Redis.(*redis.ClusterClient); ok {
		c.OnNewNode(func(node *redis.Client) { node.AddHook(l) })
		return
	}
	o.Redis.AddHook(l)
}
