package mesh

import (
	"context"
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestHandlerReturns: what net/http keeps for a request is not kept for a
// socket. What the app put into the request's context is, and that the request
// is over ends nothing.
func TestHandlerReturns(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		type key struct{}
		s := w.tracked()
		returned := make(chan struct{})
		s.http.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			defer close(returned)
			ctx, cancel := context.WithCancel(context.WithValue(r.Context(), key{}, "from the request"))
			defer cancel()
			s.ServeHTTP(rw, r.WithContext(ctx))
		})
		require.NoError(t, s.HandleCommand("app/value", func(ctx context.Context, _ *Connection, _ json.RawMessage) (any, error) {
			assert.NoError(t, ctx.Err())
			return ctx.Value(key{}), nil
		}))
		p := s.dial()
		<-returned
		w.sleep(10 * time.Minute)
		require.JSONEq(t, `"from the request"`, string(p.call("app/value", nil)))
		p.join("lobby")
		require.Equal(t, 1, s.Stats().Connections)
		s.shutdown()
		require.Equal(t, 1012, p.closed(5*time.Second))
	})
}
