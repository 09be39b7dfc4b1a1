package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

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
