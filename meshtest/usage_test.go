package meshtest_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// This file shows how the tests of an app may look. The app is a chat with a command of
// its own, a room for staff, and a check of the users who connect.

type user struct {
	Name  string `json:"name"`
	Staff bool   `json:"staff"`
}

var users = map[string]user{
	"ann's": {Name: "Ann"},
	"eve's": {Name: "Eve"},
	"sam's": {Name: "Sam", Staff: true},
}

type line struct {
	Room string `json:"room"`
	Text string `json:"text"`
	From string `json:"from,omitempty"`
}

// newChat returns the app's server on a given Redis: the real one, or a test's.
func newChat(client *redis.Client) (*mesh.Server, error) {
	srv, err := mesh.NewServer(mesh.Options{
		Redis: client,
		Authenticate: func(_ context.Context, r *http.Request) (any, error) {
			u, ok := users[r.Header.Get("Authorization")]
			if !ok {
				return nil, mesh.Refuse(http.StatusUnauthorized, "sign in first")
			}
			return u, nil
		},
	})
	if err != nil {
		return nil, err
	}
	isStaff := func(_ context.Context, m mesh.Member, _ string) (bool, error) {
		u, err := mesh.MetadataOf[user](m)
		return u.Staff, err
	}
	say := func(ctx context.Context, c *mesh.Connection, payload json.RawMessage) (any, error) {
		var l line
		if err := json.Unmarshal(payload, &l); err != nil || l.Text == "" {
			return nil, &mesh.CommandError{Code: "EINVALID", Message: "a line needs a room and a text"}
		}
		if !slices.Contains(c.Rooms(), l.Room) {
			return nil, &mesh.CommandError{Code: "EREFUSED", Message: "enter the room first"}
		}
		u, err := mesh.MetadataOf[user](c.Member())
		if err != nil {
			return nil, err
		}
		l.From = u.Name
		return true, srv.Rooms().Send(ctx, l.Room, "chat/said", l)
	}
	return srv, errors.Join(
		srv.TrackPresence(mesh.Regexp(regexp.MustCompile(`^room:`)), mesh.PresenceOptions{TTL: 20 * time.Second}),
		srv.TrackPresence(mesh.Exact("room:staff"), mesh.PresenceOptions{TTL: 20 * time.Second, Guard: isStaff, JoinGuard: isStaff}),
		srv.HandleCommand("chat/say", say),
	)
}

// startChat starts one server of the app on a Redis.
func startChat(t *testing.T, client *redis.Client) (*mesh.Server, *meshtest.Server) {
	t.Helper()
	srv, err := newChat(client)
	if err != nil {
		t.Fatal(err)
	}
	return srv, meshtest.StartServer(t, srv)
}

// as signs a client in.
func as(token string) meshtest.ConnectOption { return meshtest.WithHeader("Authorization", token) }

// An unknown user is refused, with the status and the text that the app chose.
func TestUsageHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, server := startChat(t, meshtest.StartRedis(t).Client())

		_, err := server.Dial()
		var refused *meshtest.HandshakeError
		if !errors.As(err, &refused) || refused.Status != 401 || refused.Body != "sign in first" {
			t.Fatalf("got %v, want a 401", err)
		}
		ann := server.Connect(t, as("ann's"))
		if got := string(ann.Metadata()); got != `{"name":"Ann","staff":false}` {
			t.Fatal(got)
		}
	})
}

// This tests a command of the app: its refusals with their codes, and its effect.
func TestUsageCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, server := startChat(t, meshtest.StartRedis(t).Client())
		ann, eve := server.Connect(t, as("ann's")), server.Connect(t, as("eve's"))
		eve.Join("room:1")

		for _, c := range []struct {
			line line
			code string
		}{
			{line{Room: "room:1"}, "EINVALID"},
			{line{Text: "hi"}, "EREFUSED"},
			{line{Room: "room:1", Text: "hi"}, "EREFUSED"}, // Ann is not in the room
		} {
			if _, err := ann.Call("chat/say", c.line); meshtest.CodeOf(err) != c.code {
				t.Errorf("%+v: got %v, want code %s", c.line, err, c.code)
			}
		}
		eve.NoPush("chat/said", time.Second)

		ann.Join("room:1")
		if _, err := ann.Call("chat/say", line{Room: "room:1", Text: "hi"}); err != nil {
			t.Fatal(err)
		}
		if got := string(eve.NextPush("chat/said")); got != `{"room":"room:1","text":"hi","from":"Ann"}` {
			t.Fatal(got)
		}
	})
}

// A connection that the guard refuses sees nothing, and cannot join. When its metadata
// change, the guard is asked again.
func TestUsageGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, server := startChat(t, meshtest.StartRedis(t).Client())
		sam, eve := server.Connect(t, as("sam's")), server.Connect(t, as("eve's"))
		sam.Join("room:staff")

		if got := eve.Subscribe("room:staff"); got.Success || len(got.Present) != 0 {
			t.Fatalf("Eve sees %+v", got)
		}
		if eve.Join("room:staff").Success { // members receive messages that the app sends to the room
			t.Fatal("Eve is in")
		}
		if got := eve.MetadataOf(sam.ID()); got != nil {
			t.Fatalf("Eve sees %s", got)
		}
		sam.Leave("room:staff")
		eve.NoUpdate(time.Minute)

		promoted := user{Name: "Eve", Staff: true}
		if err := srv.Connections().SetMetadata(t.Context(), eve.ID(), promoted, mesh.MetadataOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := eve.Subscribe("room:staff"); !got.Success {
			t.Fatalf("Eve is staff and sees %+v", got)
		}
		sam.Join("room:staff")
		eve.ExpectUpdate("join", "room:staff", sam.ID())

		if err := srv.Connections().SetMetadata(t.Context(), eve.ID(), users["eve's"], mesh.MetadataOptions{}); err != nil {
			t.Fatal(err)
		}
		eve.AwaitEnded("room:staff")
		sam.Leave("room:staff")
		eve.NoUpdate(time.Minute)
	})
}

// In a bubble time passes when all goroutines wait, and costs next to nothing.
func TestUsageTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, server := startChat(t, meshtest.StartRedis(t).Client())
		ann, eve := server.Connect(t, as("ann's")), server.Connect(t, as("eve's"))
		ann.Join("room:1")
		eve.Subscribe("room:1")
		eve.NoUpdate(time.Minute) // far longer than the TTL, but Ann's client answers pings

		ann.PublishState("room:1", map[string]bool{"typing": true}, meshtest.StateOptions{ExpireAfter: 3 * time.Second})
		eve.ExpectUpdate("state", "room:1", ann.ID())
		time.Sleep(4 * time.Second)
		if u := eve.ExpectUpdate("state", "room:1", ann.ID()); u.State != nil {
			t.Fatalf("Ann still types: %v", u)
		}

		ann.Silence() // her laptop is closed
		began := time.Now()
		eve.ExpectUpdate("leave", "room:1", ann.ID()) // waits, like all methods that return received data
		if took := time.Since(began); took > 21*time.Second {
			t.Fatalf("Ann left after %v", took)
		}
		ann.Resume()
		eve.ExpectUpdate("join", "room:1", ann.ID())
	})
}

// Two servers share one Redis. One of them dies, and later Redis does not answer.
func TestUsageOutages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		client := r.Client()
		_, one := startChat(t, client)
		_, two := startChat(t, r.Client())
		ann, eve := one.Connect(t, as("ann's")), two.Connect(t, as("eve's"))
		ann.Join("room:1")
		if got := eve.Subscribe("room:1"); !got.Has(ann.ID()) {
			t.Fatalf("Eve sees %+v", got)
		}

		one.Kill(r, client)
		if got := ann.AwaitClose(); got.Code != 1006 {
			t.Fatal(got)
		}
		eve.ExpectUpdate("leave", "room:1", ann.ID())

		r.Hang()
		if got := eve.Join("room:1"); !got.Success || !got.Stale || !got.Has(eve.ID()) {
			t.Fatalf("Eve sees %+v, want the known members and herself", got)
		}
		time.Sleep(5 * time.Second)
		if got := eve.State("room:1"); !got.Success || !got.Stale {
			t.Fatalf("Eve sees %+v, want the last known state", got)
		}
		r.Resume()
		eve.ExpectUpdate("join", "room:1", eve.ID()) // the join that Redis did not have yet
	})
}
