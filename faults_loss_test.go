package mesh

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

var lossCases = []faultCase{
	{"scripts flushed", scriptsFlushed},
	{"no CONFIG command", withoutConfig(nil, redistest.Args("--rename-command", "CONFIG", ""))},
	{"user without CONFIG", withoutConfig(
		&redis.Options{Username: "app", Password: "pw"}, redistest.Args("--user", "app", "on", ">pw", "~*", "&*", "+@all", "-config"))},
}

// scriptsFlushed: Redis forgets the scripts again and again.
func scriptsFlushed(t *testing.T) {
	w := realWorld(t)
	d := newDrill(w, 2, []string{"a", "b"}, leaseOf(2*time.Second))
	stay := d.members(3)
	d.churn(8)
	admin := w.client()
	for range 20 {
		d.sleep(50 * time.Millisecond)
		require.NoError(t, admin.ScriptFlush(t.Context()).Err())
	}
	d.calm()
	d.settles(time.Now(), time.Second)
	for _, s := range d.servers {
		require.Zero(t, s.Stats().Retries, "no batch failed")
		require.Zero(t, s.Stats().RedisFailures)
	}
	d.stayed(stay)
	d.over()
}

// withoutConfig: the setting of the expired events can neither be read nor
// changed. Everything works, and the log says so once.
func withoutConfig(user *redis.Options, opt redistest.Option) func(t *testing.T) {
	return func(t *testing.T) {
		w := realWorld(t, opt)
		var log warnings
		d := newDrill(w, 1, []string{"lobby"}, leaseOf(2*time.Second), func(o *Options) {
			o.Logger = slog.New(&log)
			if user != nil {
				user.Addr = w.real.Addr()
				c := redis.NewClient(user)
				t.Cleanup(func() { _ = c.Close() })
				o.Redis = c
			}
		})
		stay := d.members(3)
		victim := w.child(childConfig{Lease: 2 * time.Second, Events: true})
		p := victim.dial()
		d.note("lobby", p.id, p.in("lobby"))
		d.settles(time.Now(), 2*time.Second)
		d.patient()
		require.False(t, d.servers[0].Stats().ExpiredEvents)
		victim.die()
		d.forget(p)
		d.settles(time.Now(), 3*time.Second)
		d.stayed(stay)
		require.Len(t, log.texts(), 1, "warnings")
		d.over()
	}
}

// warnings is a slog.Handler that keeps what is serious.
type warnings struct {
	mu   sync.Mutex // guards list
	list []string
}

func (w *warnings) texts() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.list...)
}

func (w *warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

func (w *warnings) Handle(_ context.Context, r slog.Record) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := r.Message
	r.Attrs(func(a slog.Attr) bool { text += fmt.Sprintf(" %s=%v", a.Key, a.Value); return true })
	w.list = append(w.list, text)
	return nil
}

func (w *warnings) WithAttrs([]slog.Attr) slog.Handler { return w }
func (w *warnings) WithGroup(string) slog.Handler      { return w }
