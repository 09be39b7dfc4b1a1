package limit

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestLogSuppressesRepeatedLines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := NewLog(slog.New(slog.NewTextHandler(&out, nil)))
		require.True(t, l.Warn("lost", "n", 1))
		for range 3 {
			time.Sleep(3 * time.Second)
			require.False(t, l.Warn("lost", "n", 2))
		}
		require.True(t, l.Info("found"), "another kind")
		require.True(t, l.As(slog.LevelError, "lost x", "lost"), "another kind by name")
		require.Equal(t, 3, strings.Count(out.String(), "\n"))
		require.NotContains(t, out.String(), "suppressed")
		out.Reset()
		time.Sleep(time.Second)
		require.True(t, l.Warn("lost", "n", 3))
		require.Contains(t, out.String(), `level=WARN msg=lost n=3 suppressed=3`)
		time.Sleep(LogEvery)
		require.True(t, l.Warn("lost"))
		require.Equal(t, 1, strings.Count(out.String(), "suppressed"), "the number is written once")
	})
}

func TestSuppressedLinesAreWrittenAtDebug(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	l := NewLog(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug, AddSource: true})))
	require.True(t, l.Error("lost", "n", 1))
	require.False(t, l.Error("lost", "n", 2))
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	require.Len(t, lines, 2)
	require.Contains(t, lines[0], "level=ERROR")
	require.Contains(t, lines[1], "level=DEBUG")
	for _, line := range lines {
		require.Contains(t, line, "log_test.go:", "the source is the caller of the Log")
	}
	NewLog(nil).Error("discarded")
}

func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := NewLog(nil)
		written := 0
		for i := range 3 * maxLogKinds {
			if l.As(slog.LevelInfo, fmt.Sprint(i), "x") {
				written++
			}
		}
		require.Equal(t, maxLogKinds+1, written)
		require.LessOrEqual(t, len(l.kinds), maxLogKinds+1)
	})
}

func TestLogConcurrent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := NewLog(slog.New(slog.NewTextHandler(&out, nil)))
		storm := func() {
			var wg sync.WaitGroup
			for range 50 {
				wg.Go(func() {
					for range 20 {
						l.Warn("lost")
					}
				})
			}
			wg.Wait()
		}
		storm()
		time.Sleep(LogEvery)
		storm()
		require.Equal(t, 2, strings.Count(out.String(), "\n"))
		require.Contains(t, out.String(), "suppressed=999")
	})
}

func TestShorten(t *testing.T) {
	t.Parallel()
	require.Equal(t, "x", Shorten("x"))
	require.Len(t, Shorten(strings.Repeat("x", 1000)), maxLogText+len("…"))
}
