package meshtest_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// The values are the answers of Redis 7.0.
func TestConfigKeyspaceEvents(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c := meshtest.StartRedis(t).Client()
	get := func(param string) map[string]string {
		got, err := c.ConfigGet(ctx, param).Result()
		require.NoError(t, err)
		return got
	}
	const name = "notify-keyspace-events"
	require.Equal(t, map[string]string{name: ""}, get(name))
	for set, want := range map[string]string{
		"Ex": "xE", "KEA": "AKE", "AKEmn": "AKEm", "Kgn": "gnK", "KE$lshztdxegm": "AKEm", "": "",
	} {
		require.NoError(t, c.ConfigSet(ctx, name, set).Err())
		require.Equal(t, map[string]string{name: want}, get(name), set)
	}
	require.NoError(t, c.ConfigSet(ctx, name, "").Err())
	require.Equal(t, map[string]string{name: ""}, get("*"))
	require.Empty(t, get("maxmemory"))

	for _, bad := range [][]any{
		{"CONFIG", "SET", name, "Q"}, {"CONFIG", "SET", "nope", "1"}, {"CONFIG", "SET", name},
		{"CONFIG", "GET"}, {"CONFIG"}, {"CONFIG", "WHAT"},
	} {
		require.ErrorContains(t, c.Do(ctx, bad...).Err(), "ERR ", "%v", bad)
	}
	require.NoError(t, c.ConfigResetStat(ctx).Err())
}

func TestEventsFollowConfig(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		c := meshtest.StartRedis(t).Client()
		events := hear(t, c)
		for _, step := range []struct {
			flags string
			want  []string
		}{
			{"", nil},
			{"E", nil},
			{"x", nil},
			{"Ex", []string{"__keyevent@0__:expired k"}},
			{"AE", []string{"__keyevent@0__:expired k"}},
			{"Kx", []string{"__keyspace@0__:k expired"}},
		} {
			require.NoError(t, c.ConfigSet(ctx, "notify-keyspace-events", step.flags).Err())
			require.NoError(t, c.Set(ctx, "k", 1, 50*time.Millisecond).Err())
			time.Sleep(time.Second)
			require.Equal(t, step.want, heard(events), step.flags)
		}
	})
}

func TestConfigForbidden(t *testing.T) {
	t.Parallel()
	c := meshtest.StartRedis(t, meshtest.WithConfigForbidden()).Client()
	require.ErrorContains(t, c.ConfigGet(t.Context(), "notify-keyspace-events").Err(), "unknown command")
	require.ErrorContains(t, c.ConfigSet(t.Context(), "notify-keyspace-events", "Ex").Err(), "unknown command")
}

func TestInfo(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := meshtest.StartRedis(t)
	c := r.Client()
	for _, sections := range [][]string{{"server"}, {"SERVER"}, {}, {"all"}} {
		info, err := c.Info(ctx, sections...).Result()
		require.NoError(t, err)
		require.Contains(t, info, "run_id:"+r.RunID()+"\r\n")
		require.Equal(t, !strings.EqualFold(strings.Join(sections, ""), "server"), strings.Contains(info, "# Stats"))
	}
	clients, err := c.Info(ctx, "clients").Result()
	require.NoError(t, err)
	require.Contains(t, clients, "connected_clients:")
	require.NotContains(t, clients, "run_id")

	old := r.RunID()
	require.Len(t, old, 40)
	require.NotEqual(t, old, r.NewRunID())
	info, err := c.Info(ctx, "server").Result()
	require.NoError(t, err)
	require.NotContains(t, info, old)
}
