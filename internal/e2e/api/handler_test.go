package api

import (
	"context"
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// TestHandlerReturns checks that ServeHTTP returns after the upgrade, so that a socket
// does not keep the memory of its request. Values of the request's context stay
// available, and its cancellation has no effect.
func TestHandlerReturns(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		type key struct{}
		s := w.Tracked()
		returned := make(chan struct{})
		s.HTTP.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			defer close(returned)
			ctx, cancel := context.WithCancel(context.WithValue(r.Context(), key{}, "from the request"))
			defer cancel()
			s.ServeHTTP(rw, r.WithContext(ctx))
		})
		require.NoError(t, s.HandleCommand("app/value", func(ctx context.Context, _ *mesh.Connection, _ json.RawMessage) (any, error) {
			assert.NoError(t, ctx.Err())
			return ctx.Value(key{}), nil
		}))
		p := s.Dial()
		<-returned
		w.Sleep(10 * time.Minute)
		require.JSONEq(t, `"from the request"`, string(p.Call("app/value", nil)))
		p.Join("lobby")
		require.Equal(t, 1, s.Stats().Connections)
		s.End()
		require.Equal(t, 1012, p.Closed(5*time.Second))
	})
}
