package bench

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

// filling is a group of members that a manager adds to a room, each with metadata.
type filling struct {
	Room     string
	From, To int
}

var (
	subscribers = newJob("subscribers", load.Subscribe)
	// fillRoom runs in a process in which startMember has run.
	fillRoom = newJob("fill", func(f filling) (bool, error) {
		c := crowd{Name: "member", Entries: f.To - f.From}
		return true, c.each(func(i int) error {
			ctx, id := context.Background(), c.conn(f.From+i)
			if err := member.Presence.Connect(ctx, id, peer.Person()); err != nil {
				return err
			}
			return member.Presence.Join(ctx, f.Room, id)
		})
	})
	// staticServer answers any request with a given number of bytes.
	staticServer = newJob("static", func(size int) (string, error) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		go func() { _ = http.Serve(ln, static(size)) }() // ends with the process
		return ln.Addr().String(), nil
	})
)

// static is a server that writes prepared messages: a long one, of the given size, to
// subscribers.
func static(size int) http.Handler {
	const begin, end = `{"id":2,"payload":"`, `"}`
	prepare := func(text []byte) *websocket.PreparedMessage {
		m, err := websocket.NewPreparedMessage(websocket.TextMessage, text)
		if err != nil {
			panic(err)
		}
		return m
	}
	long := prepare([]byte(begin + string(bytes.Repeat([]byte("x"), max(size-len(begin)-len(end), 0))) + end))
	short := prepare([]byte(begin + end))
	hello := prepare([]byte(`{"command":"mesh/assign-id","payload":"x"}`))
	up := websocket.Upgrader{WriteBufferPool: &sync.Pool{}}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := up.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer ws.Close()
		err = ws.WritePreparedMessage(hello)
		for err == nil {
			var data []byte
			if _, data, err = ws.ReadMessage(); err != nil {
				return
			}
			m := short
			if bytes.Contains(data, []byte(`"mesh/subscribe-presence"`)) {
				m = long
			}
			err = ws.WritePreparedMessage(m)
		}
	})
}

// BenchmarkLaterSubscribers measures subscriptions to a room of 10,000 members that its
// server already watches. The answer lists all members. It measures the cost in Redis,
// and the time in comparison with a gorilla server that writes as many bytes as a
// prepared message.
func BenchmarkLaterSubscribers(b *testing.B) {
	const members, connections, times = 10_000, 4, 50
	took, used := figures{}, figures{}
	for b.Loop() {
		r := redistest.Start(b)
		m := start(b, "member")
		startMember.on(m, peer.MemberConfig{Redis: r.Addr(), Rules: []peer.Rule{{Expr: ".*"}}})
		fillRoom.on(m, filling{Room: "hall", To: members})
		server, addr := serve(b, peer.Config{Kind: peer.Mesh, Redis: r.Addr(), SnapshotMembers: 2 * members})
		first := start(b, "load")
		first.do(order{Hold: &load.HoldConfig{Addr: addr, Dialect: load.Mesh, Connections: 1, Watch: "hall", Drain: true}})

		measure := func(k peer.Kind, p *process, addr string) (r load.SubscribeResult) {
			before := cpuTime.on(p, struct{}{})
			r = subscribers.on(start(b, "load"), load.SubscribeConfig{Addr: addr, Room: "hall", Connections: connections, Times: times})
			used[k] = append(used[k], (cpuTime.on(p, struct{}{})-before)*1e6/(connections*times))
			took[k] = append(took[k], r.P50*1e3)
			return r
		}
		client := r.Client(b)
		before := usage(b, client)
		s := measure(peer.Mesh, server, addr)
		busy := usage(b, client).Since(before)
		time.Sleep(time.Duration(s.Seconds * 1e9)) // as long again, without work
		idle := usage(b, client).Since(before).Since(busy)
		require.Greater(b, s.Bytes, members*100)
		// Each connection is registered and removed. Nothing else may grow with the
		// subscriptions.
		b.Logf("%d subscriptions of %d bytes by %d connections: %v; as long idle: %v", connections*times, s.Bytes, connections,
			busy.Commands, idle.Commands)
		require.Less(b, busy.Total()-idle.Total(), int64(connections*times/2), "subscriptions ask Redis")

		p := start(b, "server")
		measure(peer.Gorilla, p, staticServer.on(p, s.Bytes))
		first.do(order{Hold: &load.HoldConfig{}})
	}
	for _, k := range []peer.Kind{peer.Mesh, peer.Gorilla} {
		b.ReportMetric(took.median(k), string(k)+"-p50-ms")
		b.ReportMetric(used.median(k), string(k)+"-server-µs")
	}
	b.ReportMetric(took.ratio(peer.Mesh, peer.Gorilla), "p50-×gorilla")
	b.ReportMetric(used.ratio(peer.Mesh, peer.Gorilla), "server-×gorilla")
}

// BenchmarkJoinsAsARoomGrows joins and leaves through the socket, with 8 connections and
// one request at a time each, a room without subscribers while it grows. An answer lists
// at most 10 members. Rooms of up to 500 are mirrored for joins, larger ones are read.
func BenchmarkJoinsAsARoomGrows(b *testing.B) {
	sizes := []int{10, 100, 1000, 10_000, 100_000}
	type row struct{ p50, server, redis []float64 }
	rows := make([]row, len(sizes))
	for b.Loop() {
		r := redistest.Start(b)
		client := r.Client(b)
		m := start(b, "member")
		startMember.on(m, peer.MemberConfig{Redis: r.Addr(), Rules: []peer.Rule{{Expr: ".*"}}})
		server, addr := serve(b, peer.Config{Kind: peer.Mesh, Redis: r.Addr(), SnapshotMembers: 10})
		clients, filled := start(b, "load"), 0
		for i, size := range sizes {
			fillRoom.on(m, filling{Room: "room0", From: filled, To: size})
			filled = size
			joins := load.JoinsConfig{Addr: addr, Dialect: load.Mesh, Rooms: 1, Workers: 8, Seconds: 1}
			clients.do(order{Joins: &joins}) // fills the mirror for joins
			joins.Seconds = 3
			cpu, stored := cpuTime.on(server, struct{}{}), usage(b, client).CPU
			done := clients.do(order{Joins: &joins}).Joins
			each := func(seconds float64) float64 { return seconds * 1e6 / float64(done.Joins) }
			rows[i].server = append(rows[i].server, each(cpuTime.on(server, struct{}{})-cpu))
			rows[i].redis = append(rows[i].redis, each(usage(b, client).CPU-stored))
			rows[i].p50 = append(rows[i].p50, done.P50*1e3)
		}
	}
	for i, size := range sizes {
		b.ReportMetric(median(rows[i].p50), fmt.Sprintf("p50-ms/%d", size))
		b.ReportMetric(median(rows[i].server), fmt.Sprintf("server-µs/%d", size))
		b.ReportMetric(median(rows[i].redis), fmt.Sprintf("redis-µs/%d", size))
	}
}
