package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// Add lets the app put a connection of any server into a room. No guard is asked.
func ExampleRoomManager_Add() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()
	alice := connect("alice")

	fmt.Println(srv.Rooms().Add(ctx, "lobby", alice.ID(), mesh.AddOptions{}))
	err := srv.Rooms().Add(ctx, "lobby", "unknown", mesh.AddOptions{})
	fmt.Println(errors.Is(err, mesh.ErrUnknownConnection))
	// Output:
	// <nil>
	// true
}

// Remove reports whether the connection was in the room.
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

// A room without a rule has members too, but no events.
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

// All returns all rooms that have a connection of any server. It reads them all, and
// there may be many. List returns them in pages.
func ExampleRoomManager_All() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	must(p.Join(ctx, "kitchen", "conn-1"))

	rooms, err := p.Rooms().All(ctx)
	must(err)
	slices.Sort(rooms) // the order is undefined
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

// Recheck asks the guards again about all subscribers and members of a room, on all
// servers. Call it after data that the guards read has changed.
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
	alice.AwaitEnded("club")                                    // the push mesh/presence-ended
	fmt.Printf("%s\n", alice.NextPush("mesh/membership-ended")) // the JoinGuard ended her membership
	// Output:
	// in: true sees it: true
	// {"roomName":"club"}
}

// Clear makes all connections leave the room. The metadata of the room stays.
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

// Delete clears a room and removes its metadata.
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

// The metadata of a room is independent of its members. It may be set for an empty room.
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

// Clients read the metadata of a room with the command mesh/get-room-metadata.
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

// Send pushes a frame to all connections in a room, on all servers, at most once each.
func ExampleRoomManager_Send() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice, bob := connect("alice"), connect("bob")
	alice.Join("lobby")
	bob.Join("lobby")

	must(srv.Rooms().Send(context.Background(), "lobby", "chat/said", "hello"))
	fmt.Printf("alice receives %s\n", alice.NextPush("chat/said"))
	fmt.Printf("bob receives %s\n", bob.NextPush("chat/said"))
	// Output:
	// alice receives "hello"
	// bob receives "hello"
}

// List returns the rooms in pages.
func ExampleRoomManager_List() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))

	q := mesh.RoomQuery{Limit: 100}
	for {
		page, err := p.Rooms().List(ctx, q)
		must(err)
		for _, room := range page.Rooms {
			fmt.Println(room.Name, room.Members, room.Tracked)
		}
		if q.Cursor = page.Next; q.Cursor == "" {
			return
		}
	}
	// Output: lobby 1 true
}

// Entries shows the entries of a room: each connection with its metadata, its TTL and the
// server that owns it.
func ExampleRoomManager_Entries() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}))
	must(p.Join(ctx, "lobby", "conn-1"))

	page, err := p.Rooms().Entries(ctx, "lobby", mesh.EntryQuery{})
	must(err)
	for _, e := range page.Entries {
		fmt.Println(e.ConnectionID, string(e.Metadata), e.TTL, e.Server == p.Stats().Incarnation)
	}
	// Output: conn-1 {"userId":"alice"} 0s true
}

// Watched returns the rooms that this server watches, with their subscriptions. It also
// compares them with Redis.
func ExampleRoomManager_Watched() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	connect("alice").Subscribe("lobby")

	page, err := srv.Rooms().Watched(context.Background(), mesh.WatchedQuery{})
	must(err)
	for _, room := range page.Rooms {
		fmt.Println(room.Name, room.Subscriptions, room.Stale)
	}
	// Output: lobby 1 false
}

func ExampleWatchedRoom_Behind() {
	room := mesh.WatchedRoom{Epoch: "a", Seq: 7, RedisEpoch: "a", RedisSeq: 9, Compared: true}
	fmt.Println(room.Behind())
	// Output: 2 true
}

// Send pushes a frame of the app to one socket.
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

// Close sends the queued frames, and then closes the socket with the code.
func ExampleConnection_Close() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	alice := connect("alice")

	c, ok := srv.Connection(alice.ID())
	if !ok {
		return // it has ended or is on another server: see ConnectionManager.Close
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

// Member returns the connection as guards see it.
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

// SetMetadata sets the metadata of a connection of any server. If two servers merge
// changes at the same time, both take effect.
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

// RoomMetadata returns the metadata of all connections in a room.
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

// Send pushes a frame to one connection of any server. It does not report whether the
// frame has arrived. If the app needs to know, let the client answer with a command.
func ExampleConnectionManager_Send() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()
	alice := connect("alice")

	invitation := map[string]string{"from": "bob", "room": "doc:7"}
	fmt.Println(srv.Connections().Send(ctx, alice.ID(), "invited", invitation))
	fmt.Printf("%s\n", alice.NextPush("invited"))

	err := srv.Connections().Send(ctx, "unknown", "invited", invitation)
	fmt.Println(errors.Is(err, mesh.ErrUnknownConnection))
	// Output:
	// <nil>
	// {"from":"bob","room":"doc:7"}
	// true
}

// Close ends a connection of any server, and its entries.
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

// Recheck asks the guards about a connection again. Call it after data that the guards
// read has changed. Subscriptions that they now refuse end.
func ExampleConnectionManager_Recheck() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	var members sync.Map // members of the club, by user id
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
	alice.AwaitEnded("club") // the push mesh/presence-ended
	fmt.Println("sees the club:", alice.Subscribe("club").Success)
	// Output:
	// sees the club: true
	// sees the club: false
}

// SendMessage sends a message of the app's own protocol, which shares the socket with
// the Mesh protocol.
func ExampleConnection_SendMessage() {
	redis, err := meshtest.NewRedis()
	must(err)
	defer redis.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: redis.Client()})
	must(err)

	var upgrader websocket.Upgrader
	web, err := meshtest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return // Upgrade has answered
		}
		_ = srv.ServeConn(r.Context(), ws, mesh.ConnOptions{
			Foreign: func(c *mesh.Connection, _ int, data []byte) {
				_ = c.SendMessage(websocket.TextMessage, append([]byte("you said "), data...)) // fails if the connection has ended
			},
		})
	}), srv)
	must(err)
	defer web.Close()

	alice, err := web.Dial()
	must(err)
	must(alice.Write(websocket.TextMessage, []byte("HELO")))
	_, answer := alice.NextMessage()
	fmt.Println(string(answer))
	// Output: you said HELO
}

// Find returns the server of a connection, its metadata and its rooms.
func ExampleConnectionManager_Find() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}))
	must(p.Join(ctx, "lobby", "conn-1"))
	info, err := p.Connections().Find(ctx, "conn-1")
	must(err)
	fmt.Printf("%t %s\n", info.Self, info.Metadata)
	for _, r := range info.Rooms {
		fmt.Println(r.Room, r.Entry.Server == info.Server)
	}
	_, err = p.Connections().Find(ctx, "conn-2")
	fmt.Println(errors.Is(err, mesh.ErrUnknownConnection))
	// Output:
	// true {"userId":"alice"}
	// lobby true
	// true
}

// An app throws a user out of a room, with all tabs. A JoinGuard has to refuse the user
// from then on, because the clients join again when they reconnect.
func ExampleRoomManager_RemoveUser() {
	srv, connect, stop := startServer(mesh.Options{UserID: mesh.UserIDField("userId")})
	defer stop()
	ctx := context.Background()

	for range 2 {
		tab := connect("ann")
		defer tab.Close()
		must(srv.Rooms().Add(ctx, "lobby", tab.ID(), mesh.AddOptions{}))
	}
	removed, err := srv.Rooms().RemoveUser(ctx, "lobby", "ann")
	must(err)
	fmt.Println("removed:", removed)
	// Output: removed: 2
}
