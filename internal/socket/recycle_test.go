package socket

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// Sockets of a group reuse each other's schedules. This test is for the race detector: no
// socket may use a schedule after it has released it.
func TestSocketsReuseSchedules(t *testing.T) {
	t.Parallel()
	h := &handler{begin: func(context.Context, wire.Request) func(context.Context) { return func(context.Context) {} }}
	group := NewGroup(Config{Wheel: wheel(t), FrameBytes: 1 << 16, QueueBytes: 1 << 18})
	var all sync.WaitGroup
	for range 8 {
		serverEnd, clientEnd := net.Pipe()
		server, client := upgrade(t, serverEnd, clientEnd, false)
		s := group.New(server, h)
		all.Go(func() { _ = s.Run(t.Context()) })
		all.Go(func() { _, _ = io.Copy(io.Discard, client.NetConn()) })
		all.Go(func() {
			defer func() { _ = client.Close() }()
			for range 500 {
				if err := client.WriteMessage(websocket.TextMessage, []byte(`{"id":1,"command":"over"}`)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	group.Wait()
}
