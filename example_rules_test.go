package mesh_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/meshpresence/mesh"
)

// A room that is not tracked any more has members, but subscriptions to it end.
func ExampleServer_UntrackPresence() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	ctx := context.Background()

	must(srv.TrackPresence(mesh.Exact("meeting"), mesh.PresenceOptions{}))
	ada := connect("ada")
	must(srv.Rooms().Add(ctx, "meeting", ada.ID()))
	for e, err := range srv.Presence().Subscribe(ctx, "meeting", mesh.SubscribeOptions{}) {
		if err != nil {
			fmt.Println("ended:", errors.Is(err, mesh.ErrNotTracked))
			break
		}
		fmt.Println(e.Type, e.Snapshot.Total)
		fmt.Println("removed:", srv.UntrackPresence(mesh.Exact("meeting")))
	}
	members, err := srv.Rooms().ConnectionIDs(ctx, "meeting")
	must(err)
	fmt.Println("still in:", len(members))
	fmt.Println("removed:", srv.UntrackPresence(mesh.Exact("meeting")))
	// Output:
	// snapshot 1
	// removed: true
	// ended: true
	// still in: 1
	// removed: false
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
