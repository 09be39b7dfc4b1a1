package mesh

import (
	"regexp"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func mustCompile(expr string) *regexp.Regexp { return regexp.MustCompile(expr) }

func TestJoinAndLeaveAreToldOnce(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		watcher, a := s1.dial(), s2.dial()
		require.Empty(t, watcher.subscribe("lobby").ids(t))
		require.Equal(t, []string{a.id}, a.join("lobby").ids(t))
		watcher.expect(2*time.Second, "join", a.id)
		a.close()
		watcher.expect(2*time.Second, "leave", a.id)
		w.sleep(200 * time.Millisecond)
		require.Equal(t, 1, watcher.count("join", ""))
		require.Equal(t, 1, watcher.count("leave", ""))
	})
}
