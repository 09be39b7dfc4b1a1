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

// ErrForbidden says that Redis refuses who asks: the user or the password is
// wrong, or the ACL lacks a command, a key pattern or a channel. It is an
// ErrUnavailable, for somebody may put that right while servers run.
var ErrForbidden = errors.New("store: redis refuses this user")

// forbidden reports whether an error of Redis is about who asks.
func forbidden(err error) bool {
	if redis.IsPermissionError(err) || redis.IsAuthError(err) {
		return true
	}
	var answer redis.Error
	return errors.As(err, &answer) && forbiddenInScript(answer.Error())
}

// forbiddenInScript reports whether an error that a command has met in a script
// is about who runs it. Before Redis 7.2 those have no code of their own.
func forbiddenInScript(text string) bool {
	for _, mark := range []string{"NOPERM", "The user executing the script", "ACL failure in script"} {
		if strings.Contains(text, mark) {
			return true
		}
	}
	return false
}

// pingTimeout is how long a client is waited for that may get through where its
// dialer does not.
const pingTimeout = 250 * time.Millisecond

// Dial makes one connection and closes it, where that can be done: it tells
// what stands against it, an unknown certificate for instance. The client tries
// again for longer than any call waits, so that nobody would learn that from it.
// What the dialer says does not count where the client gets through all the
// same: a hook of the app's may make its connections in another way.
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

// CheckRights tries whether this user may do everything that will be asked of
// Redis sooner or later: a script that finds out on its way would have done
// half of its work. The error is ErrForbidden and names what is missing, or
// what stood against finding out. CONFIG and expired events are not among it:
// there is a way without them.
func (s *Store) CheckRights(ctx context.Context) error {
	if err := s.checkNames(ctx); err != nil {
		return err
	}
	if err := s.checkCommands(ctx); err != nil {
		return err
	}
	if err := s.Ping(ctx); err != nil {
		return err
	}
	// On a cluster this is what asks every master whether it knows the user: the
	// rest goes where the names happen to lead.
	if _, err := s.process(ctx); errors.Is(err, ErrForbidden) {
		return err
	}
	return s.checkChannels(ctx)
}

// checkNames asks for one key of each kind of name.
func (s *Store) checkNames(ctx context.Context) error {
	k := s.keys
	for _, key := range []string{
		k.Members(""), k.Conn("", ""), k.State("", ""), k.Seq(""), k.RoomMeta(""), k.ConnMeta(""), k.Owned(0, ""),
		k.Fence(0, ""), k.Rooms(0), k.Instances(), k.Dead(), k.Format(), k.Canary(),
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

// checkCommands runs what scripts and calls are made of. EVALSHA comes first:
// the text follows only where Redis does not know the script yet, so EVAL is
// asked for by itself.
func (s *Store) checkCommands(ctx context.Context) error {
	key := s.keys.Fence(0, "") // that of no incarnation: a canary may be of any slot
	for _, do := range []func(context.Context, redis.Scripter, []string, ...any) *redis.Cmd{
		rightsScript.Eval, rightsScript.Run,
	} {
		reply, err := within(ctx, s, s.leasing(), func(ctx context.Context) (any, error) {
			return do(ctx, s.client, []string{key}, s.keys.EventsPrefix(), s.keys.Control("")).Result()
		})
		if err != nil {
			return err
		}
		failed, err := texts(reply)
		if err != nil {
			return err
		}
		if err := s.missing(failed); err != nil {
			return err
		}
	}
	return nil
}

// missing turns what commands in a script have met into an error, nil where
// nothing of it is about who runs it.
func (s *Store) missing(failed []string) error {
	var lacks []string
	for _, f := range failed {
		name, text, _ := strings.Cut(f, " ")
		if forbiddenInScript(text) {
			lacks = append(lacks, strings.ToLower(name)+" ("+text+")")
		}
	}
	if len(lacks) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w: in scripts: %s", ErrUnavailable, ErrForbidden, strings.Join(lacks, ", "))
}

// checkChannels subscribes to a channel of each kind of name, on a connection
// of its own, and unsubscribes again.
func (s *Store) checkChannels(ctx context.Context) error {
	for _, channel := range []string{s.keys.Control(""), s.keys.EventsPrefix()} {
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
