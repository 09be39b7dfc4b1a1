package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"regexp"
	"slices"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// An app with its own transport registers each connection under an id, and uses that id
// in all other calls.
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

// An invalid option returns an error that names the field.
func ExampleNewPresenceManager() {
	redis, err := meshtest.NewRedis() // redis.NewClient(…) in a program
	must(err)
	defer redis.Close()

	_, err = mesh.NewPresenceManager(mesh.Options{Redis: redis.Client(), LeaseTTL: time.Millisecond})
	fmt.Println(err)
	_, err = mesh.NewPresenceManager(mesh.Options{Redis: redis.Client(), Prefix: "chat:"})
	fmt.Println(err)
	// Output:
	// mesh: invalid options: LeaseTTL is 1ms, must be at least 1s
	// <nil>
}

// Start waits until Redis answers or the context ends. It may be called again after an
// error.
func ExamplePresenceManager_Start() {
	redis, err := meshtest.NewRedis()
	must(err)
	defer redis.Close()
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: redis.Client()})
	must(err)

	redis.Cut()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	err = p.Start(ctx)
	fmt.Println("unavailable:", errors.Is(err, mesh.ErrUnavailable))

	redis.Heal()
	fmt.Println(p.Start(context.Background()))
	fmt.Println(p.Shutdown(context.Background()))
	// Output:
	// unavailable: true
	// <nil>
	// <nil>
}

// Ready is meant for a readiness probe.
func ExamplePresenceManager_Ready() {
	redis, err := meshtest.NewRedis()
	must(err)
	defer redis.Close()
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: redis.Client()})
	must(err)

	ctx := context.Background()
	fmt.Println(p.Ready(ctx))
	must(p.Start(ctx))
	fmt.Println(p.Ready(ctx))
	must(p.Shutdown(ctx))
	fmt.Println(p.Ready(ctx))
	// Output:
	// mesh: not started
	// <nil>
	// mesh: closed
}

// When Shutdown returns, all connections of this manager have left their rooms. The
// context limits the time that it takes.
func ExamplePresenceManager_Shutdown() {
	redis, err := meshtest.NewRedis()
	must(err)
	defer redis.Close()
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: redis.Client()})
	must(err)
	must(p.Start(context.Background()))

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	fmt.Println(p.Shutdown(ctx))
	fmt.Println(p.Connect(ctx, "conn-1", nil))
	// Output:
	// <nil>
	// mesh: closed
}

// Rules may be added at any time. The TTL of an exact name has precedence over the TTLs
// of regular expressions.
func ExamplePresenceManager_TrackPresence() {
	p, stop := startPresence()
	defer stop()

	docs := mesh.Regexp(regexp.MustCompile(`^doc:[0-9]+$`))
	fmt.Println(p.TrackPresence(docs, mesh.PresenceOptions{TTL: time.Minute}))
	fmt.Println(p.TrackPresence(mesh.Exact("doc:1"), mesh.PresenceOptions{TTL: 10 * time.Second}))
	fmt.Println(p.TrackPresence(docs, mesh.PresenceOptions{TTL: time.Millisecond}))
	// Output:
	// <nil>
	// <nil>
	// mesh: invalid options: PresenceOptions.TTL is 1ms, want 0 or 1s to 8760h0m0s (pattern /^doc:[0-9]+$/)
}

// The app chooses the id, for example the id of a stream of Server-Sent Events.
func ExamplePresenceManager_Connect() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "sse-17", map[string]string{"userId": "alice"}))
	defer p.Disconnect(ctx, "sse-17")

	err := p.Connect(ctx, "sse-17", nil)
	fmt.Println(errors.Is(err, mesh.ErrConnectionExists))
	err = p.Connect(ctx, "a:b", nil)
	fmt.Println(errors.Is(err, mesh.ErrInvalidConnectionID))
	// Output:
	// true
	// true
}

// After Disconnect, the connection has left every room.
func ExamplePresenceManager_Disconnect() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	must(p.Join(ctx, "kitchen", "conn-1"))
	must(p.Disconnect(ctx, "conn-1"))

	for _, room := range []string{"lobby", "kitchen"} {
		n, err := p.Count(ctx, room)
		fmt.Println(room, n, err)
	}
	// Output:
	// lobby 0 <nil>
	// kitchen 0 <nil>
}

// The app calls Touch for every frame of its transport. A connection without a Touch for
// as long as the TTL leaves the room.
func ExamplePresenceManager_Touch() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.TrackPresence(mesh.Exact("office"), mesh.PresenceOptions{TTL: time.Minute}))
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "office", "conn-1"))

	fmt.Println(p.Touch("conn-1")) // for each received frame
	must(p.Disconnect(ctx, "conn-1"))
	fmt.Println(p.Touch("conn-1"))
	// Output:
	// <nil>
	// mesh: unknown connection: conn-1
}

// If EnablePresenceExpirationEvents is false, entries whose TTL has run out stay until
// the app calls CleanExpired. Call it from time to time, on one server or on all. In this
// example no entry has expired.
func ExamplePresenceManager_CleanExpired() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.TrackPresence(mesh.Exact("office"), mesh.PresenceOptions{TTL: time.Minute}))
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "office", "conn-1"))

	ended, err := p.CleanExpired(ctx, "office")
	fmt.Println(ended, err)
	// Output:
	// 0 <nil>
}

func ExamplePresenceManager_Stats() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	must(p.Join(ctx, "kitchen", "conn-1"))

	st := p.Stats()
	fmt.Println("connections:", st.Connections, "entries:", st.Entries, "rooms:", st.Rooms)
	// Output:
	// connections: 1 entries: 2 rooms: 2
}

func ExamplePresenceManager_UntrackPresence() {
	p, stop := startPresence()
	defer stop()

	must(p.TrackPresence(mesh.Exact("doc:1"), mesh.PresenceOptions{}))
	fmt.Println(p.UntrackPresence(mesh.Exact("doc:1")))
	fmt.Println(p.UntrackPresence(mesh.Exact("doc:2")))
	// Output:
	// true
	// false
}

func ExamplePresenceManager_Servers() {
	p, stop := startPresence()
	defer stop()

	servers, err := p.Servers(context.Background())
	must(err)
	fmt.Println(len(servers), servers[0].Self)
	// Output: 1 true
}

// A second Join changes nothing. An unknown connection cannot join.
func ExamplePresenceManager_Join() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", nil))
	fmt.Println(p.Join(ctx, "lobby", "conn-1"))
	fmt.Println(p.Join(ctx, "lobby", "conn-1"))
	err := p.Join(ctx, "lobby", "conn-2")
	fmt.Println(errors.Is(err, mesh.ErrUnknownConnection))
	// Output:
	// <nil>
	// <nil>
	// true
}

// Leave reports whether the connection was in the room.
func ExamplePresenceManager_Leave() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	fmt.Println(p.Leave(ctx, "lobby", "conn-1"))
	fmt.Println(p.Leave(ctx, "lobby", "conn-1"))
	// Output:
	// true <nil>
	// false <nil>
}

func ExamplePresenceManager_PresentConnections() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	for _, id := range []string{"conn-1", "conn-2"} {
		must(p.Connect(ctx, id, nil))
		must(p.Join(ctx, "lobby", id))
	}
	ids, err := p.PresentConnections(ctx, "lobby")
	must(err)
	slices.Sort(ids) // the order is undefined
	fmt.Println(ids)
	// Output:
	// [conn-1 conn-2]
}

// Members returns the members of a room with their metadata and states.
func ExamplePresenceManager_Members() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", map[string]string{"userId": "alice"}))
	must(p.Join(ctx, "lobby", "conn-1"))
	must(p.PublishState(ctx, "lobby", "conn-1", map[string]bool{"away": true}, mesh.StateOptions{}))

	members, err := p.Members(ctx, "lobby")
	must(err)
	for _, m := range members {
		fmt.Printf("%s %s %s\n", m.ID, m.Metadata, m.State)
	}
	// Output:
	// conn-1 {"userId":"alice"} {"away":true}
}

func ExamplePresenceManager_Count() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	fmt.Println(p.Count(ctx, "lobby"))
	fmt.Println(p.Count(ctx, "an empty room"))
	// Output:
	// 1 <nil>
	// 0 <nil>
}

// Counts reads the counts of many rooms in one round trip.
func ExamplePresenceManager_Counts() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "doc-1", "conn-1"))
	counts, err := p.Counts(ctx, "doc-1", "doc-2")
	must(err)
	fmt.Println(counts["doc-1"], counts["doc-2"])
	// Output:
	// 1 0
}

// A state is a JSON object. It ends with the entry of its connection, or earlier.
func ExamplePresenceManager_Occupancy() {
	presence, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(presence.Connect(ctx, "phone", nil))
	must(presence.Join(ctx, "lobby", "phone"))

	numbers, err := presence.Occupancy(ctx, "lobby", "hall")
	must(err)
	fmt.Println("lobby:", numbers["lobby"].Connections, "hall:", numbers["hall"].Connections)
	// Output: lobby: 1 hall: 0
}

func ExamplePresenceManager_SubscribeOccupancy() {
	presence, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(presence.Connect(ctx, "phone", nil))

	rooms := []string{"lobby"}
	for numbers, err := range presence.SubscribeOccupancy(ctx, rooms, mesh.SubscribeOptions{}) {
		must(err)
		fmt.Println(numbers.Room, numbers.Connections)
		if numbers.Connections > 0 {
			break // ends the subscription
		}
		must(presence.Join(ctx, "lobby", "phone"))
	}
	// Output:
	// lobby 0
	// lobby 1
}

func ExampleEveryone() {
	presence, stop := startPresence()
	defer stop()
	nobody := func(context.Context, mesh.Member, string) (bool, error) { return false, nil }
	must(presence.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{Guard: nobody, OccupancyGuard: mesh.Everyone}))
	ctx := context.Background()
	must(presence.Connect(ctx, "phone", nil))

	asPhone := mesh.SubscribeOptions{Viewer: "phone"}
	for _, err := range presence.Subscribe(ctx, "lobby", asPhone) {
		fmt.Println("members:", err)
	}
	for numbers, err := range presence.SubscribeOccupancy(ctx, []string{"lobby"}, asPhone) {
		must(err)
		fmt.Println("numbers:", numbers.Connections)
		break
	}
	// Output:
	// members: mesh: refused
	// numbers: 0
}

func ExamplePresenceManager_PublishState() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))

	cursor := struct{ X, Y int }{3, 4}
	fmt.Println(p.PublishState(ctx, "lobby", "conn-1", cursor, mesh.StateOptions{}))
	typing := map[string]bool{"typing": true}
	fmt.Println(p.PublishState(ctx, "lobby", "conn-1", typing, mesh.StateOptions{ExpireAfter: 3 * time.Second}))
	fmt.Println(p.PublishState(ctx, "lobby", "conn-1", "no object", mesh.StateOptions{}))
	// Output:
	// <nil>
	// <nil>
	// mesh: invalid presence state: not a JSON object
}

// A patch changes single keys, which can have ends of their own.
func ExamplePresenceManager_PublishState_patch() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))

	must(p.PublishState(ctx, "lobby", "conn-1", map[string]any{"page": 3, "away": true}, mesh.StateOptions{}))
	typing := map[string]any{"typing": true, "away": nil} // nil removes a key
	must(p.PublishState(ctx, "lobby", "conn-1", typing, mesh.StateOptions{Patch: true, ExpireAfter: 3 * time.Second}))
	members, err := p.Members(ctx, "lobby")
	must(err)
	fmt.Println(string(members[0].State))
	// Output:
	// {"page":3,"typing":true}
}

// Subscribers receive an update when the state ends.
func ExamplePresenceManager_ClearState() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	must(p.PublishState(ctx, "lobby", "conn-1", map[string]bool{"typing": true}, mesh.StateOptions{}))

	for event, err := range p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
		must(err)
		if event.Type == mesh.EventState {
			fmt.Println(event.ConnectionID, "ended:", event.State == nil)
			break
		}
		fmt.Printf("%s\n", event.Snapshot.Members[0].State)
		must(p.ClearState(ctx, "lobby", "conn-1"))
	}
	// Output:
	// {"typing":true}
	// conn-1 ended: true
}

// The first event is a snapshot. The following events are the changes, in order. Leaving
// the loop ends the subscription.
func ExamplePresenceManager_Subscribe() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Connect(ctx, "conn-2", nil))
	must(p.Join(ctx, "lobby", "conn-1"))

	present := map[string]bool{}
	for event, err := range p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
		if err != nil {
			fmt.Println(err) // the subscription has ended: subscribe again or give up
			break
		}
		switch event.Type {
		case mesh.EventSnapshot:
			for _, m := range event.Snapshot.Members {
				present[m.ID] = true
			}
			must(p.Join(ctx, "lobby", "conn-2"))
		case mesh.EventJoin:
			present[event.ConnectionID] = true
		}
		fmt.Println(event.Type, present)
		if len(present) == 2 {
			break
		}
	}
	// Output:
	// snapshot map[conn-1:true]
	// join map[conn-1:true conn-2:true]
}

// If Viewer is set, the guards decide about this connection, now and later.
func ExamplePresenceManager_Subscribe_viewer() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.TrackPresence(mesh.Exact("staff"), mesh.PresenceOptions{
		Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) { return m.ID != "guest", nil },
	}))
	must(p.Connect(ctx, "guest", nil))

	for _, err := range p.Subscribe(ctx, "staff", mesh.SubscribeOptions{Viewer: "guest"}) {
		fmt.Println(errors.Is(err, mesh.ErrRefused))
	}
	// Output:
	// true
}

// Recheck asks the guards about the connection again. Call it after data that the guards
// read has changed. (Changes of metadata and rules are detected automatically.)
func ExamplePresenceManager_Recheck() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	var banned atomic.Bool
	must(p.TrackPresence(mesh.Exact("staff"), mesh.PresenceOptions{
		Guard: func(context.Context, mesh.Member, string) (bool, error) { return !banned.Load(), nil },
	}))
	must(p.Connect(ctx, "conn-1", nil))

	for event, err := range p.Subscribe(ctx, "staff", mesh.SubscribeOptions{Viewer: "conn-1"}) {
		if err != nil {
			fmt.Println("refused:", errors.Is(err, mesh.ErrRefused))
			break
		}
		fmt.Println(event.Type)
		banned.Store(true)
		must(p.Recheck("conn-1"))
	}
	// Output:
	// snapshot
	// refused: true
}

// A user with two tabs arrives with the first one.
func ExampleEvent_UserArrived() {
	first := mesh.Event{Type: mesh.EventJoin, UserID: "ann", UserConnections: 1}
	second := mesh.Event{Type: mesh.EventJoin, UserID: "ann", UserConnections: 2}
	fmt.Println(first.UserArrived(), second.UserArrived())
	// Output: true false
}

// A user with two tabs leaves with the last one.
func ExampleEvent_UserLeft() {
	first := mesh.Event{Type: mesh.EventLeave, UserID: "ann", UserConnections: 1}
	second := mesh.Event{Type: mesh.EventLeave, UserID: "ann", UserConnections: 0}
	fmt.Println(first.UserLeft(), second.UserLeft())
	// Output: false true
}

// An app can begin to record a room when its first member comes.
func ExampleEvent_RoomOccupied() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", nil))
	for e, err := range p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
		must(err)
		switch {
		case e.Type == mesh.EventSnapshot:
			must(p.Join(ctx, "lobby", "conn-1"))
		case e.RoomOccupied():
			fmt.Println("occupied:", e.Connections)
			return
		}
	}
	// Output: occupied: 1
}

// An app can end the recording of a room when its last member has left.
func ExampleEvent_RoomVacated() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "lobby", "conn-1"))
	for e, err := range p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
		must(err)
		switch {
		case e.Type == mesh.EventSnapshot:
			_, err := p.Leave(ctx, "lobby", "conn-1")
			must(err)
		case e.RoomVacated():
			fmt.Println("vacated:", e.Reason)
			return
		}
	}
	// Output: vacated: left
}

// The connections of this app belong to users, by a field of their metadata.
func ExampleUserIDField() {
	user := mesh.UserIDField("userId")
	for _, metadata := range []string{`{"userId":"ann"}`, `{"userId":12345678901234567890}`, `{"USERID":"eve"}`} {
		fmt.Printf("%q\n", user(mesh.Member{Metadata: []byte(metadata)}))
	}
	// Output:
	// "ann"
	// "12345678901234567890"
	// ""
}

// A page shows one badge for each user, however many tabs the user has.
func ExamplePresenceManager_Users() {
	p, stop := startPresence(func(o *mesh.Options) { o.UserID = mesh.UserIDField("userId") })
	defer stop()
	ctx := context.Background()

	for conn, user := range map[string]string{"tab-1": "ann", "tab-2": "ann", "phone": "bob"} {
		must(p.Connect(ctx, conn, map[string]string{"userId": user}))
		must(p.Join(ctx, "lobby", conn))
	}
	users, err := p.Users(ctx, "lobby")
	must(err)
	for _, u := range users {
		fmt.Println(u.ID, len(u.Members))
	}
	// Output:
	// ann 2
	// bob 1
}

// A backend reads all members of a room as of one moment, and compares later events with
// their Seq.
func ExamplePresenceManager_Snapshot() {
	p, stop := startPresence(func(o *mesh.Options) { o.UserID = mesh.UserIDField("userId") })
	defer stop()
	ctx := context.Background()

	must(p.Connect(ctx, "tab-1", map[string]string{"userId": "ann"}))
	must(p.Join(ctx, "lobby", "tab-1"))
	s, err := p.Snapshot(ctx, "lobby")
	must(err)
	fmt.Println(s.Total, s.Users, s.Seq, s.Members[0].UserID)
	// Output: 1 1 1 ann
}
