package mesh_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"regexp"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// A server with one tracked room, on an in-process Redis.
func Example() {
	redis, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	if err != nil {
		log.Fatal(err)
	}
	if err := srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}); err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := srv.Start(ctx); err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/ws", srv)
	web := httptest.NewServer(mux)
	n, err := srv.Presence().Count(ctx, "lobby")
	fmt.Println(n, err)

	// http.Server.Shutdown knows nothing of WebSockets: mesh first.
	fmt.Println(srv.Shutdown(ctx))
	web.Close()
	// Output:
	// 0 <nil>
	// <nil>
}

// An app with a transport of its own hands in connection ids and says when
// they come, show life and go.
func ExamplePresenceManager() {
	redis, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer redis.Close()
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: redis.Client()})
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	rule := mesh.Regexp(regexp.MustCompile(`^doc:`))
	if err := p.TrackPresence(rule, mesh.PresenceOptions{TTL: time.Minute}); err != nil {
		log.Fatal(err)
	}
	if err := p.Start(ctx); err != nil {
		log.Fatal(err)
	}
	defer p.Shutdown(ctx)

	if err := p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}); err != nil {
		log.Fatal(err)
	}
	for event, err := range p.Subscribe(ctx, "doc:7", mesh.SubscribeOptions{}) {
		if err != nil {
			log.Fatal(err)
		}
		switch event.Type {
		case mesh.EventSnapshot:
			fmt.Println("present:", len(event.Snapshot.Members))
			err = p.Join(ctx, "doc:7", "conn-1")
		case mesh.EventJoin:
			fmt.Printf("join %s %s\n", event.ConnectionID, event.Metadata)
			err = p.PublishState(ctx, "doc:7", "conn-1", map[string]bool{"typing": true}, mesh.StateOptions{ExpireAfter: 3 * time.Second})
		case mesh.EventState:
			fmt.Printf("state %s %s\n", event.ConnectionID, event.State)
			err = p.Disconnect(ctx, "conn-1")
		case mesh.EventLeave:
			fmt.Println("leave", event.ConnectionID)
			return
		}
		if err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// present: 0
	// join conn-1 {"userId":"alice"}
	// state conn-1 {"typing":true}
	// leave conn-1
}

// A guard reads the metadata that the server, not the client, has set.
func ExampleServer_TrackPresence() {
	redis, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	if err != nil {
		log.Fatal(err)
	}
	type user struct{ IsAdmin bool }
	err = srv.TrackPresence(mesh.Exact("admin-room"), mesh.PresenceOptions{
		TTL: time.Minute,
		Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			u, err := mesh.MetadataOf[user](m)
			return u.IsAdmin, err
		},
	})
	fmt.Println(err)
	fmt.Println(srv.TrackPresence(mesh.Exact(""), mesh.PresenceOptions{}))
	fmt.Println(srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{TTL: time.Millisecond}))
	// Output:
	// <nil>
	// mesh: invalid pattern: Exact of an empty name
	// mesh: invalid options: PresenceOptions.TTL is 1ms, want 0 or 1s to 8760h0m0s (pattern "lobby")
}
