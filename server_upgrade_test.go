package mesh_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// refusedRequest is a request that is refused, with its status, and a good one if
// nothing is done to it.
type refusedRequest struct {
	status int
	spoil  func(r *http.Request)
}

var refusedRequests = map[string]refusedRequest{
	"no handshake": {http.StatusBadRequest, func(r *http.Request) { r.Header = http.Header{} }},
	"no upgrade":   {http.StatusBadRequest, func(r *http.Request) { r.Header.Del("Upgrade") }},
	"not GET":      {http.StatusMethodNotAllowed, func(r *http.Request) { r.Method = http.MethodPost }},
	"old version":  {http.StatusBadRequest, func(r *http.Request) { r.Header.Set("Sec-WebSocket-Version", "8") }},
	"no version":   {http.StatusBadRequest, func(r *http.Request) { r.Header.Del("Sec-WebSocket-Version") }},
	"no key":       {http.StatusBadRequest, func(r *http.Request) { r.Header.Del("Sec-WebSocket-Key") }},
	"short key":    {http.StatusBadRequest, func(r *http.Request) { r.Header.Set("Sec-WebSocket-Key", "eA==") }},
	"origin":       {http.StatusForbidden, func(r *http.Request) { r.Header.Set("Origin", "https://evil.example") }},
	"no password":  {http.StatusUnauthorized, func(r *http.Request) { r.Header.Del("Authorization") }},
}

// handshake is a request that is accepted.
func handshake(t *testing.T) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1/ws", nil)
	require.NoError(t, err)
	for name, value := range map[string]string{
		"Connection": "keep-alive, Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
		"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Authorization": "secret",
	} {
		r.Header.Set(name, value)
	}
	return r
}

func withPassword(o *mesh.Options) {
	o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
		if r.Header.Get("Authorization") == "" {
			return nil, errors.New("who is it?")
		}
		return nil, nil
	}
}

// Requests that are refused use up nothing that honest clients need.
func TestRefusedRequestsDoNotCount(t *testing.T) {
	t.Parallel()
	for name, bad := range refusedRequests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s := w.Tracked(withPassword, harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond, l.Connections = 3, 3 }))
				refuse := func() {
					for range 20 {
						r, rec := handshake(t), httptest.NewRecorder()
						bad.spoil(r)
						s.ServeHTTP(rec, r)
						require.Equal(t, bad.status, rec.Code, "%s", rec.Body)
					}
				}
				refuse()
				h := http.Header{"Authorization": {"secret"}}
				var open []*harness.Peer
				for range 3 {
					open = append(open, s.Dial(h))
				}
				_, resp, err := s.TryDial(h)
				require.Error(t, err)
				require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
				open[0].Close()
				w.Sleep(time.Second)
				refuse()
				s.Dial(h)
				assert.Equal(t, 3, s.StillOpen())
			})
		})
	}
}

// A handshake that cannot be completed after all does not count either.
func TestFailedUpgradesDoNotCount(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond, l.Connections = 1, 1 }))
		for range 5 {
			rec := httptest.NewRecorder() // cannot be hijacked
			s.ServeHTTP(rec, handshake(t))
			require.Equal(t, http.StatusInternalServerError, rec.Code)
		}
		s.Dial()
	})
}

// Requests whose authentication takes long hold nothing that others need, and are
// no more at once than may be.
func TestSlowAuthenticationIsBounded(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		release := make(chan struct{})
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond, l.Connections = 2, 2 }), func(o *mesh.Options) {
			o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
				if r.Header.Get("Slow") != "" {
					<-release // whatever becomes of its context
					return nil, errors.New("no")
				}
				return nil, nil
			}
		})
		var asked sync.WaitGroup
		var codes sync.Map
		slow := func() {
			asked.Go(func() {
				r, rec := handshake(t), httptest.NewRecorder()
				r.Header.Set("Slow", "1")
				s.ServeHTTP(rec, r)
				n, _ := codes.LoadOrStore(rec.Code, new(atomic.Int64))
				n.(*atomic.Int64).Add(1)
			})
		}
		count := func(code int) int64 {
			n, ok := codes.Load(code)
			if !ok {
				return 0
			}
			return n.(*atomic.Int64).Load()
		}
		for range mesh.AuthsAtOnce - 1 {
			slow()
		}
		w.Sleep(time.Millisecond)
		first := s.Dial()
		for range 50 {
			slow()
		}
		w.Sleep(time.Millisecond)
		assert.EqualValues(t, 49, count(http.StatusServiceUnavailable), "one was let in, in place of the honest one")
		w.Sleep(10 * time.Second)
		asked.Wait()
		assert.EqualValues(t, mesh.AuthsAtOnce, count(http.StatusInternalServerError), "their time was over")
		_, resp, err := s.TryDial()
		require.Error(t, err, "the hooks still run")
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		assert.NotEmpty(t, resp.Header.Get("Retry-After"))
		assert.Equal(t, "true", string(first.Call("mesh/noop", nil)))
		close(release)
		w.Sleep(time.Millisecond)
		s.Dial()
	})
}

// While no connection can be accepted, the hook is not asked.
func TestAStormDoesNotReachTheHook(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var calls atomic.Int64
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond = 2 }), func(o *mesh.Options) {
			o.Authenticate = func(context.Context, *http.Request) (any, error) {
				calls.Add(1)
				return nil, nil
			}
		})
		for range 50 {
			_, _, _ = s.TryDial()
		}
		assert.EqualValues(t, 2, calls.Load())
		assert.Equal(t, 2, s.Stats().Connections)
	})
}
