package harness

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// Handshake returns a request for a WebSocket that a server accepts.
func Handshake(t *testing.T) *http.Request {
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
