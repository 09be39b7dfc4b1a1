package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
)

// Send pushes a frame of the app's own to one socket.
func ExampleConnection_Send() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	srv.OnConnection(func(_ context.Context, c *mesh.Connection) {
		must(c.Send("greeting", map[string]string{"text": "welcome"}))
	})

	alice := connect("alice")
	fmt.Printf("%s\n", alice.NextPush("greeting"))
	// Output:
	// {"text":"welcome"}
}

// What is queued is still sent; then the socket is closed with the code.
func ExampleConnection_Close() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice := connect("alice")

	c, ok := srv.Connection(alice.ID())
	if !ok {
		return // gone, or on another server: see ConnectionManager.Close
	}
	must(c.Send("bye", nil))
	c.Close(websocket.ClosePolicyViolation, "banned")

	fmt.Printf("%s\n", alice.NextPush("bye"))
	end := alice.AwaitClose()
	fmt.Println(end.Code, end.Reason)
	// Output:
	// null
	// 1008 banned
}

// Member is the connection as guards see it.
func ExampleConnection_Member() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice := connect("alice")

	if c, ok := srv.Connection(alice.ID()); ok {
		m := c.Member()
		fmt.Println(m.ID == c.ID())
		fmt.Printf("%s\n", m.Metadata)
	}
	// Output:
	// true
	// {"userId":"alice"}
}

func ExampleConnection_Rooms() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice := connect("alice")
	alice.Join("lobby")

	if c, ok := srv.Connection(alice.ID()); ok {
		fmt.Println(c.Rooms())
	}
	// Output:
	// [lobby]
}

// Metadata of a connection, whichever server it is on. Two merges at once lose
// nothing.
func ExampleConnectionManager_SetMetadata() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}))

	connections := p.Connections()
	away := map[string]bool{"away": true}
	must(connections.SetMetadata(ctx, "conn-1", away, mesh.MetadataOptions{Strategy: mesh.Merge}))
	data, err := connections.Metadata(ctx, "conn-1")
	fmt.Printf("%s %v\n", data, err)

	must(connections.SetMetadata(ctx, "conn-1", away, mesh.MetadataOptions{})) // replaces
	data, err = connections.Metadata(ctx, "conn-1")
	fmt.Printf("%s %v\n", data, err)
	// Output:
	// {"userId":"alice","away":true} <nil>
	// {"away":true} <nil>
}

func ExampleConnectionManager_Metadata() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}))

	data, err := p.Connections().Metadata(ctx, "conn-1")
	fmt.Printf("%s %v\n", data, err)
	_, err = p.Connections().Metadata(ctx, "conn-2")
	fmt.Println(errors.Is(err, mesh.ErrUnknownConnection))
	// Output:
	// {"userId":"alice"} <nil>
	// true
}

// Who is in a room, by what the app knows about them.
func ExampleConnectionManager_RoomMetadata() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}))
	must(p.Join(ctx, "lobby", "conn-1"))

	byID, err := p.Connections().RoomMetadata(ctx, "lobby")
	must(err)
	for id, data := range byID {
		fmt.Printf("%s %s\n", id, data)
	}
	// Output:
	// conn-1 {"userId":"alice"}
}

// To one connection, on whichever server it is. It does not say whether the
// frame has arrived: let the client answer by a command of yours if you need
// to know.
func ExampleConnectionManager_Send() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()
	alice := connect("alice")

	invitation := map[string]string{"from": "bob", "room": "doc:7"}
	fmt.Println(srv.Connections().Send(ctx, alice.ID(), "invited", invitation))
	fmt.Printf("%s\n", alice.NextPush("invited"))

	err := srv.Connections().Send(ctx, "nobody", "invited", invitation)
	fmt.Println(errors.Is(err, mesh.ErrUnknownConnection))
	// Output:
	// <nil>
	// {"from":"bob","room":"doc:7"}
	// true
}

// Close ends a connection wherever it is, and so its presence.
func ExampleConnectionManager_Close() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice := connect("alice")

	fmt.Println(srv.Connections().Close(context.Background(), alice.ID()))
	fmt.Println(alice.AwaitClose().Code)
	// Output:
	// <nil>
	// 1000
}

// Where a guard goes by more than metadata, say so when that has changed: the
// subscriptions that it now refuses end.
func ExampleConnectionManager_Recheck() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	var members sync.Map // whom the app lets in, by user id
	members.Store("alice", true)
	must(srv.TrackPresence(mesh.Exact("club"), mesh.PresenceOptions{
		Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			u, err := mesh.MetadataOf[user](m)
			_, ok := members.Load(u.ID)
			return ok, err
		},
	}))
	alice := connect("alice")
	fmt.Println("sees the club:", alice.Subscribe("club").Success)

	members.Delete("alice")
	must(srv.Connections().Recheck(context.Background(), alice.ID()))
	alice.AwaitEnded("club") // she is told by mesh/presence-ended
	fmt.Println("sees the club:", alice.Subscribe("club").Success)
	// Output:
	// sees the club: true
	// sees the club: false
}
