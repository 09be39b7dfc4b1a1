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

// Who is asking is decided before the upgrade. What is returned becomes the
// connection's metadata, which guards can trust.
func ExampleOptions_authenticate() {
	srv, web, stop := serve(mesh.Options{
		Authenticate: func(_ context.Context, r *http.Request) (any, error) {
			c, err := r.Cookie("session") // a program looks it up
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

// Clients may choose their colour, and nothing else.
func ExampleOptions_clientMetadata() {
	type profile struct {
		UserID string `json:"userId"`
		Colour string `json:"colour,omitempty"`
	}
	_, connect, stop := startServer(mesh.Options{
		ClientMetadata: func(_ context.Context, m mesh.Member, proposed json.RawMessage) (any, error) {
			now, err := mesh.MetadataOf[profile](m)
			if err != nil {
				return nil, err
			}
			var wanted profile
			if err := json.Unmarshal(proposed, &wanted); err != nil {
				return nil, err
			}
			now.Colour = wanted.Colour
			return now, nil
		},
	})
	defer stop()

	alice := connect("alice")
	alice.SetMetadata(profile{UserID: "root", Colour: "red"}, "merge")
	fmt.Printf("%s\n", alice.Metadata())
	// Output:
	// {"userId":"alice","colour":"red"}
}

// Pages of these origins may connect; who sends no Origin is no browser.
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

// A page cannot set headers of a WebSocket, but it can offer a token as a
// subprotocol: new WebSocket(url, ["mesh", token]).
func ExampleOptions_subprotocols() {
	_, web, stop := serve(mesh.Options{
		Subprotocols: []string{"mesh"},
		Authenticate: func(_ context.Context, r *http.Request) (any, error) {
			if slices.Contains(websocket.Subprotocols(r), "alices-token") { // a program looks it up
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

// The app cleans up by itself, when it suits it.
func ExampleOptions_enablePresenceExpirationEvents() {
	off := false
	srv, connect, stop := startServer(mesh.Options{EnablePresenceExpirationEvents: &off})
	defer stop()
	must(srv.TrackPresence(mesh.Exact("office"), mesh.PresenceOptions{TTL: time.Minute}))
	connect("alice").Join("office")

	// In a program: every now and then, on one server or on all.
	ended, err := srv.Presence().CleanExpired(context.Background(), "office")
	fmt.Println(ended, err)
	// Output:
	// 0 <nil>
}

// What is past a limit is answered with an error, and nothing is half done.
func ExampleLimits() {
	_, connect, stop := startServer(mesh.Options{Limits: mesh.Limits{
		RoomsPerConnection: 2,
		StateBytes:         1 << 10,
		CommandsPerSecond:  -1, // none
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

// An exact name is no expression: "doc.1" is that one room.
func ExampleExact() {
	p, stop := startPresence()
	defer stop()
	fmt.Println(p.TrackPresence(mesh.Exact("doc.1"), mesh.PresenceOptions{}))
	fmt.Println(p.TrackPresence(mesh.Exact(""), mesh.PresenceOptions{}))
	// Output:
	// <nil>
	// mesh: invalid pattern: Exact of an empty name
}

// An expression matches anywhere in a room's name: say where it begins and
// ends.
func ExampleRegexp() {
	p, stop := startPresence()
	defer stop()
	for _, expr := range []string{`.+`, `^doc:[0-9]+$`} { // every room; documents
		fmt.Println(p.TrackPresence(mesh.Regexp(regexp.MustCompile(expr)), mesh.PresenceOptions{TTL: time.Minute}))
	}
	// Output:
	// <nil>
	// <nil>
}

// Guard decides who may see a room, JoinGuard who may be in it. A guest may
// join here and is seen, and sees nobody.
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
		fmt.Printf("%s: joined %t, told of %d, may watch %t\n", name, joined.Success, len(joined.Present), c.Subscribe("stage").Success)
	}
	// Output:
	// alice: joined true, told of 1, may watch true
	// guest: joined true, told of 0, may watch false
	// banned: joined false, told of 0, may watch true
}

// Of a cursor only counts where it is now: at most one state of each member is
// told in a second here, the newest.
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
	fmt.Println("told of less than a tenth, and of the last:", states < 10)
	// Output: told of less than a tenth, and of the last: true
}

// In a guard, in a hook, or for a list of members.
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

// The status and text are for the client; of any other error it gets a bare
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

// A room that is not tracked any more has members, but subscriptions to it end.
func ExampleServer_UntrackPresence() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()

	must(srv.TrackPresence(mesh.Exact("meeting"), mesh.PresenceOptions{}))
	ada := connect("ada")
	must(srv.Rooms().Add(ctx, "meeting", ada.ID()))
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
