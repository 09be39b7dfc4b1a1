package mesh_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

func named(name string) func(*mesh.Options) { return func(o *mesh.Options) { o.Name = name } }

// Each server knows the names of all, as long as they are on a list.
func TestNamesOfServers(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s, other := w.Tracked(named("ann")), w.Server(named("bob ü"))
		hidden := w.Server(func(o *mesh.Options) { mesh.SetHost(o, "") })
		names := func() map[string]string {
			list, err := s.Servers(t.Context())
			require.NoError(t, err)
			found := make(map[string]string)
			for _, info := range list {
				found[info.Incarnation] = info.Name
			}
			return found
		}
		want := map[string]string{s.Stats().Incarnation: "ann", other.Stats().Incarnation: "bob ü", hidden.Stats().Incarnation: ""}
		require.Equal(t, want, names())

		// It has an end of its own: servers of a version without names do not delete it.
		key := w.Keys().Name(other.Stats().Incarnation)
		left, err := w.Client().PTTL(t.Context(), key).Result()
		require.NoError(t, err)
		assert.Positive(t, left)
		assert.LessOrEqual(t, left, 24*time.Hour)
		require.Zero(t, w.Client().Exists(t.Context(), w.Keys().Name(hidden.Stats().Incarnation)).Val(), "no name, no key")

		// It is restored if it is lost, and replaces what is in its way.
		require.NoError(t, w.Client().Del(t.Context(), key).Err())
		w.Eventually(20*time.Second, func() bool { return names()[other.Stats().Incarnation] == "bob ü" }, "the name is back")
		require.NoError(t, w.Client().Del(t.Context(), key).Err())
		require.NoError(t, w.Client().SAdd(t.Context(), key, "x").Err())
		require.Empty(t, names()[other.Stats().Incarnation], "a key of another type is no name")
		w.Eventually(20*time.Second, func() bool { return names()[other.Stats().Incarnation] == "bob ü" }, "the name is back")

		require.NoError(t, other.Shutdown(t.Context()))
		require.Zero(t, w.Client().Exists(t.Context(), key).Val(), "nothing of it is left")
		delete(want, testhook.PartsOf(other.Server).Lease.Incarnation())
		require.Equal(t, want, names())
	})
}

// A name that somebody has put into Redis by hand and that no server can have is
// left out.
func TestNamesThatNoServerCanHave(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, c := w.Tracked(named("ann")), w.Client()
		require.NoError(t, c.ZAdd(t.Context(), w.Keys().Instances(), redis.Z{Score: float64(w.Mem.Now().Add(time.Minute).UnixMilli()), Member: "x"}).Err())
		for _, name := range []string{"a\nb", "\xff", strings.Repeat("x", 129)} {
			require.NoError(t, c.Set(t.Context(), w.Keys().Name("x"), name, 0).Err())
			assert.Empty(t, w.Found(s, "x").Name)
		}
		require.NoError(t, c.Set(t.Context(), w.Keys().Name("x"), "xaver", 0).Err())
		assert.Equal(t, "xaver", w.Found(s, "x").Name)
	})
}

// A server that died keeps its name until it has been cleaned up after. One that was
// taken for dead has it under its new incarnation.
func TestNameOfTheDeadAndReborn(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "leases that run out")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(named("ann"))
		opts := w.Options()
		opts.Name = "bob"
		p, err := mesh.NewPresenceManager(opts)
		require.NoError(t, err)
		require.NoError(t, p.Start(t.Context()))
		inc := p.Stats().Incarnation
		w.Sleep(11 * time.Second)
		require.Equal(t, "bob", w.Found(s, inc).Name)
		_ = opts.Redis.Close()
		w.Eventually(13*time.Second, func() bool {
			info := w.Found(s, inc)
			if info != nil {
				require.Equal(t, "bob", info.Name)
			}
			return info == nil
		}, "it is cleaned up after")
		require.Zero(t, w.Client().Exists(t.Context(), w.Keys().Name(inc)).Val())
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = p.Shutdown(ctx)

		old := s.Stats().Incarnation
		require.NoError(t, w.Client().FlushAll(t.Context()).Err())
		w.Eventually(20*time.Second, func() bool { return s.Stats().Incarnation != old }, "it lives on")
		require.Equal(t, "ann", w.Found(s, s.Stats().Incarnation).Name)
	})
}

// syncBuffer is a buffer that several goroutines write to.
type syncBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Every line says which server it is of.
func TestNameInLogs(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var out syncBuffer
		s := w.Tracked(named("web 1"), func(o *mesh.Options) {
			o.Logger = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
		})
		s.OnConnection(nil)
		s.OnConnection(func(context.Context, *mesh.Connection) { panic("no") })
		p := s.Dial()
		p.Closed(10 * time.Second)
		require.NoError(t, w.Client().FlushAll(t.Context()).Err())
		w.Sleep(20 * time.Second)
		w.Mem.Hang()
		w.Sleep(5 * time.Second)
		w.Mem.Resume()
		w.Sleep(5 * time.Second)
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		require.Greater(t, len(lines), 3)
		for _, line := range lines {
			assert.Equal(t, 1, strings.Count(line, `server="web 1"`), line)
		}
	})
}
