package harness

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/meshtest"
)

// Refusal makes Redis answer but refuse writes.
type Refusal struct {
	Text       string // text of the errors
	Begin, End func(ctx context.Context, admin redis.UniversalClient) error
}

var (
	MemoryFull = Refusal{"OOM", Configured("maxmemory", "1"), Configured("maxmemory", "0")}
	NoReplicas = Refusal{"NOREPLICAS", Configured("min-replicas-to-write", "1"), Configured("min-replicas-to-write", "0")}
	ReadOnly   = Refusal{"READONLY", replicaOf("127.0.0.1", "1"), replicaOf("NO", "ONE")}
	SaveFailed = Refusal{"MISCONF", saveFails, Configured("stop-writes-on-bgsave-error", "no")}
)

func Configured(name, value string) func(context.Context, redis.UniversalClient) error {
	return func(ctx context.Context, admin redis.UniversalClient) error {
		return admin.ConfigSet(ctx, name, value).Err()
	}
}

// replicaOf makes Redis the replica of an address.
func replicaOf(host, port string) func(context.Context, redis.UniversalClient) error {
	return func(ctx context.Context, admin redis.UniversalClient) error {
		return admin.Do(ctx, "REPLICAOF", host, port).Err()
	}
}

// saveFails makes Redis fail to save, and therefore refuse writes: a directory is in
// the place of the dump file.
func saveFails(ctx context.Context, admin redis.UniversalClient) error {
	dir, err := admin.ConfigGet(ctx, "dir").Result()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir["dir"], "dump.rdb", "in the way"), 0o700); err != nil {
		return err
	}
	if err := admin.ConfigSet(ctx, "save", "86400 1000000").Err(); err != nil {
		return err
	}
	if err := admin.BgSave(ctx).Err(); err != nil {
		return err
	}
	for {
		info, err := admin.Info(ctx, "persistence").Result()
		if err != nil || strings.Contains(info, "rdb_last_bgsave_status:err") {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// OutageKind is a way in which Redis becomes unavailable.
type OutageKind struct{ Begin, End func(*meshtest.Redis) }

// Outages make writes fail on the embedded Redis.
var Outages = map[string]OutageKind{
	"refused": {
		func(r *meshtest.Redis) { r.SetError("NOREPLICAS Not enough good replicas to write.") },
		func(r *meshtest.Redis) { r.SetError("") },
	},
	"read only": {
		func(r *meshtest.Redis) { r.SetError("READONLY You can't write against a read only replica.") },
		func(r *meshtest.Redis) { r.SetError("") },
	},
	"hang": {(*meshtest.Redis).Hang, (*meshtest.Redis).Resume},
	"cut":  {(*meshtest.Redis).Cut, (*meshtest.Redis).Heal},
}

// DeafToLeases is a Redis client that fails the first few registrations of leases.
type DeafToLeases struct {
	lease.Store
	Left atomic.Int32
}

func (d *DeafToLeases) Register(ctx context.Context, inc string, ttl time.Duration) (int64, error) {
	if d.Left.Add(-1) >= 0 {
		return 0, store.ErrUnavailable
	}
	return d.Store.Register(ctx, inc, ttl)
}
