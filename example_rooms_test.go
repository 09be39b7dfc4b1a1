package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/meshpresence/mesh"
)

// The app decides who is in a room, whichever server the connection is on. No
// guard is asked.
func ExampleRoomManager_Add() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()
	alice := connect("alice")

	fmt.Println(srv.Rooms().Add(ctx, "lobby", alice.ID()))
	err := srv.Rooms().Add(ctx, "lobby", "nobody")
	fmt.Println(errors.Is(err, mesh.ErrUnknownConnection))
	// Output:
	// <nil>
	// true
}

// Remove reports whether the connection was in.
func ExampleRoomManager_Remove() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()
	alice := connect("alice")
	alice.Join("lobby")

	fmt.Println(srv.Rooms().Remove(ctx, "lobby", alice.ID()))
	fmt.Println(srv.Rooms().Remove(ctx, "lobby", alice.ID()))
	// Output:
	// true <nil>
	// false <nil>
}

func ExampleRoomManager_Contains() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))

	fmt.Println(p.Rooms().Contains(ctx, "lobby", "conn-1"))
	fmt.Println(p.Rooms().Contains(ctx, "kitchen", "conn-1"))
	// Output:
	// true <nil>
	// false <nil>
}

// A room without a rule has members too, and no events.
func ExampleRoomManager_ConnectionIDs() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "not tracked", "conn-1"))

	fmt.Println(p.Rooms().ConnectionIDs(ctx, "not tracked"))
	// Output:
	// [conn-1] <nil>
}

// Rooms that somebody is in, on all servers. There may be many: this reads
// them all.
func ExampleRoomManager_All() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	must(p.Join(ctx, "kitchen", "conn-1"))

	rooms, err := p.Rooms().All(ctx)
	must(err)
	slices.Sort(rooms) // they come in no particular order
	fmt.Println(rooms)
	// Output:
	// [kitchen lobby]
}

func ExampleRoomManager_Of() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	must(p.Join(ctx, "kitchen", "conn-1"))

	fmt.Println(p.Rooms().Of(ctx, "conn-1"))
	// Output:
	// [kitchen lobby] <nil>
}

// The app's database has changed: the guards decide again about all subscribers
// and members of the room, on all servers.
func ExampleRoomManager_Recheck() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	var club sync.Map // members of the club, by user id
	club.Store("alice", true)
	inClub := func(_ context.Context, m mesh.Member, _ string) (bool, error) {
		u, err := mesh.MetadataOf[user](m)
		_, ok := club.Load(u.ID)
		return ok, err
	}
	must(srv.TrackPresence(mesh.Exact("club"), mesh.PresenceOptions{Guard: inClub, JoinGuard: inClub}))
	alice := connect("alice")
	fmt.Println("in:", alice.Join("club").Success, "sees it:", alice.Subscribe("club").Success)

	club.Delete("alice")
	must(srv.Rooms().Recheck(context.Background(), "club"))
	alice.AwaitEnded("club")                                    // mesh/presence-ended
	fmt.Printf("%s\n", alice.NextPush("mesh/membership-ended")) // a JoinGuard took her out
	// Output:
	// in: true sees it: true
	// {"roomName":"club"}
}

// Everybody leaves; the room's metadata stays.
func ExampleRoomManager_Clear() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	must(p.Rooms().SetMetadata(ctx, "lobby", map[string]string{"topic": "Go"}, mesh.MetadataOptions{}))

	fmt.Println(p.Rooms().Clear(ctx, "lobby"))
	fmt.Println(p.Count(ctx, "lobby"))
	data, err := p.Rooms().Metadata(ctx, "lobby")
	fmt.Printf("%s %v\n", data, err)
	// Output:
	// <nil>
	// 0 <nil>
	// {"topic":"Go"} <nil>
}

// Delete forgets the metadata too.
func ExampleRoomManager_Delete() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Rooms().SetMetadata(ctx, "lobby", map[string]string{"topic": "Go"}, mesh.MetadataOptions{}))

	fmt.Println(p.Rooms().Delete(ctx, "lobby"))
	data, err := p.Rooms().Metadata(ctx, "lobby")
	fmt.Println(data == nil, err)
	// Output:
	// <nil>
	// true <nil>
}

// A room's metadata do not need anybody to be in.
func ExampleRoomManager_SetMetadata() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Rooms().SetMetadata(ctx, "lobby", map[string]any{"topic": "Go", "seats": 8}, mesh.MetadataOptions{}))
	must(p.Rooms().SetMetadata(ctx, "lobby", map[string]any{"topic": "Redis"}, mesh.MetadataOptions{Strategy: mesh.Merge}))
	data, err := p.Rooms().Metadata(ctx, "lobby")
	fmt.Printf("%s %v\n", data, err)
	// Output:
	// {"seats":8,"topic":"Redis"} <nil>
}

// Clients read a room's metadata by mesh/get-room-metadata.
func ExampleRoomManager_Metadata() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()
	must(srv.Rooms().SetMetadata(ctx, "lobby", map[string]string{"topic": "Go"}, mesh.MetadataOptions{}))

	data, err := srv.Rooms().Metadata(ctx, "lobby")
	fmt.Printf("%s %v\n", data, err)
	fmt.Printf("%s\n", connect("alice").RoomMetadata("lobby"))
	// Output:
	// {"topic":"Go"} <nil>
	// {"topic":"Go"}
}

// To everybody in the room, on all servers, at most once each.
func ExampleRoomManager_Send() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice, bob := connect("alice"), connect("bob")
	alice.Join("lobby")
	bob.Join("lobby")

	must(srv.Rooms().Send(context.Background(), "lobby", "chat/said", "hello"))
	fmt.Printf("alice hears %s\n", alice.NextPush("chat/said"))
	fmt.Printf("bob hears %s\n", bob.NextPush("chat/said"))
	// Output:
	// alice hears "hello"
	// bob hears "hello"
}
