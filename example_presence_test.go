package mesh_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh"
)

// Joining again changes nothing. Who is unknown cannot join.
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

// Leave reports whether the connection was in.
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
	slices.Sort(ids) // they come in no particular order
	fmt.Println(ids)
	// Output:
	// [conn-1 conn-2]
}

// Members come with their metadata and states.
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
	fmt.Println(p.Count(ctx, "nobody has ever been here"))
	// Output:
	// 1 <nil>
	// 0 <nil>
}

// The counts of a list of documents come in one round trip.
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

// A state is a JSON object. It ends with its connection's presence, or before.
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

// Subscribers are told that the state has ended.
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

// The first event is a snapshot, then come the changes, in order. Leaving the
// loop ends the subscription.
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
			fmt.Println(err) // why it ended: subscribe anew, or give up
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

// On behalf of a connection: its guards decide, now and later.
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

// What a guard goes by has changed, and it is neither metadata nor a rule:
// subscriptions of the connection are asked about again.
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
