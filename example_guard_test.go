package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// An exact name is no expression: "doc.1" is that one room.
func ExampleExact() {
	p, stop := startPresence()
	defer stop()
	fmt.Println(p.TrackPresence(mesh.Exact("doc.1"), mesh.PresenceOptions{}))
	fmt.Println(p.TrackPresence(mesh.Exact(""), mesh.PresenceOptions{}))
	// Output:
	// <nil>
	// mesh: invalid pattern: Exact of an empty name
}

// An expression matches anywhere in a room's name: say where it begins and
// ends.
func ExampleRegexp() {
	p, stop := startPresence()
	defer stop()
	for _, expr := range []string{`.+`, `^doc:[0-9]+$`} { // every room; documents
		fmt.Println(p.TrackPresence(mesh.Regexp(regexp.MustCompile(expr)), mesh.PresenceOptions{TTL: time.Minute}))
	}
	// Output:
	// <nil>
	// <nil>
}

// Guard decides who may see a room, JoinGuard who may be in it. A guest may
// join here and is seen, and sees nobody.
func ExamplePresenceOptions() {
	srv, connect, stop := startServer(mesh.Options{})
	defer stop()
	must(srv.TrackPresence(mesh.Exact("stage"), mesh.PresenceOptions{
		TTL: time.Minute,
		Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			u, err := mesh.MetadataOf[user](m)
			return u.ID != "guest", err
		},
		JoinGuard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			u, err := mesh.MetadataOf[user](m)
			return u.ID != "banned", err
		},
	}))

	for _, name := range []string{"alice", "guest", "banned"} {
		c := connect(name)
		joined := c.Join("stage")
		fmt.Printf("%s: joined %t, told of %d, may watch %t\n", name, joined.Success, len(joined.Present), c.Subscribe("stage").Success)
	}
	// Output:
	// alice: joined true, told of 1, may watch true
	// guest: joined true, told of 0, may watch false
	// banned: joined false, told of 0, may watch true
}

// Of a cursor only counts where it is now: at most one state of each member is
// told in a second here, the newest.
func ExamplePresenceOptions_stateInterval() {
	p, stop := startPresence()
	defer stop()
	ctx := context.Background()
	must(p.TrackPresence(mesh.Exact("board"), mesh.PresenceOptions{StateInterval: time.Second}))
	must(p.Connect(ctx, "conn-1", nil))
	must(p.Join(ctx, "board", "conn-1"))

	states := 0
	for event, err := range p.Subscribe(ctx, "board", mesh.SubscribeOptions{}) {
		must(err)
		if event.Type != mesh.EventState {
			for x := range 100 {
				must(p.PublishState(ctx, "board", "conn-1", map[string]int{"x": x + 1}, mesh.StateOptions{}))
			}
			continue
		}
		if states++; string(event.State) == `{"x":100}` {
			break
		}
	}
	fmt.Println("told of less than a tenth, and of the last:", states < 10)
	// Output: told of less than a tenth, and of the last: true
}

// In a guard, in a hook, or for a list of members.
func ExampleMetadataOf() {
	type user struct {
		Name  string `json:"name"`
		Admin bool   `json:"admin"`
	}
	m := mesh.Member{ID: "conn-1", Metadata: json.RawMessage(`{"name":"Alice","admin":true}`)}
	fmt.Println(mesh.MetadataOf[user](m))
	fmt.Println(mesh.MetadataOf[user](mesh.Member{ID: "conn-2"})) // without metadata
	_, err := mesh.MetadataOf[[]string](m)
	fmt.Println(errors.Is(err, mesh.ErrInvalidMetadata))
	// Output:
	// {Alice true} <nil>
	// { false} <nil>
	// true
}

// The status and text are for the client; of any other error it gets a bare
// 401.
func ExampleRefuse() {
	authenticate := func(_ context.Context, r *http.Request) (any, error) {
		if _, err := r.Cookie("session"); err != nil {
			return nil, mesh.Refuse(http.StatusForbidden, "sign in first")
		}
		return map[string]string{"userId": "alice"}, nil
	}
	_, web, stop := serve(mesh.Options{Authenticate: authenticate})
	defer stop()

	_, err := web.Dial()
	if refused, ok := errors.AsType[*meshtest.HandshakeError](err); ok {
		fmt.Println(refused.Status, refused.Body)
	}
	alice, err := web.Dial(meshtest.WithHeader("Cookie", "session=1"))
	must(err)
	fmt.Printf("%s\n", alice.Metadata())
	// Output:
	// 403 sign in first
	// {"userId":"alice"}
}
