package faults

import (
	"log/slog"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/redistest"
)

var lossCases = []faultCase{
	{"scripts flushed", scriptsFlushed},
	{"no CONFIG command", withoutConfig(nil, redistest.Args("--rename-command", "CONFIG", ""))},
	{"user without CONFIG", withoutConfig(
		&redis.Options{Username: "app", Password: "pw"}, redistest.Args("--user", "app", "on", ">pw", "~*", "&*", "+@all", "-config"))},
}

// scriptsFlushed makes Redis forget the scripts repeatedly.
func scriptsFlushed(t *testing.T) {
	w := harness.RealWorld(t)
	d := newDrill(w, 2, []string{"a", "b"}, harness.LeaseOf(2*time.Second))
	stay := d.members(3)
	d.churn(8)
	admin := w.Client()
	for range 20 {
		d.Sleep(50 * time.Millisecond)
		require.NoError(t, admin.ScriptFlush(t.Context()).Err())
	}
	d.stopChurn()
	d.settles(time.Now(), time.Second)
	for _, s := range d.servers {
		require.Zero(t, s.Stats().Retries, "no batch failed")
		require.Zero(t, s.Stats().RedisFailures)
	}
	d.stayed(stay)
	d.finish()
}

// withoutConfig starts servers that can neither read nor change the setting for expired
// events. Everything must work, and each server logs one warning.
func withoutConfig(user *redis.Options, opt redistest.Option) func(t *testing.T) {
	return func(t *testing.T) {
		w := harness.RealWorld(t, opt)
		var log testlog.Warnings
		d := newDrill(w, 1, []string{"lobby"}, harness.LeaseOf(2*time.Second), func(o *mesh.Options) {
			o.Logger = slog.New(&log)
			if user != nil {
				user.Addr = w.Real.Addr()
				c := redis.NewClient(user)
				t.Cleanup(func() { _ = c.Close() })
				o.Redis = c
			}
		})
		stay := d.members(3)
		victim := w.Child(harness.ChildConfig{Lease: 2 * time.Second, Events: true})
		p := victim.Dial()
		d.note("lobby", p.ID, p.In("lobby"))
		d.settles(time.Now(), 2*time.Second)
		d.awaitContact()
		require.False(t, d.servers[0].Stats().ExpiredEventsWorking)
		victim.Die()
		d.forget(p)
		d.settles(time.Now(), 3*time.Second)
		d.stayed(stay)
		require.Len(t, log.Texts(), 1, "warnings")
		d.finish()
	}
}
