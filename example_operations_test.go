package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// What a program does when it is told to end: out of the load balancer's
// rotation first, sockets closed evenly, then the rest.
func ExampleServer_Drain() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()
	alice := connect("alice")

	fmt.Println(srv.Drain(ctx, 50*time.Millisecond)) // 20 s where there are thousands
	fmt.Println(alice.AwaitClose().Code)
	fmt.Println(errors.Is(srv.Ready(ctx), mesh.ErrClosed))
	fmt.Println(srv.Shutdown(ctx))
	// Output:
	// <nil>
	// 1012
	// true
	// <nil>
}

// For a readiness probe. It does not fail while Redis is away.
func ExampleServer_ReadyHandler() {
	srv, _, stop := startServer(mesh.Options{})
	defer stop()
	mux := http.NewServeMux()
	mux.Handle("/readyz", srv.ReadyHandler())

	probe := func() {
		answer := httptest.NewRecorder()
		mux.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		fmt.Println(answer.Code)
	}
	probe()
	must(srv.Drain(context.Background(), 0))
	probe()
	// Output:
	// 200
	// 503
}

// An app whose own protocol shares the socket answers its own frames.
func ExampleConnection_SendMessage() {
	redis, err := meshtest.NewRedis()
	must(err)
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	must(err)

	var upgrader websocket.Upgrader
	web, err := meshtest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return // it has answered
		}
		_ = srv.ServeConn(r.Context(), ws, mesh.ConnOptions{
			Foreign: func(c *mesh.Connection, _ int, data []byte) {
				_ = c.SendMessage(websocket.TextMessage, append([]byte("you said "), data...)) // fails where it has ended
			},
		})
	}), srv)
	must(err)
	defer web.Close()

	alice, err := web.Dial()
	must(err)
	must(alice.Write(websocket.TextMessage, []byte("HELO")))
	_, answer := alice.NextMessage()
	fmt.Println(string(answer))
	// Output: you said HELO
}

// The servers that share the Redis, as Redis knows them.
func ExampleServer_Servers() {
	srv, _, stop := startServer(mesh.Options{})
	defer stop()

	servers, err := srv.Servers(context.Background())
	must(err)
	for _, s := range servers {
		fmt.Println("this one:", s.Self, "alive:", !s.Dead && s.LeaseLeft > 0)
	}
	// Output: this one: true alive: true
}

// Find says which server has a connection, and where the connection is.
func ExampleConnectionManager_Find() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}))
	must(p.Join(ctx, "lobby", "conn-1"))
	info, err := p.Connections().Find(ctx, "conn-1")
	must(err)
	fmt.Printf("%t %s\n", info.Self, info.Metadata)
	for _, r := range info.Rooms {
		fmt.Println(r.Room, r.Entry.Server == info.Server)
	}
	_, err = p.Connections().Find(ctx, "conn-2")
	fmt.Println(errors.Is(err, mesh.ErrUnknownConnection))
	// Output:
	// true {"userId":"alice"}
	// lobby true
	// true
}

func ExamplePresenceManager_Servers() {
	p, stop := startPresence()
	defer stop()

	servers, err := p.Servers(context.Background())
	must(err)
	fmt.Println(len(servers), servers[0].Self)
	// Output: 1 true
}

// All rooms, a page at a time.
func ExampleRoomManager_List() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))

	q := mesh.RoomQuery{Limit: 100}
	for {
		page, err := p.Rooms().List(ctx, q)
		must(err)
		for _, room := range page.Rooms {
			fmt.Println(room.Name, room.Members, room.Tracked)
		}
		if q.Cursor = page.Next; q.Cursor == "" {
			return
		}
	}
	// Output: lobby 1 true
}

// Why somebody is in a room, and which server says so.
func ExampleRoomManager_Entries() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}))
	must(p.Join(ctx, "lobby", "conn-1"))

	page, err := p.Rooms().Entries(ctx, "lobby", mesh.EntryQuery{})
	must(err)
	for _, e := range page.Entries {
		fmt.Println(e.ConnectionID, string(e.Metadata), e.TTL, e.Server == p.Stats().Incarnation)
	}
	// Output: conn-1 {"userId":"alice"} 0s true
}

// How far what subscribers here have been told is behind Redis.
func ExampleRoomManager_Watched() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	connect("alice").Subscribe("lobby")

	page, err := srv.Rooms().Watched(context.Background(), mesh.WatchedQuery{})
	must(err)
	for _, room := range page.Rooms {
		fmt.Println(room.Name, room.Subscriptions, room.Stale)
	}
	// Output: lobby 1 false
}

func ExampleWatchedRoom_Behind() {
	room := mesh.WatchedRoom{Epoch: "a", Seq: 7, RedisEpoch: "a", RedisSeq: 9, Compared: true}
	fmt.Println(room.Behind())
	// Output: 2 true
}

// How long calls of Redis took.
func ExampleHistogram_Quantile() {
	h, err := mesh.NewHistogram(
		[]time.Duration{time.Millisecond, 10 * time.Millisecond, 100 * time.Millisecond},
		[]uint64{90, 9, 1, 0}, 200*time.Millisecond)
	must(err)
	fmt.Println(h.Quantile(0.5), h.Quantile(0.99))
	fmt.Println(h.Sum() / time.Duration(h.Count()))
	// Output:
	// 1ms 10ms
	// 2ms
}

func ExampleHistogram_Buckets() {
	h, err := mesh.NewHistogram([]time.Duration{time.Millisecond, 10 * time.Millisecond}, []uint64{3, 2, 1}, time.Second)
	must(err)
	for bound, n := range h.Buckets() {
		fmt.Println("at most", bound, n)
	}
	fmt.Println("in all", h.Count())
	// Output:
	// at most 1ms 3
	// at most 10ms 5
	// in all 6
}
