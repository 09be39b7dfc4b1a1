package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// user is the metadata of a connection in this app. Guards decide by it, and pages show
// it.
type user struct {
	ID    string `json:"userId"`
	Admin bool   `json:"admin,omitempty"`
}

// signIn runs before a request is upgraded. A real program would look up the session.
// The returned value becomes the metadata of the connection.
func signIn(_ context.Context, r *http.Request) (any, error) {
	id, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return nil, mesh.Refuse(http.StatusUnauthorized, "sign in first")
	}
	return user{ID: id, Admin: id == "root"}, nil
}

// adminsOnly is a guard that lets only admins see a room.
func adminsOnly(_ context.Context, m mesh.Member, _ string) (bool, error) {
	u, err := mesh.MetadataOf[user](m)
	return u.Admin, err
}

// newPresence returns a server with the rules and commands of this app.
func newPresence(client redis.UniversalClient) (*mesh.Server, error) {
	srv, err := mesh.NewServer(mesh.Options{Redis: client, Authenticate: signIn})
	if err != nil {
		return nil, err
	}
	say := func(ctx context.Context, c *mesh.Connection, text json.RawMessage) (any, error) {
		return true, srv.Rooms().Send(ctx, "lobby", "chat/said", text)
	}
	return srv, errors.Join(
		srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}),
		srv.TrackPresence(mesh.Regexp(regexp.MustCompile(`^doc:`)), mesh.PresenceOptions{TTL: time.Minute}),
		srv.TrackPresence(mesh.Exact("doc:audit"), mesh.PresenceOptions{Guard: adminsOnly}),
		srv.HandleCommand("chat/say", say),
	)
}

// This program runs from Start to Shutdown. A client signs in, joins a room and
// disconnects. All subscribers to the room see this, here and on other servers with the
// same Redis.
func Example() {
	// An in-process Redis, so that the example runs anywhere. In a real program:
	// client := redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	memory, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer memory.Close()
	client := memory.Client()

	srv, err := newPresence(client)
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := srv.Start(ctx); err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/ws", srv)
	web := httptest.NewServer(mux)

	// Alice connects, as a browser does with the JavaScript client.
	alice, err := meshtest.Dial(web.URL+"/ws", meshtest.WithHeader("Authorization", "Bearer alice"))
	if err != nil {
		log.Fatal(err)
	}

	for event, err := range srv.Presence().Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
		if err != nil {
			log.Fatal(err)
		}
		switch event.Type {
		case mesh.EventSnapshot:
			fmt.Println("present:", event.Snapshot.Total)
			alice.Join("lobby")
		case mesh.EventJoin:
			fmt.Printf("joined: %s\n", event.Metadata)
			alice.Kill() // the connection breaks without a close frame
		case mesh.EventLeave:
			fmt.Println("left")
		}
		if event.Type == mesh.EventLeave {
			break
		}
	}

	// Shut down mesh first, because http.Server.Shutdown ignores WebSockets. Then close
	// the web server and the Redis client.
	if err := srv.Shutdown(ctx); err != nil {
		log.Fatal(err)
	}
	web.Close()
	if err := client.Close(); err != nil {
		log.Fatal(err)
	}
	// Output:
	// present: 0
	// joined: {"userId":"alice"}
	// left
}
