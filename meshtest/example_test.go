package meshtest_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// This example has one server and two clients. In a test, use StartRedis(t),
// StartServer(t, srv) and server.Connect(t) instead. They need no error checks and no
// cleanup.
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

	server, err := meshtest.NewServer(srv)
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	ann, err := server.Dial()
	if err != nil {
		log.Fatal(err)
	}
	bob, err := server.Dial()
	if err != nil {
		log.Fatal(err)
	}

	fmt.Println("present:", len(bob.Subscribe("lobby").Present))
	ann.Join("lobby")
	fmt.Println(bob.NextUpdate().Type)
	ann.Kill() // no close frame
	u := bob.NextUpdate()
	fmt.Println(u.Type, u.ConnectionID == ann.ID())
	// Output:
	// present: 0
	// join
	// leave true
}

// This example tests a command of the app: its answer, its refusal and the error code. In
// a test this goes into a synctest bubble.
func Example_command() {
	redis, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	if err != nil {
		log.Fatal(err)
	}
	err = srv.HandleCommand("chat/say", func(ctx context.Context, c *mesh.Connection, payload json.RawMessage) (any, error) {
		var text string
		if err := json.Unmarshal(payload, &text); err != nil || text == "" {
			return nil, &mesh.CommandError{Code: "EINVALID", Message: "say something"}
		}
		return len(text), srv.Rooms().Send(ctx, "chat", "chat/said", text)
	})
	if err != nil {
		log.Fatal(err)
	}

	server, err := meshtest.NewServer(srv)
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	ann, err := server.Dial()
	if err != nil {
		log.Fatal(err)
	}
	ann.Join("chat")

	_, err = ann.Call("chat/say", "")
	fmt.Println(meshtest.CodeOf(err), "-", err)
	answer, err := ann.Call("chat/say", "hello")
	fmt.Printf("%s %v\n", answer, err)
	fmt.Printf("%s\n", ann.NextPush("chat/said"))
	// Output:
	// EINVALID - meshtest: chat/say: say something (EINVALID, CommandError)
	// 5 <nil>
	// "hello"
}

// This example reads the members of a room in pages.
func ExampleClient_ListPresence() {
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
	server, err := meshtest.NewServer(srv)
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	var ann *meshtest.Client
	for range 5 {
		if ann, err = server.Dial(); err != nil {
			log.Fatal(err)
		}
		ann.Join("lobby")
	}

	ann.Subscribe("lobby")
	page := ann.ListPresence("lobby", "", 2)
	fmt.Println(len(page.Present), "of", page.Total)
	for page.Next != "" {
		page = ann.ListPresence("lobby", page.Next, 2)
		fmt.Println(len(page.Present), page.Restart)
	}
	// Output:
	// 2 of 5
	// 2 false
	// 1 false
}

// This example tests a guard. A refused connection sees nothing until its metadata
// change.
func Example_guard() {
	redis, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{
		Redis: redis.Client(),
		Authenticate: func(_ context.Context, r *http.Request) (any, error) {
			if r.Header.Get("Authorization") == "" {
				return nil, mesh.Refuse(http.StatusUnauthorized, "sign in first")
			}
			return map[string]bool{"staff": false}, nil
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	err = srv.TrackPresence(mesh.Exact("staff"), mesh.PresenceOptions{
		Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			user, err := mesh.MetadataOf[struct{ Staff bool }](m)
			return user.Staff, err
		},
	})
	if err != nil {
		log.Fatal(err)
	}

	server, err := meshtest.NewServer(srv)
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	_, err = server.Dial()
	fmt.Println(err)
	eve, err := server.Dial(meshtest.WithHeader("Authorization", "eve"))
	if err != nil {
		log.Fatal(err)
	}

	fmt.Println("in:", eve.Join("staff").Success, "sees:", eve.Subscribe("staff").Success)
	promoted := map[string]bool{"staff": true}
	if err := srv.Connections().SetMetadata(context.Background(), eve.ID(), promoted, mesh.MetadataOptions{}); err != nil {
		log.Fatal(err)
	}
	seen := eve.Subscribe("staff")
	fmt.Println("sees:", seen.Success, "herself:", seen.Has(eve.ID()))
	// Output:
	// meshtest: handshake refused: 401 sign in first
	// in: true sees: false
	// sees: true herself: true
}

// A client of a server that listens on a port, in this process or in another.
func ExampleDial() {
	redis, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	if err := srv.Start(ctx); err != nil {
		log.Fatal(err)
	}
	web := httptest.NewServer(srv)
	defer web.Close()
	defer srv.Shutdown(ctx)

	ann, err := meshtest.Dial(web.URL + "/ws")
	if err != nil {
		log.Fatal(err)
	}
	defer ann.Close()
	fmt.Println("joined:", ann.Join("lobby").Success)
	// Output:
	// joined: true
}
