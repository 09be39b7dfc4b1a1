package store

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

var (
	//go:embed lua/rights.lua
	rightsLua    string
	rightsScript = redis.NewScript(rightsLua)
)

// pingTimeout is how long Dial waits for the client if the dialer failed.
const pingTimeout = 250 * time.Millisecond

// Dial makes one connection with the client's dialer and closes it, if the client
// allows that. It finds the reason of a failure, such as an unknown certificate: the
// client itself retries for longer than any call waits, so that the reason would be
// lost. If the client works although the dialer fails, Dial succeeds, because a hook of
// the app may make the connections in another way.
func (s *Store) Dial(ctx context.Context) error {
	c, ok := s.client.(*redis.Client)
	if !ok || c.Options().Dialer == nil {
		return nil
	}
	o := c.Options()
	_, err := call(ctx, s, func(ctx context.Context) (any, error) {
		conn, err := o.Dialer(ctx, o.Network, o.Addr)
		if err != nil {
			return nil, err
		}
		return nil, conn.Close()
	})
	if err == nil {
		return nil
	}
	short, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	if s.Ping(short) == nil {
		return nil
	}
	return err
}

// CheckRights tries everything that the library will ever ask of Redis, because a
// script that is refused halfway has done half of its work. The error is ErrForbidden
// if the user lacks a right, or ErrMissing if Redis lacks a command, and names it.
// CONFIG and expired events are not checked, because presence works without them.
// channels are tested in addition to those of the store.
func (s *Store) CheckRights(ctx context.Context, channels ...string) error {
	if err := s.checkNames(ctx); err != nil {
		return err
	}
	if err := s.checkSlots(ctx); err != nil {
		return err
	}
	if err := s.checkCommands(ctx); err != nil {
		return err
	}
	if err := s.Ping(ctx); err != nil {
		return err
	}
	// On a cluster this asks every master whether it knows the user.
	if _, err := s.generation(ctx); errors.Is(err, ErrForbidden) || errors.Is(err, ErrMissing) {
		return err
	}
	return s.checkChannels(ctx, append(channels, s.keys.ServerChannel(""), s.keys.EventsPrefix()))
}

// checkNames reads one key of each kind of name.
func (s *Store) checkNames(ctx context.Context) error {
	k := s.keys
	for _, key := range []string{
		k.Members(""), k.Conn("", ""), k.State("", ""), k.Seq(""), k.Users(""), k.Recount(""), k.RoomMeta(""), k.ConnMeta(""),
		k.Owned(0, ""), k.Fence(0, ""), k.Rooms(0), k.Kept(0), k.Instances(), k.Dead(), k.Name(""), k.Format(), k.Canary(),
	} {
		if _, err := s.typeOf(ctx, key); err != nil {
			return fmt.Errorf("key %q: %w", key, err)
		}
	}
	return nil
}

func (s *Store) typeOf(ctx context.Context, key string) (string, error) {
	return read(ctx, s, key, func(ctx context.Context) (string, error) { return s.client.Type(ctx, key).Result() })
}

// checkCommands runs every command that scripts and calls use, on each node that holds
// a bucket. Rights and renamed commands may differ from node to node.
func (s *Store) checkCommands(ctx context.Context) error {
	nodes := make(map[string]bool)
	for b := range s.keys.Buckets() {
		key := s.keys.Fence(b, "") // of no incarnation
		if cluster, ok := s.client.(*redis.ClusterClient); ok {
			node, err := call(ctx, s, func(ctx context.Context) (string, error) {
				master, err := cluster.MasterForKey(ctx, key)
				if err != nil {
					return "", err
				}
				return master.Options().Addr, nil
			})
			if err != nil {
				return err
			}
			if nodes[node] {
				continue
			}
			nodes[node] = true
		}
		if err := s.checkCommandsAt(ctx, key); err != nil {
			return err
		}
	}
	return nil
}

// checkCommandsAt runs every command on the node that holds the key. It calls EVAL
// explicitly, because Run uses EVAL only if Redis does not know the script yet.
//
// Without a cluster it names more keys, as other scripts do. Some proxies spread the
// keys of EXISTS over several nodes, but not those of a script.
func (s *Store) checkCommandsAt(ctx context.Context, key string) error {
	keys := []string{key}
	if _, ok := s.client.(*redis.Client); ok {
		keys = append(keys, s.keys.Format(), s.keys.Instances(), s.keys.Dead(), s.keys.Rooms(0))
	}
	for _, do := range []func(context.Context, redis.Scripter, []string, ...any) *redis.Cmd{
		rightsScript.Eval, rightsScript.Run,
	} {
		reply, err := within(ctx, s, s.leasing(), func(ctx context.Context) (any, error) {
			return do(ctx, s.client, keys, s.keys.EventsPrefix(), s.keys.ServerChannel("")).Result()
		})
		if err != nil {
			return err
		}
		failed, err := texts(reply)
		if err != nil {
			return err
		}
		if err := refusedCommands(failed); err != nil {
			return err
		}
	}
	return nil
}

// refusedCommands returns an error if a command does not exist or is forbidden to this
// user. Other failures, such as a lack of memory, are ignored because they may pass.
func refusedCommands(failed []string) error {
	var forbidden, missing []string
	for _, f := range failed {
		name, text, _ := strings.Cut(f, " ")
		name, text = strings.ToLower(name), withoutPrefix(text)
		switch {
		case isForbidden(text):
			forbidden = append(forbidden, name+" ("+text+")")
		case isMissing(text):
			missing = append(missing, name)
		}
	}
	switch {
	case len(missing) > 0:
		return fmt.Errorf("%w: %w: %s", ErrUnavailable, ErrMissing, strings.Join(missing, ", "))
	case len(forbidden) > 0:
		return fmt.Errorf("%w: %w: in scripts: %s", ErrUnavailable, ErrForbidden, strings.Join(forbidden, ", "))
	}
	return nil
}

// checkChannels subscribes to channels on a connection of its own, and unsubscribes
// again.
func (s *Store) checkChannels(ctx context.Context, channels []string) error {
	for _, channel := range channels {
		_, err := call(ctx, s, func(ctx context.Context) (_ any, err error) {
			ps := s.client.Subscribe(ctx)
			defer func() { _ = ps.Close() }()
			if err := ps.Subscribe(ctx, channel); err != nil {
				return nil, err
			}
			if _, err := ps.ReceiveTimeout(ctx, callTimeout); err != nil {
				return nil, err
			}
			if err := ps.Unsubscribe(ctx, channel); err != nil {
				return nil, err
			}
			return ps.ReceiveTimeout(ctx, callTimeout)
		})
		if err != nil {
			return fmt.Errorf("channel %q: %w", channel, err)
		}
	}
	return nil
}
