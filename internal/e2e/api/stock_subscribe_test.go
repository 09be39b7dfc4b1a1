package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/meshtest"
)

// subscribePause is the pause between the answer to a subscribe request and the first
// update.
const subscribePause = 5 * time.Millisecond

// busyMembers makes members of a room join, publish, clear and leave until stop is
// called. Some of them stay in the room.
func busyMembers(s *harness.Server, room string, members int) (stop func()) {
	quit := make(chan struct{})
	var all sync.WaitGroup
	for m := range members {
		p := s.Dial()
		all.Go(func() {
			payload := map[string]any{"roomName": room}
			for i := 0; ; i++ {
				_, _ = p.TryCall("mesh/join-room", payload)
				_, _ = p.TryCall("mesh/publish-presence-state", map[string]any{"roomName": room, "state": map[string]any{"n": i}})
				select {
				case <-quit:
					return
				case <-time.After(time.Duration(20+(m*37+i*53)%23) * time.Millisecond): // within the limit of commands
				}
				_, _ = p.TryCall([]string{"mesh/leave-room", "mesh/clear-presence-state"}[i%2], payload)
			}
		})
	}
	return func() {
		close(quit)
		all.Wait()
	}
}

// stockStorm makes n stock clients subscribe to one room, some of them twice, while
// other clients join, leave and publish in it. Every client's view must become the
// truth. With all, updates that the app lost count, too.
func stockStorm(w *harness.World, s *harness.Server, n int, all bool) []*harness.StockClient {
	clients := make([]*harness.StockClient, n)
	for i := range clients {
		clients[i] = s.Stock("")
	}
	stop := busyMembers(s, "lobby", 8)
	for i, c := range clients {
		c.JoinRoom([]string{"other", "free"}[min(i%10, 1)])
		c.SubscribePresence("other")
		c.SubscribePresence("lobby")
		if i%5 == 0 {
			w.Sleep(time.Millisecond)
			c.Room("mesh/subscribe-presence", "lobby")
		}
	}
	w.Sleep(100 * time.Millisecond)
	stop()
	lobby, other := s.Truth("lobby"), s.Truth("other")
	for _, c := range clients {
		w.Eventually(w.Unhurried(5*time.Second), func() bool { return maps.Equal(lobby, c.View("lobby", all)) }, "the view equals the truth")
		w.Eventually(w.Unhurried(5*time.Second), func() bool { return maps.Equal(other, c.View("other", all)) }, "the view equals the truth")
	}
	return clients
}

// The test uses pipes, on which two writes never arrive in one piece.
func TestStockSubscribeStorm(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		for _, c := range stockStorm(w, s, 200, false) {
			for _, room := range []string{"lobby", "other"} {
				require.Empty(t, c.Lost(room), "updates of %s arrived in one piece with the answer, or before it", room)
			}
		}
	})
}

// tcpPairs makes connections over the loopback interface. wrap changes the server's
// end. It may be nil.
func tcpPairs(t *testing.T, wrap func(net.Conn) net.Conn) func() (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return func() (net.Conn, net.Conn) {
		client, err := net.Dial("tcp", l.Addr().String())
		require.NoError(t, err)
		server, err := l.Accept()
		require.NoError(t, err)
		if wrap != nil {
			server = wrap(server)
		}
		return client, server
	}
}

// loopback returns a server in real time, on the embedded Redis, that is reached
// over TCP.
func loopback(t *testing.T, wrap func(net.Conn) net.Conn) (*harness.World, *harness.Server) {
	t.Helper()
	w := &harness.World{T: t, Mem: meshtest.StartRedis(t)}
	s := w.Tracked()
	s.Listener.Pair = tcpPairs(t, wrap)
	return w, s
}

// TestStockSubscribeStormOverTCP checks that everything arrives over TCP. It does not
// check the pause, because a busy client may read several writes in one piece.
func TestStockSubscribeStormOverTCP(t *testing.T) {
	t.Parallel()
	w, s := loopback(t, nil)
	stockStorm(w, s, 50, true)
}

// writeLog checks the writes of a server's connection. The answer to a subscribe
// request must be alone in its write. Updates of the room must be written after the
// pause.
type writeLog struct {
	net.Conn

	mu       sync.Mutex // guards the fields below
	answered map[string]time.Time
	faults   []string
}

func (l *writeLog) Write(p []byte) (int, error) {
	begun := time.Now()
	n, err := l.Conn.Write(p)
	l.mu.Lock()
	defer l.mu.Unlock()
	if bytes.HasPrefix(p, []byte("HTTP/")) {
		return n, err
	}
	frames := unframe(p)
	for _, f := range frames {
		var u harness.Update
		var v struct {
			Success bool
			Present []struct{ ID string }
		}
		switch {
		case f.Command == "mesh/subscribe-presence" && json.Unmarshal(f.Payload, &v) == nil && v.Success:
			if len(frames) > 1 {
				l.faults = append(l.faults, fmt.Sprintf("an answer shares its write with %d frames", len(frames)-1))
			}
			l.answered[l.room(*f.ID)] = time.Now()
		case f.Command == "mesh/presence-update" && json.Unmarshal(f.Payload, &u) == nil:
			if at, ok := l.answered[u.RoomName]; !ok {
				l.faults = append(l.faults, "an update before the answer")
			} else if begun.Sub(at) < subscribePause {
				l.faults = append(l.faults, fmt.Sprintf("an update of %s %v after the answer", u.RoomName, begun.Sub(at)))
			}
		}
	}
	return n, err
}

// room returns the room of a subscribe request of stockStorm. It depends on the order
// of the ids.
func (l *writeLog) room(id int64) string {
	if id == 2 {
		return "other"
	}
	return "lobby"
}

// unframe decodes the frames that a server has written.
func unframe(p []byte) (frames []harness.Frame) {
	for len(p) >= 2 {
		size, head := int(p[1]), 2
		switch size {
		case 126:
			size, head = int(p[2])<<8|int(p[3]), 4
		case 127:
			size, head = int(p[6])<<24|int(p[7])<<16|int(p[8])<<8|int(p[9]), 10
		}
		var f harness.Frame
		_ = json.Unmarshal(p[head:head+size], &f)
		frames = append(frames, f)
		p = p[head+size:]
	}
	return frames
}

// TestStockSubscribeWrites checks the writes on the server's side, which do not depend
// on the load of the machine.
func TestStockSubscribeWrites(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex // guards logs
	var logs []*writeLog
	w, s := loopback(t, func(conn net.Conn) net.Conn {
		mu.Lock()
		defer mu.Unlock()
		l := &writeLog{Conn: conn, answered: make(map[string]time.Time)}
		logs = append(logs, l)
		return l
	})
	stockStorm(w, s, 50, true)
	answers := 0
	for _, l := range logs {
		l.mu.Lock()
		require.Empty(t, l.faults)
		answers += len(l.answered)
		l.mu.Unlock()
	}
	require.Equal(t, 2*50, answers)
}

// If a subscription ends within the pause, the push about it is sent at once, and
// updates that wait for the pause are dropped.
func TestEndOfASubscriptionInThePause(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		var allowed atomic.Bool
		allowed.Store(true)
		s.Track("^doc$", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) {
			return allowed.Load(), nil
		}})
		p, other := s.Dial(), s.Dial()
		p.Subscribe("doc")
		other.Join("doc")
		allowed.Store(false)
		require.NoError(t, s.Rooms().Recheck(t.Context(), "doc"))
		synctest.Wait()
		assert.Equal(t, 1, p.Pushed("mesh/presence-ended"), "not sent at once")
		assert.False(t, p.Room("mesh/subscribe-presence", "doc").Success)

		unsubscribed := s.Dial()
		allowed.Store(true)
		require.NoError(t, s.Rooms().Recheck(t.Context(), "doc"))
		unsubscribed.Subscribe("doc")
		other.Leave("doc")
		assert.Equal(t, "true", string(unsubscribed.Call("mesh/unsubscribe-presence", harness.InRoomPayload("doc"))))

		w.Sleep(time.Second)
		assert.Empty(t, p.Got())
		assert.Empty(t, unsubscribed.Got())
		assert.Equal(t, 1, p.Pushed("mesh/presence-ended"))
	})
}
