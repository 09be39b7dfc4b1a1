package mesh_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// benchRedis returns a client of a real Redis where there is one, of the
// embedded one otherwise.
func benchRedis(b *testing.B) *redis.Client {
	b.Helper()
	if redistest.Available() {
		return redistest.Start(b).Client(b)
	}
	r, err := meshtest.NewRedis()
	require.NoError(b, err)
	b.Cleanup(func() { _ = r.Close() })
	c := r.Client()
	b.Cleanup(func() { _ = c.Close() })
	return c
}

// benchServer starts a server on TCP and returns it with its address.
func benchServer(b *testing.B) (*mesh.Server, string) {
	b.Helper()
	srv, err := mesh.NewServer(mesh.Options{
		Redis: benchRedis(b), PingInterval: time.Hour, LatencyInterval: -1, Limits: mesh.Limits{CommandsPerSecond: -1},
	})
	require.NoError(b, err)
	require.NoError(b, srv.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
	require.NoError(b, srv.Start(b.Context()))
	web := httptest.NewServer(srv)
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		require.NoError(b, srv.Shutdown(ctx))
		web.Close()
	})
	return srv, "ws" + strings.TrimPrefix(web.URL, "http")
}

const (
	benchCallers = 512
	benchRooms   = 1000
)

// BenchmarkJoinLeave is one join and one leave per iteration: by 512 callers
// of a PresenceManager, and by one goroutine that fills pipelines with the
// commands that keep and tell the same without any promise.
func BenchmarkJoinLeave(b *testing.B) {
	b.Run("mesh", func(b *testing.B) {
		off := false
		p, err := mesh.NewPresenceManager(mesh.Options{Redis: benchRedis(b), EnablePresenceExpirationEvents: &off})
		require.NoError(b, err)
		require.NoError(b, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
		require.NoError(b, p.Start(b.Context()))
		b.Cleanup(func() { require.NoError(b, p.Shutdown(context.Background())) })
		rooms := make(chan string)
		var callers sync.WaitGroup
		for i := range benchCallers {
			id := fmt.Sprintf("conn%d", i)
			require.NoError(b, p.Connect(b.Context(), id, nil))
			callers.Go(func() {
				for room := range rooms {
					if err := p.Join(b.Context(), room, id); err != nil {
						b.Error(err)
					}
					if _, err := p.Leave(b.Context(), room, id); err != nil {
						b.Error(err)
					}
				}
			})
		}
		n := 0
		before := p.Stats()
		for b.Loop() {
			rooms <- fmt.Sprintf("room%d", n%benchRooms)
			n++
		}
		b.ReportMetric(2*float64(n)/b.Elapsed().Seconds(), "ops/s")
		close(rooms)
		callers.Wait()
		after := p.Stats()
		b.ReportMetric(float64(after.Changes-before.Changes)/float64(after.Batches-before.Batches), "ops/call")
	})
	b.Run("pipeline", func(b *testing.B) {
		ctx, c := b.Context(), benchRedis(b)
		pipe := c.Pipeline()
		n := 0
		for b.Loop() {
			room, id := fmt.Sprintf("room%d", n%benchRooms), fmt.Sprintf("conn%d", n%benchCallers)
			pipe.HSet(ctx, "members:"+room, id, "{}")
			pipe.SAdd(ctx, "owned", room+" "+id)
			pipe.Publish(ctx, "events:"+room, "join "+id)
			pipe.HDel(ctx, "members:"+room, id)
			pipe.SRem(ctx, "owned", room+" "+id)
			pipe.Publish(ctx, "events:"+room, "leave "+id)
			if n++; n%128 == 0 {
				_, err := pipe.Exec(ctx)
				require.NoError(b, err)
			}
		}
		b.ReportMetric(2*float64(n)/b.Elapsed().Seconds(), "ops/s")
	})
}

// audience is sockets that count what they are sent.
type benchAudience struct {
	want int64
	got  atomic.Int64
	all  chan struct{} // everyone has got one more
}

// listen reads frames of one socket until it ends, and counts those that tell
// of a presence.
func (a *benchAudience) listen(ws *websocket.Conn) {
	for {
		_, data, err := ws.ReadMessage()
		if err != nil {
			return
		}
		if bytes.Contains(data, []byte("presence-update")) && a.got.Add(1)%a.want == 0 {
			a.all <- struct{}{}
		}
	}
}

// BenchmarkFanout is one event to 200 subscribers per iteration, until all
// have read it: a state through Redis, and one prepared frame written by a
// loop over the sockets.
func BenchmarkFanout(b *testing.B) {
	const subscribers = 200
	dial := func(b *testing.B, url string, each func(ws *websocket.Conn)) *benchAudience {
		b.Helper()
		a := &benchAudience{want: subscribers, all: make(chan struct{}, 1)}
		var reading sync.WaitGroup
		b.Cleanup(reading.Wait)
		for range subscribers {
			ws, _, err := websocket.DefaultDialer.Dial(url, nil)
			require.NoError(b, err)
			b.Cleanup(func() { _ = ws.Close() })
			each(ws)
			reading.Go(func() { a.listen(ws) })
		}
		return a
	}
	b.Run("mesh", func(b *testing.B) {
		srv, url := benchServer(b)
		a := dial(b, url, func(ws *websocket.Conn) {
			require.NoError(b, ws.WriteJSON(map[string]any{
				"id": 1, "command": "mesh/subscribe-presence", "payload": map[string]any{"roomName": "lobby"},
			}))
			for { // until it is answered
				var f harness.Frame
				require.NoError(b, ws.ReadJSON(&f))
				if f.ID != nil {
					return
				}
			}
		})
		p := srv.Presence()
		require.NoError(b, p.Connect(b.Context(), "speaker", nil))
		require.NoError(b, p.Join(b.Context(), "lobby", "speaker"))
		<-a.all
		n := 0
		for b.Loop() {
			state := json.RawMessage(fmt.Sprintf(`{"n":%d}`, n))
			require.NoError(b, p.PublishState(b.Context(), "lobby", "speaker", state, mesh.StateOptions{}))
			<-a.all
			n++
		}
		b.ReportMetric(subscribers*float64(n)/b.Elapsed().Seconds(), "frames/s")
	})
	b.Run("gorilla", func(b *testing.B) {
		sockets := make(chan *websocket.Conn, subscribers)
		var upgrader websocket.Upgrader
		web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ws, err := upgrader.Upgrade(w, r, nil)
			if err != nil {
				b.Error(err)
				return
			}
			sockets <- ws
		}))
		b.Cleanup(web.Close)
		a := dial(b, "ws"+strings.TrimPrefix(web.URL, "http"), func(*websocket.Conn) {})
		list := make([]*websocket.Conn, subscribers)
		for i := range list {
			list[i] = <-sockets
			b.Cleanup(func() { _ = list[i].Close() })
		}
		n := 0
		for b.Loop() {
			text := fmt.Sprintf(`{"command":"mesh/presence-update","payload":{"type":"state","connectionId":"speaker",`+
				`"roomName":"lobby","timestamp":%d,"seq":%d,"epoch":"1","state":{"n":%d}}}`, time.Now().UnixMilli(), n, n)
			m, err := websocket.NewPreparedMessage(websocket.TextMessage, []byte(text))
			require.NoError(b, err)
			for _, ws := range list {
				require.NoError(b, ws.WritePreparedMessage(m))
			}
			<-a.all
			n++
		}
		b.ReportMetric(subscribers*float64(n)/b.Elapsed().Seconds(), "frames/s")
	})
}

// BenchmarkSubscribeWatched is one subscription, and its end, of a room of 500
// that the server watches already, over a socket.
func BenchmarkSubscribeWatched(b *testing.B) {
	srv, url := benchServer(b)
	p := srv.Presence()
	for i := range 500 {
		id := fmt.Sprintf("conn%d", i)
		require.NoError(b, p.Connect(b.Context(), id, map[string]any{"userId": i}))
		require.NoError(b, p.Join(b.Context(), "lobby", id))
	}
	ws, _, err := websocket.DefaultDialer.Dial(url, nil)
	require.NoError(b, err)
	b.Cleanup(func() { _ = ws.Close() })
	ask := func(command string) {
		require.NoError(b, ws.WriteJSON(map[string]any{"id": 1, "command": command, "payload": map[string]any{"roomName": "lobby"}}))
		for {
			_, data, err := ws.ReadMessage()
			require.NoError(b, err)
			if bytes.Contains(data[:min(40, len(data))], []byte(`"id":1,`)) {
				return
			}
		}
	}
	ask("mesh/subscribe-presence") // the mirror outlives its last watcher for a while
	ask("mesh/unsubscribe-presence")
	before, n := srv.Stats().RedisCalls, 0
	for b.Loop() {
		ask("mesh/subscribe-presence")
		ask("mesh/unsubscribe-presence")
		n++
	}
	b.ReportMetric(float64(srv.Stats().RedisCalls-before)/float64(n), "redis/op")
}
