package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// NewServer checks the options and returns an error that names the field. It does not
// use Redis.
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

// Add rules, hooks and commands before Start, so that they apply to the first client.
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

// Ready is meant for a readiness probe. A load balancer that uses it sends no clients
// before Start or after Shutdown.
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

// Shutdown closes sockets with code 1012, "service restart". The JavaScript client then
// reconnects by itself. Shut the http.Server down afterwards.
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

// A guard can trust the metadata of a connection, because the server has set it.
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

// HandleCommand adds a command of the app on the same socket. The handler may return any
// value that encodes to JSON.
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

// A CommandError has a code for programs and a text for people. For any other error of a
// handler, the client gets the text with code ESERVER.
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

// The commands of a client wait until its OnConnection hooks have returned, so metadata
// that a hook sets is there when the client joins a room.
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

// OnDisconnection hooks run after the connection has left its rooms.
func ExampleServer_OnDisconnection() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ended := make(chan string)
	srv.OnDisconnection(func(_ context.Context, c *mesh.Connection, reason error) {
		ended <- fmt.Sprintf("%s, in %v", c.Member().Metadata, c.Rooms())
	})

	alice := connect("alice")
	alice.Join("lobby")
	alice.Close()
	fmt.Println(<-ended)
	// Output:
	// {"userId":"alice"}, in []
}

// Connection returns a connection of this server by its id. ConnectionManager also
// reaches connections of other servers.
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
	mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/ws", nil)) // not a WebSocket request
	fmt.Println(w.Code, w.Body)
	// Output:
	// 400 a WebSocket upgrade is expected here
}

// With ServeConn, the app upgrades the request itself and may use a protocol of its own
// beside the Mesh protocol.
func ExampleServer_ServeConn() {
	redis, err := meshtest.NewRedis()
	must(err)
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	must(err)

	received := make(chan string)
	upgrader := websocket.Upgrader{Subprotocols: []string{"app.v1"}}
	web, err := meshtest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return // Upgrade has answered
		}
		_ = srv.ServeConn(r.Context(), ws, mesh.ConnOptions{ // returns the reason for the end
			Metadata: map[string]string{"userId": r.URL.Query().Get("user")},
			Foreign:  func(_ *mesh.Connection, _ int, data []byte) { received <- string(data) },
		})
	}), srv)
	must(err)
	defer web.Close()

	alice, err := web.Dial(meshtest.WithPath("/app?user=alice"), meshtest.WithSubprotocols("app.v1"))
	must(err)
	must(alice.Write(websocket.TextMessage, []byte("HELO"))) // not a frame of the Mesh protocol
	fmt.Println(<-received)
	fmt.Printf("%s\n", alice.Join("lobby").Present[0].Metadata)
	// Output:
	// HELO
	// {"userId":"alice"}
}

// Stats is meant for a status page or a metrics collector.
func ExampleServer_Stats() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	connect("alice").Join("lobby")

	st := srv.Stats()
	fmt.Println("connections:", st.Connections, "entries:", st.Entries, "rooms:", st.Rooms)
	// Output:
	// connections: 1 entries: 1 rooms: 1
}

// A program calls Drain and then Shutdown before it exits. Drain makes Ready fail, so
// that the load balancer sends no more clients, and closes the sockets evenly over time.
func ExampleServer_Drain() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()
	alice := connect("alice")

	fmt.Println(srv.Drain(ctx, 50*time.Millisecond)) // use 20 s for thousands of sockets
	fmt.Println(alice.AwaitClose().Code)
	fmt.Println(errors.Is(srv.Ready(ctx), mesh.ErrClosed))
	fmt.Println(srv.Shutdown(ctx))
	// Output:
	// <nil>
	// 1012
	// true
	// <nil>
}

// ReadyHandler is meant for a readiness probe. It does not fail while Redis is away.
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

// Servers returns the live servers of the group, and the dead ones until they are cleaned
// up.
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

// A quantile of a histogram, and the mean.
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

// Authenticate runs before the upgrade. The value that it returns becomes the metadata of
// the connection, which guards can trust.
func ExampleOptions_authenticate() {
	srv, web, stop := serve(mesh.Options{
		Authenticate: func(_ context.Context, r *http.Request) (any, error) {
			c, err := r.Cookie("session") // a real program looks up the session
			if err != nil {
				return nil, mesh.Refuse(http.StatusUnauthorized, "sign in first")
			}
			return map[string]string{"userId": c.Value}, nil
		},
	})
	defer stop()

	_, err := web.Dial()
	if refused, ok := errors.AsType[*meshtest.HandshakeError](err); ok {
		fmt.Println(refused.Status, refused.Body)
	}

	alice, err := web.Dial(meshtest.WithHeader("Cookie", "session=alice"))
	must(err)
	data, err := srv.Connections().Metadata(context.Background(), alice.ID())
	fmt.Printf("%s %v\n", data, err)
	// Output:
	// 401 sign in first
	// {"userId":"alice"} <nil>
}

// Clients may change their colour, but nothing else.
func ExampleOptions_clientMetadata() {
	type profile struct {
		UserID string `json:"userId"`
		Colour string `json:"colour,omitempty"`
	}
	_, connect, stop := startServer(mesh.Options{
		ClientMetadata: func(_ context.Context, m mesh.Member, proposed json.RawMessage) (any, error) {
			current, err := mesh.MetadataOf[profile](m)
			if err != nil {
				return nil, err
			}
			var wanted profile
			if err := json.Unmarshal(proposed, &wanted); err != nil {
				return nil, err
			}
			current.Colour = wanted.Colour
			return current, nil
		},
	})
	defer stop()

	alice := connect("alice")
	alice.SetMetadata(profile{UserID: "root", Colour: "red"}, "merge")
	fmt.Printf("%s\n", alice.Metadata())
	// Output:
	// {"userId":"alice","colour":"red"}
}

// Browsers may connect from pages of these origins. Clients that send no Origin are not
// browsers and are not affected.
func ExampleOptions_allowedOrigins() {
	_, web, stop := serve(mesh.Options{
		AllowedOrigins: []string{"https://example.com", "https://*.example.com", "http://localhost:*"},
	})
	defer stop()

	for _, origin := range []string{"https://app.example.com", "http://localhost:3000", "https://example.org"} {
		_, err := web.Dial(meshtest.WithHeader("Origin", origin))
		if refused, ok := errors.AsType[*meshtest.HandshakeError](err); ok {
			fmt.Println(origin, refused.Status)
			continue
		}
		fmt.Println(origin, err)
	}
	// Output:
	// https://app.example.com <nil>
	// http://localhost:3000 <nil>
	// https://example.org 403
}

// A page cannot set the headers of a WebSocket request, but it can offer a token as a
// subprotocol, with new WebSocket(url, ["mesh", token]).
func ExampleOptions_subprotocols() {
	_, web, stop := serve(mesh.Options{
		Subprotocols: []string{"mesh"},
		Authenticate: func(_ context.Context, r *http.Request) (any, error) {
			if slices.Contains(websocket.Subprotocols(r), "alices-token") { // a real program looks up the token
				return map[string]string{"userId": "alice"}, nil
			}
			return nil, mesh.Refuse(http.StatusUnauthorized, "sign in first")
		},
	})
	defer stop()

	alice, err := web.Dial(meshtest.WithSubprotocols("mesh", "alices-token"))
	must(err)
	fmt.Println(alice.Subprotocol(), string(alice.Metadata()))
	// Output:
	// mesh {"userId":"alice"}
}

// If EnablePresenceExpirationEvents is false, the app ends expired entries itself.
func ExampleOptions_enablePresenceExpirationEvents() {
	off := false
	srv, connect, stop := startServer(mesh.Options{EnablePresenceExpirationEvents: &off})
	defer stop()
	must(srv.TrackPresence(mesh.Exact("office"), mesh.PresenceOptions{TTL: time.Minute}))
	connect("alice").Join("office")

	// A real program calls it from time to time, on one server or on all.
	ended, err := srv.Presence().CleanExpired(context.Background(), "office")
	fmt.Println(ended, err)
	// Output:
	// 0 <nil>
}

// A command that exceeds a limit is answered with an error and has no effect.
func ExampleLimits() {
	_, connect, stop := startServer(mesh.Options{Limits: mesh.Limits{
		RoomsPerConnection: 2,
		StateBytes:         1 << 10,
		CommandsPerSecond:  -1, // no limit
	}})
	defer stop()

	alice := connect("alice")
	alice.Join("lobby")
	alice.Join("kitchen")
	_, err := alice.Call("mesh/join-room", map[string]string{"roomName": "garden"})
	fmt.Println(meshtest.CodeOf(err))
	// Output:
	// ELIMIT
}

// Exact matches the one room with this name. The name is not an expression.
func ExampleExact() {
	p, stop := startPresence()
	defer stop()
	fmt.Println(p.TrackPresence(mesh.Exact("doc.1"), mesh.PresenceOptions{}))
	fmt.Println(p.TrackPresence(mesh.Exact(""), mesh.PresenceOptions{}))
	// Output:
	// <nil>
	// mesh: invalid pattern: Exact of an empty name
}

// A regular expression may match any part of a room name. Use ^ and $ to match the whole
// name.
func ExampleRegexp() {
	p, stop := startPresence()
	defer stop()
	for _, expr := range []string{`.+`, `^doc:[0-9]+$`} { // all rooms, and documents only
		fmt.Println(p.TrackPresence(mesh.Regexp(regexp.MustCompile(expr)), mesh.PresenceOptions{TTL: time.Minute}))
	}
	// Output:
	// <nil>
	// <nil>
}

// Guard decides about viewers of a room, JoinGuard about its members. In this example, a
// guest may join and is visible to others, but cannot see the room.
func ExamplePresenceOptions() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	must(srv.TrackPresence(mesh.Exact("stage"), mesh.PresenceOptions{
		TTL: time.Minute,
		Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			u, err := mesh.MetadataOf[user](m)
			return u.ID != "guest", err
		},
		JoinGuard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			u, err := mesh.MetadataOf[user](m)
			return u.ID != "banned", err
		},
	}))

	for _, name := range []string{"alice", "guest", "banned"} {
		c := connect(name)
		joined := c.Join("stage")
		fmt.Printf("%s: joined %t, sees %d, may subscribe %t\n", name, joined.Success, len(joined.Present), c.Subscribe("stage").Success)
	}
	// Output:
	// alice: joined true, sees 1, may subscribe true
	// guest: joined true, sees 0, may subscribe false
	// banned: joined false, sees 0, may subscribe true
}

// For a cursor, only the newest position matters. With this StateInterval, subscribers
// receive at most one state of each member per second, and always the last one.
func ExamplePresenceOptions_stateInterval() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.TrackPresence(mesh.Exact("board"), mesh.PresenceOptions{StateInterval: time.Second}))
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "board", "conn-1"))

	states := 0
	for event, err := range p.Subscribe(ctx, "board", mesh.SubscribeOptions{}) {
		must(err)
		if event.Type != mesh.EventState {
			for x := range 100 {
				must(p.PublishState(ctx, "board", "conn-1", map[string]int{"x": x + 1}, mesh.StateOptions{}))
			}
			continue
		}
		if states++; string(event.State) == `{"x":100}` {
			break
		}
	}
	fmt.Println("received the last state and fewer than ten in all:", states < 10)
	// Output: received the last state and fewer than ten in all: true
}

// MetadataOf decodes the metadata of a member, for example in a guard or a hook.
func ExampleMetadataOf() {
	type user struct {
		Name  string `json:"name"`
		Admin bool   `json:"admin"`
	}
	m := mesh.Member{ID: "conn-1", Metadata: json.RawMessage(`{"name":"Alice","admin":true}`)}
	fmt.Println(mesh.MetadataOf[user](m))
	fmt.Println(mesh.MetadataOf[user](mesh.Member{ID: "conn-2"})) // without metadata
	_, err := mesh.MetadataOf[[]string](m)
	fmt.Println(errors.Is(err, mesh.ErrInvalidMetadata))
	// Output:
	// {Alice true} <nil>
	// { false} <nil>
	// true
}

// The client gets the status and the text of a Refusal. For any other error, it gets only
// 401.
func ExampleRefuse() {
	authenticate := func(_ context.Context, r *http.Request) (any, error) {
		if _, err := r.Cookie("session"); err != nil {
			return nil, mesh.Refuse(http.StatusForbidden, "sign in first")
		}
		return map[string]string{"userId": "alice"}, nil
	}
	_, web, stop := serve(mesh.Options{Authenticate: authenticate})
	defer stop()

	_, err := web.Dial()
	if refused, ok := errors.AsType[*meshtest.HandshakeError](err); ok {
		fmt.Println(refused.Status, refused.Body)
	}
	alice, err := web.Dial(meshtest.WithHeader("Cookie", "session=1"))
	must(err)
	fmt.Printf("%s\n", alice.Metadata())
	// Output:
	// 403 sign in first
	// {"userId":"alice"}
}

// If a room is no longer tracked, its subscriptions end, but its members stay.
func ExampleServer_UntrackPresence() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()

	must(srv.TrackPresence(mesh.Exact("meeting"), mesh.PresenceOptions{}))
	ada := connect("ada")
	must(srv.Rooms().Add(ctx, "meeting", ada.ID(), mesh.AddOptions{}))
	for e, err := range srv.Presence().Subscribe(ctx, "meeting", mesh.SubscribeOptions{}) {
		if err != nil {
			fmt.Println("ended:", errors.Is(err, mesh.ErrNotTracked))
			break
		}
		fmt.Println(e.Type, e.Snapshot.Total)
		fmt.Println("removed:", srv.UntrackPresence(mesh.Exact("meeting")))
	}
	members, err := srv.Rooms().ConnectionIDs(ctx, "meeting")
	must(err)
	fmt.Println("still in:", len(members))
	fmt.Println("removed:", srv.UntrackPresence(mesh.Exact("meeting")))
	// Output:
	// snapshot 1
	// removed: true
	// ended: true
	// still in: 1
	// removed: false
}
