package mesh_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"sync"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// docs/recipes.md quotes the functions of this file. TestDocsQuoteTheRecipes checks it.

// Revoke access: change the data that the guards read, then ask the guards again.
func Example_revokeAccess() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()

	var readers sync.Map // stands for the app's database
	readers.Store("alice", true)
	mayRead := func(_ context.Context, m mesh.Member, _ string) (bool, error) {
		u, err := mesh.MetadataOf[user](m)
		_, ok := readers.Load(u.ID)
		return ok, err
	}
	must(srv.TrackPresence(mesh.Exact("doc:1"), mesh.PresenceOptions{Guard: mayRead, JoinGuard: mayRead}))
	alice := connect("alice")
	fmt.Println("before:", alice.Join("doc:1").Success, alice.Subscribe("doc:1").Success)

	readers.Delete("alice")
	must(srv.Rooms().Recheck(context.Background(), "doc:1")) // on any server
	alice.AwaitEnded("doc:1")                                // the push mesh/presence-ended
	fmt.Println("after:", alice.Join("doc:1").Success, alice.Subscribe("doc:1").Success)
	// Output:
	// before: true true
	// after: false false
}

// Kick a user: refuse the user from now on, end the user's places, and close the
// connections, on any server.
func Example_kickUser() {
	srv, connect, stop := startServer(mesh.Options{UserID: mesh.UserIDField("userId")})
	defer stop()
	ctx := context.Background()
	var banned sync.Map // stands for the app's database
	must(srv.TrackPresence(mesh.Exact("doc:1"), mesh.PresenceOptions{
		Grace: 10 * time.Second,
		JoinGuard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			_, found := banned.Load(m.UserID)
			return !found, nil
		},
	}))
	alice, eve := connect("alice"), connect("eve")
	alice.Subscribe("doc:1")
	eve.Join("doc:1")
	alice.ExpectUpdate("join", "doc:1", eve.ID())

	banned.Store("eve", true) // first: clients join again
	users, err := srv.Presence().Users(ctx, "doc:1")
	must(err)
	_, err = srv.Rooms().RemoveUser(ctx, "doc:1", "eve") // ends a kept place, too
	must(err)
	for _, u := range users {
		for _, m := range u.Members {
			if u.ID != "eve" || m.Disconnected {
				continue
			}
			err := srv.Connections().Close(ctx, m.ID)       // it leaves all rooms, and its socket is closed
			if !errors.Is(err, mesh.ErrUnknownConnection) { // it has just ended
				must(err)
			}
		}
	}

	fmt.Printf("eve gets %s and is closed with %d\n", eve.NextPush("mesh/room-left"), eve.AwaitClose().Code)
	left := alice.ExpectUpdate("leave", "doc:1", eve.ID())
	fmt.Println("alice sees:", left.UserID, left.Reason)
	again := connect("eve").Join("doc:1")
	fmt.Println("eve comes back:", again.Success, again.Code)
	// Output:
	// eve gets {"roomName":"doc:1","reason":"removed"} and is closed with 1000
	// alice sees: eve removed
	// eve comes back: false EREFUSED
}

// A cap of ten editors: ten users may be in the room, and others may read.
func Example_tenEditors() {
	srv, connect, stop := startServer(mesh.Options{UserID: mesh.UserIDField("userId")})
	defer stop()
	must(srv.TrackPresence(mesh.Exact("doc:1"), mesh.PresenceOptions{MaxUsers: 10, Grace: 10 * time.Second}))
	for i := range 10 {
		connect(fmt.Sprint("editor", i)).Join("doc:1")
	}

	late := connect("late")
	answer := late.Join("doc:1")
	fmt.Println("one more user:", answer.Success, answer.Code, answer.Of, answer.Max)
	fmt.Println("may read:", late.Subscribe("doc:1").Success)
	fmt.Println("second tab of an editor:", connect("editor3").Join("doc:1").Success)
	// Output:
	// one more user: false EFULL users 10
	// may read: true
	// second tab of an editor: true
}

// Typing and cursor side by side: two parts of a page share one state, by patches.
func Example_typingAndCursor() {
	_, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice, bob := connect("alice"), connect("bob")
	alice.Join("lobby")
	bob.Subscribe("lobby")

	alice.PublishState("lobby", map[string]any{"cursor": 5}, meshtest.StateOptions{Patch: true})
	alice.PublishState("lobby", map[string]any{"typing": true}, meshtest.StateOptions{
		Patch:       true,
		ExpireAfter: 300 * time.Millisecond, // of the key typing only
	})
	for range 3 {
		fmt.Printf("bob sees: %s\n", bob.ExpectUpdate("state", "lobby", alice.ID()).State)
	}
	// Output:
	// bob sees: {"cursor":5}
	// bob sees: {"cursor":5,"typing":true}
	// bob sees: {"cursor":5}
}

// Counts for a dashboard: read the counts of many rooms in one round trip.
func Example_countsForDashboard() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()

	mux := http.NewServeMux()
	mux.HandleFunc("GET /counts", func(w http.ResponseWriter, r *http.Request) {
		counts, err := srv.Presence().Counts(r.Context(), r.URL.Query()["room"]...)
		switch {
		case errors.Is(err, mesh.ErrInvalidRoom):
			http.Error(w, "invalid room", http.StatusBadRequest)
		case err != nil: // Redis is away, for example
			http.Error(w, "try again later", http.StatusServiceUnavailable)
		default:
			_ = json.NewEncoder(w).Encode(counts)
		}
	})

	connect("alice").Join("doc:1")
	connect("bob").Join("doc:1")
	answer := httptest.NewRecorder()
	mux.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/counts?room=doc:1&room=doc:2", nil))
	fmt.Println(answer.Body)
	// Output: {"doc:1":2,"doc:2":0}
}

// A lobby with counts: numbers of many rooms, without lists.
func Example_lobbyWithCounts() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	must(srv.TrackPresence(mesh.Regexp(regexp.MustCompile("^game:")), mesh.PresenceOptions{
		Guard: func(context.Context, mesh.Member, string) (bool, error) {
			return false, nil // no client may list the players
		},
		OccupancyGuard:    mesh.Everyone, // but each one may count them
		OccupancyInterval: 200 * time.Millisecond,
	}))
	connect("alice").Join("game:1")

	page := connect("bob") // sends mesh/subscribe-occupancy, with up to 100 rooms in one command
	lobby := page.SubscribeOccupancy("game:1", "game:2")
	fmt.Println("players:", lobby["game:1"].Connections, lobby["game:2"].Connections)

	connect("carol").Join("game:2")
	update := page.NextOccupancy() // the push mesh/occupancy
	fmt.Println(update.Room, "has", update.Connections)
	fmt.Println("list of players:", page.Subscribe("game:2").Success)
	// Output:
	// players: 1 0
	// game:2 has 1
	// list of players: false
}

// Behind nginx: list the origins that may connect, and ping more often than nginx's idle
// timeout.
func Example_behindNginx() {
	srv, web, stop := serve(mesh.Options{
		// Without this list the Origin must be the Host that nginx passes on.
		AllowedOrigins: []string{"https://app.example.com"},
		// nginx cuts a connection that is silent for proxy_read_timeout, 60 s by default.
		PingInterval: 30 * time.Second,
	})
	defer stop()

	for _, origin := range []string{"https://app.example.com", "https://evil.example"} {
		_, err := web.Dial(meshtest.WithHeader("Origin", origin))
		if refused, ok := errors.AsType[*meshtest.HandshakeError](err); ok {
			fmt.Println(origin, "gets", refused.Status)
			continue
		}
		must(err)
		fmt.Println(origin, "is connected")
	}
	fmt.Println("refused so far:", srv.Stats().RefusedUpgrades["403"])
	// Output:
	// https://app.example.com is connected
	// https://evil.example gets 403
	// refused so far: 1
}

// Own transport: use Server-Sent Events instead of a WebSocket.
func Example_ownTransport() {
	p, stop := startPresence()
	defer stop()

	events := func(w http.ResponseWriter, r *http.Request) {
		ctx, id := r.Context(), rand.Text()
		if err := p.Connect(ctx, id, map[string]string{"name": r.FormValue("name")}); err != nil {
			http.Error(w, "try again later", http.StatusServiceUnavailable)
			return
		}
		defer p.Disconnect(context.WithoutCancel(ctx), id)
		if p.Join(ctx, "lobby", id) != nil {
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for e, err := range p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{Viewer: id}) {
			if err != nil {
				return
			}
			data, _ := json.Marshal(e)
			_, err = fmt.Fprintf(w, "event: %s\ndata: %s\n\n", e.Type, data)
			if err != nil || http.NewResponseController(w).Flush() != nil {
				return
			}
		}
	}

	web, err := meshtest.NewServer(http.HandlerFunc(events))
	must(err)
	defer web.Close()
	page, err := web.HTTPClient().Get(web.URL() + "/?name=ann")
	must(err)
	defer page.Body.Close()
	ctx := context.Background()
	for lines := bufio.NewScanner(page.Body); lines.Scan() && lines.Text() != "event: leave"; {
		switch lines.Text() {
		case "event: snapshot":
			fmt.Println(p.Count(ctx, "lobby"))
			must(p.Connect(ctx, "bob", nil))
			must(p.Join(ctx, "lobby", "bob"))
		case "event: join":
			fmt.Println(p.Count(ctx, "lobby"))
			must(p.Disconnect(ctx, "bob"))
		}
	}
	// Output:
	// 1 <nil>
	// 2 <nil>
}

// One badge per user: show each user once, and not a reload of the page.
func Example_oneBadgePerUser() {
	srv, connect, stop := startServer(mesh.Options{UserID: mesh.UserIDField("userId")})
	defer stop()
	must(srv.TrackPresence(mesh.Exact("doc:1"), mesh.PresenceOptions{Grace: 10 * time.Second}))
	laptop, phone := connect("alice"), connect("alice")
	laptop.Join("doc:1")

	badges := make(map[string]bool)
	for e, err := range srv.Presence().Subscribe(context.Background(), "doc:1", mesh.SubscribeOptions{}) {
		must(err)
		switch {
		case e.Type == mesh.EventSnapshot:
			for _, m := range e.Snapshot.Members {
				badges[m.UserID] = true
			}
			fmt.Println("at first:", len(badges))
			phone.Join("doc:1") // the same user, so no badge
			laptop.Leave("doc:1")
			phone.Kill() // a reload
			phone = connect("alice")
			phone.Join("doc:1")
			connect("bob").Join("doc:1")
		case e.UserArrived():
			badges[e.UserID] = true
			fmt.Println(e.UserID, "is here")
			phone.Leave("doc:1") // asks to leave, so no place is kept
		case e.UserLeft():
			delete(badges, e.UserID)
			fmt.Println(e.UserID, "has left")
			return
		}
	}
	// Output:
	// at first: 1
	// bob is here
	// alice has left
}
