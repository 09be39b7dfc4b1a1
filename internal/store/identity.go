package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// uptimeSlack is the tolerance for the uptime of a process. INFO reports whole seconds,
// and clocks differ.
const uptimeSlack = 2 * time.Second

// errAnonymous means that INFO reports nothing that identifies a process.
var errAnonymous = errors.New("store: INFO does not identify the redis process")

// Generation returns the identity of the Redis process that answers, or of all masters
// of a cluster. It changes if Redis restarts or fails over. It returns false if the
// identity is unknown, for example because a master of a cluster did not answer.
func (s *Store) Generation(ctx context.Context) (string, bool) {
	id, err := s.generation(ctx)
	return id, err == nil && id != ""
}

// generation is Generation with the reason for a failure.
func (s *Store) generation(ctx context.Context) (string, error) {
	return within(ctx, s, s.unqueued(), func(ctx context.Context) (string, error) {
		var (
			mu  sync.Mutex // guards ids: the cluster client calls from many goroutines
			ids []string
		)
		err := s.eachMaster(ctx, func(ctx context.Context, addr string, master redis.Cmdable) error {
			id, err := s.generations.identify(ctx, addr, master)
			mu.Lock()
			defer mu.Unlock()
			ids = append(ids, id)
			return err
		})
		slices.Sort(ids)
		return strings.Join(ids, " "), err
	})
}

// eachMaster calls f once for every master of a cluster, from several goroutines, or
// once for the only Redis, with the address "".
func (s *Store) eachMaster(ctx context.Context, f func(ctx context.Context, addr string, master redis.Cmdable) error) error {
	cluster, ok := s.client.(clusterNodes)
	if !ok {
		return f(ctx, "", s.client)
	}
	return cluster.ForEachMaster(ctx, func(ctx context.Context, master *redis.Client) error {
		// The cluster client does not recover panics of hooks.
		_, err := isolated(ctx, shortGrace, func() (any, error) { return nil, f(ctx, master.Options().Addr, master) })
		return err
	})
}

// infoField returns the value of a field in an answer to INFO, or "".
func infoField(info, name string) string {
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// generations identifies Redis processes. Redis and Valkey report a run_id. Other
// servers (Dragonfly, Kvrocks) do not. There the process id, the port and the
// replication id together identify a process as long as its uptime grows with the
// clock. In containers all process ids and ports are alike, and only a failover changes
// the replication id.
type generations struct {
	mu   sync.Mutex // guards the fields below
	weak bool       // a process without a run_id was seen
	seen map[string]sighting
}

// sighting is the last answer of a process without a run_id.
type sighting struct {
	traits   string
	up       time.Duration // uptime; -1: unknown
	at       time.Time
	restarts int // number of earlier processes with these traits at this address
}

// identify asks a process for its identity.
func (p *generations) identify(ctx context.Context, addr string, c redis.Cmdable) (string, error) {
	info, err := c.Info(ctx, "server").Result()
	if err != nil {
		return "", err
	}
	if id := infoField(info, "run_id"); id != "" {
		return id, nil
	}
	replication, err := c.Info(ctx, "replication").Result()
	if err != nil && !isRedisError(err) {
		return "", err
	}
	now := sighting{up: -1, at: time.Now()}
	if up, err := strconv.ParseInt(infoField(info, "uptime_in_seconds"), 10, 32); err == nil {
		now.up = time.Duration(up) * time.Second
	}
	now.traits = fmt.Sprintf("%s/%s/%s", infoField(info, "process_id"), infoField(info, "tcp_port"), infoField(replication, "master_replid"))
	if now.traits == "//" && now.up < 0 {
		return "", errAnonymous
	}
	return p.note(addr, now), nil
}

// note records a sighting and returns the identity of the process.
func (p *generations) note(addr string, now sighting) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.weak = true
	was, known := p.seen[addr]
	now.restarts = was.restarts
	if known && (was.traits != now.traits || was.restarted(now)) {
		now.restarts++
	}
	if p.seen == nil {
		p.seen = make(map[string]sighting)
	}
	p.seen[addr] = now
	return fmt.Sprintf("%s@%s#%d", now.traits, addr, now.restarts)
}

// restarted reports whether the process of the new sighting is younger than the one of
// the last sighting would be by now. Over a long time the two clocks may drift.
func (was sighting) restarted(now sighting) bool {
	if was.up < 0 || now.up < 0 {
		return false
	}
	passed := now.at.Sub(was.at)
	return now.up < was.up+passed-uptimeSlack-passed/1000
}

// anyWeak reports whether a process without a run_id was seen.
func (p *generations) anyWeak() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.weak
}
