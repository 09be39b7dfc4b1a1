package store

import (
	"context"
	"strings"
	"testing"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

func TestMergeNotifyFlags(t *testing.T) {
	t.Parallel()
	for current, want := range map[string]string{
		"":    "Ex",
		"E":   "Ex",
		"x":   "xE",
		"K":   "KEx",
		"Kg":  "KgEx",
		"KA":  "KAE",
		"gxE": "gxE",
		"AKE": "AKE",
		"KEA": "KEA",
		"Ex":  "Ex",
		"EA":  "EA",
		"En":  "Enx",
	} {
		merged, change := MergeNotifyFlags(current)
		require.Equal(t, want, merged, current)
		require.Equal(t, want != current, change, current)
		again, change := MergeNotifyFlags(merged)
		require.Equal(t, merged, again)
		require.False(t, change)
	}
}

func TestEnableExpiredEvents(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t).Client(t)
	ctx := t.Context()
	for _, current := range []string{"", "E", "Kg", "KEA", "AK", "Knm", "g$lE"} {
		require.NoError(t, client.ConfigSet(ctx, notifySetting, current).Err())
		read := client.ConfigGet(ctx, notifySetting).Val()[notifySetting]
		before, _, err := EnableExpiredEvents(ctx, client)
		require.NoError(t, err)
		require.Equal(t, read, before)
		now := client.ConfigGet(ctx, notifySetting).Val()[notifySetting]
		require.Contains(t, now, "E")
		require.True(t, strings.ContainsAny(now, "xA"), now)
		for _, flag := range read {
			require.Contains(t, now, string(flag), "%q lost by %q", read, now)
		}
		before, after, err := EnableExpiredEvents(ctx, client)
		require.NoError(t, err)
		require.Equal(t, before, after)
	}
}

// stubConfig answers CONFIG GET with nothing.
type stubConfig struct{ set bool }

func (s *stubConfig) ConfigGet(ctx context.Context, _ string) *redis.MapStringStringCmd {
	return redis.NewMapStringStringCmd(ctx)
}

func (s *stubConfig) ConfigSet(ctx context.Context, _, _ string) *redis.StatusCmd {
	s.set = true
	return redis.NewStatusCmd(ctx)
}

func TestEnableExpiredEventsHidden(t *testing.T) {
	t.Parallel()
	s := &stubConfig{}
	_, _, err := EnableExpiredEvents(t.Context(), s)
	require.Error(t, err)
	require.False(t, s.set, "an unreadable setting must not be overwritten")
}
