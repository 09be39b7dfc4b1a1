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

// uptimeSlack is the time by which the uptime of a process may fall short of the
// expected one: INFO tells whole seconds, and clocks differ.
const uptimeSlack = 2 * time.Second

// errAnonymous says that INFO tells nothing by which processes can be told apart.
var errAnonymous = errors.New("store: INFO does not identify the redis process")

// Generation identifies the Redis process that answers, or all masters of a
// cluster. It changes when Redis restarts or fails over. False: it is unknown,
// on a cluster because at least one master did not answer.
func (s *Store) Generation(ctx context.Context) (string, bool) {
	id, err := s.process(ctx)
	return id, err == nil && id != ""
}

// process is Generation, and why it is unknown.
func (s *Store) process(ctx context.Context) (string, error) {
	return within(ctx, s, s.unqueued(), func(ctx context.Context) (string, error) {
		var (
			mu  sync.Mutex // guards ids: the cluster client calls from many goroutines
			ids []string
		)
		err := s.eachMaster(ctx, func(ctx context.Context, addr string, master redis.Cmdable) error {
			id, err := s.processes.identify(ctx, addr, master)
			mu.Lock()
			defer mu.Unlock()
			ids = append(ids, id)
			return err
		})
		slices.Sort(ids)
		return strings.Join(ids, " "), err
	})
}

// eachMaster calls f for every master of a cluster, from many goroutines, or
// once for the only Redis, whose address is "".
func (s *Store) eachMaster(ctx context.Context, f func(ctx context.Context, addr string, master redis.Cmdable) error) error {
	cluster, ok := s.client.(clusterNodes)
	if !ok {
		return f(ctx, "", s.client)
	}
	return cluster.ForEachMaster(ctx, func(ctx context.Context, master *redis.Client) error {
		// The cluster client does not recover.
		_, err := protected(ctx, soon, func() (any, error) { return nil, f(ctx, master.Options().Addr, master) })
		return err
	})
}

// infoField returns a field of an answer to INFO, "" if it has none.
func infoField(info, name string) string {
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// processes identifies Redis processes. Redis and Valkey tell a run_id. Other
// servers (Dragonfly, Kvrocks) do not: there the process id, the port and the
// replication id together identify a process, as long as its uptime grows with
// the clock. In containers process ids and ports are all alike, and only a
// failover changes the replication id.
type processes struct {
	mu   sync.Mutex // guards the fields below
	weak bool       // a process without a run_id was seen
	seen map[string]sighting
}

// sighting is the last answer of a process without a run_id.
type sighting struct {
	traits string
	up     time.Duration // -1: it does not tell
	at     time.Time
	lives  int // processes of these traits that were seen at this address
}

// identify asks a process for its identity.
func (p *processes) identify(ctx context.Context, addr string, c redis.Cmdable) (string, error) {
	info, err := c.Info(ctx, "server").Result()
	if err != nil {
		return "", err
	}
	if id := infoField(info, "run_id"); id != "" {
		return id, nil
	}
	replication, err := c.Info(ctx, "replication").Result()
	if err != nil && !redisSaid(err) {
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

// note returns the identity of a process that was seen now.
func (p *processes) note(addr string, now sighting) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.weak = true
	was, known := p.seen[addr]
	now.lives = was.lives
	if known && (was.traits != now.traits || was.restarted(now)) {
		now.lives++
	}
	if p.seen == nil {
		p.seen = make(map[string]sighting)
	}
	p.seen[addr] = now
	return fmt.Sprintf("%s@%s#%d", now.traits, addr, now.lives)
}

// restarted reports whether the process has been up for less time than one that
// lived at the last sighting. Over a long time the two clocks may drift.
func (was sighting) restarted(now sighting) bool {
	if was.up < 0 || now.up < 0 {
		return false
	}
	passed := now.at.Sub(was.at)
	return now.up < was.up+passed-uptimeSlack-passed/1000
}

// anyWeak reports whether a process without a run_id was seen.
func (p *processes) anyWeak() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.weak
}
