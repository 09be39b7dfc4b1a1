package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// Mistakes in the options are told here, not later. Nothing is asked of Redis.
func ExampleNewServer() {
	redis, err := meshtest.NewRedis() // redis.NewClient(…) in a program
	must(err)
	defer redis.Close()

	_, err = mesh.NewServer(mesh.Options{Redis: redis.Client(), PingInterval: 15 * time.Second})
	fmt.Println(err)
	_, err = mesh.NewServer(mesh.Options{})
	fmt.Println(err)
	// Output:
	// <nil>
	// mesh: invalid options: Redis is required
}

// Rules, hooks and commands first, so that the first client finds them.
func ExampleServer_Start() {
	redis, err := meshtest.NewRedis()
	must(err)
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	must(err)
	must(srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // for Redis to answer
	defer cancel()
	fmt.Println(srv.Start(ctx))
	fmt.Println(srv.Shutdown(ctx))
	// Output:
	// <nil>
	// <nil>
}

// A readiness probe, so that a load balancer sends nobody before Start or
// after Shutdown.
func ExampleServer_Ready() {
	srv, _, stop := startServer(mesh.Options{})
	defer stop()

	ready := func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		if err := srv.Ready(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	}
	probe := func() int {
		w := httptest.NewRecorder()
		ready(w, httptest.NewRequest(http.MethodGet, "/ready", nil))
		return w.Code
	}
	fmt.Println(probe())
	must(srv.Shutdown(context.Background()))
	fmt.Println(probe())
	// Output:
	// 200
	// 503
}

// Sockets are closed with 1012, "service restart", upon which the JavaScript
// client comes back by itself. Then shut the http.Server down.
func ExampleServer_Shutdown() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice := connect("alice")
	alice.Join("lobby")

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	fmt.Println(srv.Shutdown(ctx))
	fmt.Println(alice.AwaitClose().Code)
	// Output:
	// <nil>
	// 1012
}

// A guard reads the metadata that the server, not the client, has set.
func ExampleServer_TrackPresence() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	err := srv.TrackPresence(mesh.Exact("admin-room"), mesh.PresenceOptions{
		TTL: time.Minute,
		Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			u, err := mesh.MetadataOf[user](m)
			return u.ID == "root", err
		},
	})
	fmt.Println(err)

	fmt.Println(connect("alice").Subscribe("admin-room").Success)
	fmt.Println(connect("root").Subscribe("admin-room").Success)
	// Output:
	// <nil>
	// false
	// true
}

// Commands of the app's own, on the same socket. Whatever encodes to JSON is
// the answer.
func ExampleServer_HandleCommand() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	err := srv.HandleCommand("chat/say", func(ctx context.Context, c *mesh.Connection, payload json.RawMessage) (any, error) {
		var p struct{ Text string }
		if err := json.Unmarshal(payload, &p); err != nil {
			return nil, err
		}
		u, err := mesh.MetadataOf[user](c.Member())
		if err != nil {
			return nil, err
		}
		return true, srv.Rooms().Send(ctx, "lobby", "chat/said", u.ID+": "+p.Text)
	})
	must(err)

	alice := connect("alice")
	alice.Join("lobby")
	answer, err := alice.Call("chat/say", map[string]string{"text": "hello"})
	fmt.Printf("%s %v\n", answer, err)
	fmt.Printf("%s\n", alice.NextPush("chat/said"))
	// Output:
	// true <nil>
	// "alice: hello"
}

// A code for programs and a text for people. Of any other error the client
// gets the text, with code ESERVER.
func ExampleCommandError() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	must(srv.HandleCommand("vote", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
		return nil, &mesh.CommandError{Code: "ECLOSED", Name: "VoteError", Message: "the vote is over"}
	}))

	_, err := connect("alice").Call("vote", "yes")
	if answered, ok := errors.AsType[*meshtest.CommandError](err); ok {
		fmt.Println(answered.Code, answered.Name, answered.Message)
	}
	// Output:
	// ECLOSED VoteError the vote is over
}

// Metadata set here is there when the client joins: its commands wait.
func ExampleServer_OnConnection() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	srv.OnConnection(func(ctx context.Context, c *mesh.Connection) {
		seat := map[string]int{"seat": 12}
		must(srv.Connections().SetMetadata(ctx, c.ID(), seat, mesh.MetadataOptions{Strategy: mesh.Merge}))
	})

	joined := connect("alice").Join("lobby")
	fmt.Printf("%s\n", joined.Present[0].Metadata)
	// Output:
	// {"userId":"alice","seat":12}
}

// It is called after the connection has left its rooms.
func ExampleServer_OnDisconnection() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	gone := make(chan string)
	srv.OnDisconnection(func(_ context.Context, c *mesh.Connection, reason error) {
		gone <- fmt.Sprintf("%s, in %v", c.Member().Metadata, c.Rooms())
	})

	alice := connect("alice")
	alice.Join("lobby")
	alice.Close()
	fmt.Println(<-gone)
	// Output:
	// {"userId":"alice"}, in []
}

// The socket of an id, if it is here; ConnectionManager reaches those of other
// servers too.
func ExampleServer_Connection() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice := connect("alice")

	c, ok := srv.Connection(alice.ID())
	fmt.Println(ok, c.ID() == alice.ID())
	_, ok = srv.Connection("elsewhere")
	fmt.Println(ok)
	// Output:
	// true true
	// false
}

// A Server is an http.Handler: mount it where clients connect.
func ExampleServer_ServeHTTP() {
	srv, _, stop := startServer(mesh.Options{})
	defer stop()
	mux := http.NewServeMux()
	mux.Handle("/ws", srv)

	w := httptest.NewRecorder()
	mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/ws", nil)) // no WebSocket
	fmt.Println(w.Code, w.Body)
	// Output:
	// 400 a WebSocket upgrade is expected here
}

// The app upgrades, and speaks a protocol of its own beside Mesh's.
func ExampleServer_ServeConn() {
	redis, err := meshtest.NewRedis()
	must(err)
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	must(err)

	heard := make(chan string)
	upgrader := websocket.Upgrader{Subprotocols: []string{"app.v1"}}
	web, err := meshtest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return // it has answered
		}
		_ = srv.ServeConn(r.Context(), ws, mesh.ConnOptions{ // returns how it ended
			Metadata: map[string]string{"userId": r.URL.Query().Get("user")},
			Foreign:  func(_ *mesh.Connection, _ int, data []byte) { heard <- string(data) },
		})
	}), srv)
	must(err)
	defer web.Close()

	alice, err := web.Dial(meshtest.WithPath("/app?user=alice"), meshtest.WithSubprotocols("app.v1"))
	must(err)
	must(alice.Write(websocket.TextMessage, []byte("HELO"))) // not Mesh's
	fmt.Println(<-heard)
	fmt.Printf("%s\n", alice.Join("lobby").Present[0].Metadata)
	// Output:
	// HELO
	// {"userId":"alice"}
}

// For a page of numbers, or a metrics collector.
func ExampleServer_Stats() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	connect("alice").Join("lobby")

	st := srv.Stats()
	fmt.Println("connections:", st.Connections, "entries:", st.Entries, "rooms:", st.Rooms)
	// Output:
	// connections: 1 entries: 1 rooms: 1
}
