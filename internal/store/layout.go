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

// layoutVersion is written to one key. All servers of one Redis must agree on it.
const (
	layoutVersion = 2
	// usualBuckets is the number of buckets if that key holds only a version.
	usualBuckets = 64
)

// ErrOtherFormat means that keys under the prefix are not of this layout.
var ErrOtherFormat = errors.New("store: keys of another format under this prefix")

// CheckServer checks that a Redis that is not a cluster to the client takes writes. The
// error is ErrMisfit if waiting would not help. A client of a cluster does not need
// this check: its first command shows whether the server is a cluster.
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

// checkSlots sends a command with keys of different slots. A Redis Cluster refuses it,
// even if one node has all slots.
func (s *Store) checkSlots(ctx context.Context) error {
	if _, ok := s.client.(*redis.Client); !ok {
		return nil
	}
	keys := []string{s.keys.Format(), s.keys.Instances(), s.keys.Dead(), s.keys.Rooms(0)}
	_, err := call(ctx, s, func(ctx context.Context) (int64, error) { return s.client.Exists(ctx, keys...).Result() })
	return err
}

// info reads a section of INFO. It returns "" if the server has no such section.
func (s *Store) info(ctx context.Context, section string) (string, error) {
	text, err := call(ctx, s, func(ctx context.Context) (string, error) { return s.client.Info(ctx, section).Result() })
	if err != nil && isRedisError(err) && !errors.Is(err, ErrForbidden) && !errors.Is(err, ErrMisfit) {
		return "", nil
	}
	return text, err
}

// Traits are properties of a Redis that have a cost but do not prevent operation.
type Traits struct {
	// Evicts is the maxmemory-policy. It is "" if that is noeviction or unknown.
	Evicts string
	// NoRunID means that the Redis processes have no run_id, and are told apart by
	// other fields of INFO. Anonymous means that INFO does not have those either.
	NoRunID, Anonymous bool
}

// Traits asks every master for these properties. Properties that it cannot learn stay
// zero.
func (s *Store) Traits(ctx context.Context) Traits {
	var t Traits
	_, err := s.generation(ctx)
	t.Anonymous = errors.Is(err, errAnonymous) || err != nil && isRedisError(err)
	t.NoRunID = s.generations.anyWeak()
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
			err = nil // one master that evicts is enough for the warning
		}
		return policy, err
	})
	return t
}

// Nodes returns the number of nodes behind the client, replicas included.
func (s *Store) Nodes(ctx context.Context) (int, error) {
	return call(ctx, s, func(ctx context.Context) (int, error) {
		nodes, err := listNodes(ctx, s.client)
		return len(nodes), err
	})
}

// CheckFormat claims the prefix for this layout. It returns an error, and writes
// nothing, if the prefix holds a newer layout, a layout for another kind of client or
// number of buckets, or keys of other software.
func (s *Store) CheckFormat(ctx context.Context) error {
	// This check comes before the one for keys of other software, because some keys of
	// this library have the same names.
	switch kind, err := s.typeOf(ctx, s.keys.OtherFormat()); {
	case err != nil:
		return err
	case kind == "string" && s.keys.Clustered():
		return fmt.Errorf("%w: %s was written by servers of this library that do not use a Redis Cluster (*redis.Client)", ErrOtherFormat, s.keys.OtherFormat())
	case kind == "string":
		return fmt.Errorf("%w: %s was written by servers of this library that use a Redis Cluster (*redis.ClusterClient)", ErrOtherFormat, s.keys.OtherFormat())
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
		return fmt.Errorf("%w: %s holds %.20q, this version writes %q", ErrOtherFormat, s.keys.Format(), found, s.layout())
	}
	if !spread {
		buckets = strconv.Itoa(usualBuckets)
	}
	return fmt.Errorf("%w: %s says that servers of this library spread rooms over %.20s buckets, and this one over %d: set Options.Buckets to the same",
		ErrOtherFormat, s.keys.Format(), buckets, s.keys.Buckets())
}

// layout returns the value of the format key: the version and, on a cluster with an
// unusual number of buckets, that number.
func (s *Store) layout() string {
	if s.keys.Clustered() && s.keys.Buckets() != usualBuckets {
		return fmt.Sprintf("%d %d", layoutVersion, s.keys.Buckets())
	}
	return strconv.Itoa(layoutVersion)
}

// checkTypes returns an error if it finds keys that this library does not write.
func (s *Store) checkTypes(ctx context.Context) error {
	want := [][2]string{
		{s.keys.Format(), "string"}, {s.keys.Instances(), "zset"}, {s.keys.Dead(), "zset"}, {s.keys.Rooms(0), "set"},
	}
	for _, key := range s.keys.OtherServerKeys() {
		want = append(want, [2]string{key, "none"})
	}
	for _, w := range want {
		key, kind := w[0], w[1]
		got, err := s.typeOf(ctx, key)
		switch {
		case err != nil:
			return err
		case kind == "none" && got != kind:
			return fmt.Errorf("%w: %s is a %s of other software", ErrOtherFormat, key, got)
		case got != "none" && got != kind:
			return fmt.Errorf("%w: %s is a %s, expected a %s", ErrOtherFormat, key, got, kind)
		}
	}
	return nil
}

// claim writes value to a key that has none, and returns the value that the key then
// has.
func (s *Store) claim(ctx context.Context, key, value string) (string, error) {
	return call(ctx, s, func(ctx context.Context) (string, error) {
		if err := s.client.SetNX(ctx, key, value, 0).Err(); err != nil {
			return "", err
		}
		return s.client.Get(ctx, key).Result()
	})
}
