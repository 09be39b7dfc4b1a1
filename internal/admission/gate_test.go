package admission

import (
	"bytes"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
)

func newGate(most, perSecond int) *Gate {
	return New(Config{Max: most, PerSecond: perSecond, Logger: slog.New(slog.DiscardHandler)})
}

func TestGateLimitsConnections(t *testing.T) {
	t.Parallel()
	g := newGate(2, -1)
	for range 2 {
		require.True(t, g.Enter())
		require.NoError(t, g.HasPlace())
		require.NoError(t, g.Take(true))
	}
	require.True(t, g.Enter(), "a request is no connection")
	require.ErrorIs(t, g.HasPlace(), errs.Limit)
	require.ErrorIs(t, g.Take(false), errs.Limit)
	assert.ErrorContains(t, g.Take(false), "2 connections")
	g.Leave(true)
	require.NoError(t, g.Take(true))
	unlimited := newGate(-1, -1)
	for range 1000 {
		require.NoError(t, unlimited.Take(true))
	}
}

// A failed handshake returns its place and its token.
func TestGateLimitsConnectionsPerSecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate(-1, 3)
		for range 3 {
			require.NoError(t, g.Take(true))
		}
		require.ErrorIs(t, g.HasPlace(), ErrRate)
		require.ErrorIs(t, g.Take(true), ErrRate)
		require.ErrorIs(t, g.Take(true), errs.Limit)
		require.NoError(t, g.Take(false), "not limited")
		g.Untake()
		require.NoError(t, g.HasPlace())
		require.NoError(t, g.Take(true))
		require.ErrorIs(t, g.Take(true), ErrRate)
		time.Sleep(time.Second)
		require.NoError(t, g.Take(true))
	})
}

func TestGateIsEmptyOnceClosed(t *testing.T) {
	t.Parallel()
	empty := func(g *Gate) bool {
		select {
		case <-g.Empty():
			return true
		default:
			return false
		}
	}
	g := newGate(-1, -1)
	require.True(t, g.Enter())
	require.True(t, g.Enter())
	require.NoError(t, g.Take(true))
	g.Close()
	require.False(t, g.Enter())
	g.Leave(true)
	require.False(t, empty(g))
	open, taken := g.Counts()
	require.Equal(t, []int{1, 0}, []int{open, taken})
	g.Leave(false)
	require.True(t, empty(g))
	g.Close()

	g = newGate(-1, -1)
	require.True(t, g.Enter())
	g.Leave(false)
	require.False(t, empty(g), "it is open")
	g.Close()
	require.True(t, empty(g))
}

func TestGateFitsFileDescriptors(t *testing.T) {
	t.Parallel()
	const redis = 27
	reserved := func(files int) int { return spareFiles + files/spareShare + redis }
	for name, c := range map[string]struct {
		files, most int
		chosen      bool
		want        int // 0: an error
		level       string
	}{
		"fits":                   {1 << 20, 100_000, false, 100_000, ""},
		"does not fit":           {50_000, 100_000, false, 50_000 - reserved(50_000), "INFO"},
		"few":                    {1024, 100_000, false, 1024 - reserved(1024), "WARN"},
		"a limit that just fits": {1024, 1024 - reserved(1024), true, 1024 - reserved(1024), ""},
		"a limit too high":       {1024, 1025 - reserved(1024), true, 0, ""},
		"no limit":               {1024, -1, false, 1024 - reserved(1024), "WARN"},
		"hardly any":             {64, -1, false, 0, ""},
	} {
		var log bytes.Buffer
		g := New(Config{Max: c.most, Chosen: c.chosen, PerSecond: -1, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		for range 2 { // the second attempt logs nothing
			err := g.Fit(c.files, redis)
			if c.want == 0 {
				require.ErrorIs(t, err, errs.InvalidOptions, name)
				require.ErrorContains(t, err, "ulimit -n", name)
				continue
			}
			require.NoError(t, err, name)
			assert.Equal(t, c.want, g.Max(), name)
		}
		assert.Equal(t, c.level != "", bytes.Count(log.Bytes(), []byte("\n")) == 1, "%s: %s", name, &log)
		assert.Contains(t, log.String(), c.level, name)
	}
	g := newGate(-1, -1)
	require.NoError(t, g.Fit(1024, 1<<20))
	assert.Equal(t, 1024-spareFiles-1024/spareShare-1024/redisShare, g.Max(), "Redis gets its share, and not more")
}
