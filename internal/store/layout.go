package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/redis/go-redis/v9"
)

// layoutVersion is written to one key; servers of one Redis must agree on it.
const (
	layoutVersion = 1
	// usualBuckets is the number of buckets if that key holds no number.
	usualBuckets = 64
)

// ErrForeign says that keys under the prefix are not of this layout.
var ErrForeign = errors.New("store: keys of another format under this prefix")

// CheckServer asks a Redis that is no cluster to the client whether it is one
// that takes writes. The error is ErrMisfit if waiting would not help. (A client
// of a cluster learns from its first command whether there is one.)
func (s *Store) CheckServer(ctx context.Context) error {
	c, ok := s.client.(*redis.Client)
	if !ok {
		return nil
	}
	server, err := s.info(ctx, "server")
	if err != nil {
		return err
	}
	if infoField(server, "redis_mode") == "sentinel" {
		return fmt.Errorf("%w: %w: this is a Sentinel, so use redis.NewFailoverClient", ErrUnavailable, ErrMisfit)
	}
	replication, err := s.info(ctx, "replication")
	switch {
	case err != nil:
		return err
	case infoField(replication, "role") != "slave":
		return nil
	case followsMaster(c):
		return fmt.Errorf("%w: the master that Sentinel names is still a replica", ErrUnavailable)
	case infoField(server, "redis_mode") == "cluster":
		return fmt.Errorf("%w: %w: %s", ErrUnavailable, ErrMisfit, useCluster)
	}
	return fmt.Errorf("%w: %w: %s", ErrUnavailable, ErrMisfit, useMaster)
}

// checkSlots names keys of different slots in one command. A Redis Cluster
// refuses that, even if one node has all slots.
func (s *Store) checkSlots(ctx context.Context) error {
	if _, ok := s.client.(*redis.Client); !ok {
		return nil
	}
	keys := []string{s.keys.Format(), s.keys.Instances(), s.keys.Dead(), s.keys.Rooms(0)}
	_, err := call(ctx, s, func(ctx context.Context) (int64, error) { return s.client.Exists(ctx, keys...).Result() })
	return err
}

// info asks for a section of INFO; "" if this server has none of that name.
func (s *Store) info(ctx context.Context, section string) (string, error) {
	text, err := call(ctx, s, func(ctx context.Context) (string, error) { return s.client.Info(ctx, section).Result() })
	if err != nil && redisSaid(err) && !errors.Is(err, ErrForbidden) && !errors.Is(err, ErrMisfit) {
		return "", nil
	}
	return text, err
}

// Traits are peculiarities of a Redis that cost something but are no obstacle.
type Traits struct {
	// Evicts is the maxmemory-policy if it is not noeviction, "" otherwise or
	// if INFO does not tell.
	Evicts string
	// NoRunID says that Redis processes have no run_id, and are told apart by
	// other fields of INFO. Anonymous says that there are none either.
	NoRunID, Anonymous bool
}

// Traits asks every master for its peculiarities. It leaves out those that it
// cannot learn.
func (s *Store) Traits(ctx context.Context) Traits {
	var t Traits
	_, err := s.process(ctx)
	t.Anonymous = errors.Is(err, errAnonymous) || err != nil && redisSaid(err)
	t.NoRunID = s.processes.anyWeak()
	t.Evicts, _ = call(ctx, s, func(ctx context.Context) (string, error) {
		var (
			mu     sync.Mutex // guards policy: the cluster client calls from many goroutines
			policy string
		)
		err := s.eachMaster(ctx, func(ctx context.Context, _ string, master redis.Cmdable) error {
			info, err := master.Info(ctx, "memory").Result()
			if p := infoField(info, "maxmemory_policy"); err == nil && p != "" && p != "noeviction" {
				mu.Lock()
				defer mu.Unlock()
				policy = p
			}
			return err
		})
		if policy != "" {
			err = nil // one master that evicts is enough to say so
		}
		return policy, err
	})
	return t
}

// Nodes returns how many nodes are behind the client, replicas included.
func (s *Store) Nodes(ctx context.Context) (int, error) {
	return call(ctx, s, func(ctx context.Context) (int, error) {
		nodes, err := listNodes(ctx, s.client)
		return len(nodes), err
	})
}

// CheckFormat claims the prefix for this layout, or says why it cannot: a newer
// layout, one for another kind of client or number of buckets, or keys of other
// software. Then it writes nothing.
func (s *Store) CheckFormat(ctx context.Context) error {
	// Before keys of other software: some of ours have the names of theirs.
	switch kind, err := s.typeOf(ctx, s.keys.OtherFormat()); {
	case err != nil:
		return err
	case kind == "string" && s.keys.Clustered():
		return fmt.Errorf("%w: %s was written by servers of this library that do not use a Redis Cluster (*redis.Client)", ErrForeign, s.keys.OtherFormat())
	case kind == "string":
		return fmt.Errorf("%w: %s was written by servers of this library that use a Redis Cluster (*redis.ClusterClient)", ErrForeign, s.keys.OtherFormat())
	}
	if err := s.checkTypes(ctx); err != nil {
		return err
	}
	found, err := s.claim(ctx, s.keys.Format(), s.layout())
	if err != nil || found == s.layout() {
		return err
	}
	version, buckets, spread := strings.Cut(found, " ")
	if version != strconv.Itoa(layoutVersion) || !s.keys.Clustered() {
		return fmt.Errorf("%w: %s holds %.20q, this version writes %q", ErrForeign, s.keys.Format(), found, s.layout())
	}
	if !spread {
		buckets = strconv.Itoa(usualBuckets)
	}
	return fmt.Errorf("%w: %s says that servers of this library spread rooms over %.20s buckets, and this one over %d: set Options.Buckets to the same",
		ErrForeign, s.keys.Format(), buckets, s.keys.Buckets())
}

// layout is what Format holds: the version, and on a cluster the number of
// buckets, unless it is the usual one.
func (s *Store) layout() string {
	if s.keys.Clustered() && s.keys.Buckets() != usualBuckets {
		return fmt.Sprintf("%d %d", layoutVersion, s.keys.Buckets())
	}
	return strconv.Itoa(layoutVersion)
}

// checkTypes looks for keys that this library does not write.
func (s *Store) checkTypes(ctx context.Context) error {
	want := [][2]string{
		{s.keys.Format(), "string"}, {s.keys.Instances(), "zset"}, {s.keys.Dead(), "zset"}, {s.keys.Rooms(0), "set"},
	}
	for _, key := range s.keys.Foreign() {
		want = append(want, [2]string{key, "none"})
	}
	for _, w := range want {
		key, kind := w[0], w[1]
		got, err := s.typeOf(ctx, key)
		switch {
		case err != nil:
			return err
		case kind == "none" && got != kind:
			return fmt.Errorf("%w: %s is a %s of other software", ErrForeign, key, got)
		case got != "none" && got != kind:
			return fmt.Errorf("%w: %s is a %s, expected a %s", ErrForeign, key, got, kind)
		}
	}
	return nil
}

// claim writes a value to a key that has none, and returns what it then holds.
func (s *Store) claim(ctx context.Context, key, value string) (string, error) {
	return call(ctx, s, func(ctx context.Context) (string, error) {
		if err := s.client.SetNX(ctx, key, value, 0).Err(); err != nil {
			return "", err
		}
		return s.client.Get(ctx, key).Result()
	})
}
