package mesh_test

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

func TestReadyWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, p := w.Tracked(), w.Manager()
		quick := func() {
			t.Helper()
			begun := time.Now()
			require.NoError(t, s.Ready(t.Context()))
			require.NoError(t, p.Ready(t.Context()))
			assert.Zero(t, time.Since(begun), "at once")
		}
		quick()
		for _, fault := range []struct{ begin, end func() }{{w.Mem.Cut, w.Mem.Heal}, {w.Mem.Hang, w.Mem.Resume}} {
			fault.begin()
			for range 60 {
				w.Sleep(time.Second)
				quick()
			}
			fault.end()
			w.Sleep(time.Minute)
			quick()
		}
		require.NoError(t, p.Shutdown(t.Context()))
		require.ErrorIs(t, p.Ready(t.Context()), mesh.ErrClosed)
	})
}

func TestReadyHandler(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		srv, err := mesh.NewServer(w.Options())
		require.NoError(t, err)
		probe := func() (int, string) {
			rec := httptest.NewRecorder()
			srv.ReadyHandler().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/readyz", nil))
			return rec.Code, rec.Body.String()
		}
		expect := func(code int, text string) {
			t.Helper()
			gotCode, gotText := probe()
			assert.Equal(t, code, gotCode)
			assert.Equal(t, text, gotText)
		}
		expect(http.StatusServiceUnavailable, mesh.ErrNotStarted.Error()+"\n")
		require.NoError(t, srv.Start(t.Context()))
		expect(http.StatusOK, "ok\n")
		require.NoError(t, srv.Drain(t.Context(), time.Second))
		expect(http.StatusServiceUnavailable, mesh.ErrClosed.Error()+"\n")
		require.NoError(t, srv.Shutdown(t.Context()))
		expect(http.StatusServiceUnavailable, mesh.ErrClosed.Error()+"\n")
	})
}
