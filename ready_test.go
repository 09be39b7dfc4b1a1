package mesh

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestReadyWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s, p := w.tracked(), w.manager()
		quick := func() {
			t.Helper()
			begun := time.Now()
			require.NoError(t, s.Ready(t.Context()))
			require.NoError(t, p.Ready(t.Context()))
			assert.Zero(t, time.Since(begun), "at once")
		}
		quick()
		for _, fault := range []struct{ begin, end func() }{{w.mem.Cut, w.mem.Heal}, {w.mem.Hang, w.mem.Resume}} {
			fault.begin()
			for range 60 {
				w.sleep(time.Second)
				quick()
			}
			fault.end()
			w.sleep(time.Minute)
			quick()
		}
		require.NoError(t, p.Shutdown(t.Context()))
		require.ErrorIs(t, p.Ready(t.Context()), ErrClosed)
	})
}

func TestReadyHandler(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		srv, err := NewServer(w.options())
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
		expect(http.StatusServiceUnavailable, ErrNotStarted.Error()+"\n")
		require.NoError(t, srv.Start(t.Context()))
		expect(http.StatusOK, "ok\n")
		require.NoError(t, srv.Drain(t.Context(), time.Second))
		expect(http.StatusServiceUnavailable, ErrClosed.Error()+"\n")
		require.NoError(t, srv.Shutdown(t.Context()))
		expect(http.StatusServiceUnavailable, ErrClosed.Error()+"\n")
	})
}
