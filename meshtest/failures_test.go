package meshtest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// recordingTB is a TB that keeps the failure message.
type recordingTB struct {
	message  string
	cleanups []func()
}

func (r *recordingTB) Helper()          {}
func (r *recordingTB) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }
func (r *recordingTB) Fatalf(format string, args ...any) {
	r.message = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

// failing runs a test that must fail, and returns its failure message.
func failing(t *testing.T, test func(tb meshtest.TB)) string {
	t.Helper()
	var j recordingTB
	var wg sync.WaitGroup
	wg.Go(func() { test(&j) })
	wg.Wait()
	for len(j.cleanups) > 0 {
		last := j.cleanups[len(j.cleanups)-1]
		j.cleanups = j.cleanups[:len(j.cleanups)-1]
		wg.Go(last) // it may end its goroutine
		wg.Wait()
	}
	require.NotEmpty(t, j.message, "the test should have failed")
	return j.message
}

// cast holds the server and the clients of a test that fails.
type cast struct {
	tb       meshtest.TB
	srv      *mesh.Server
	ann, bob *meshtest.Client
}

// push makes the server send a push to Ann.
func (c cast) push(command string) {
	if err := c.srv.Connections().Send(context.Background(), c.ann.ID(), command, 1); err != nil {
		c.tb.Fatalf("%v", err)
	}
}

func isState(u meshtest.Update) bool { return u.Type == "state" }

var failures = []struct {
	want string // with ANN and BOB in place of their ids
	test func(c cast)
}{
	{`no update within 30s; it is subscribed to nothing`, func(c cast) { c.ann.NextUpdate() }},
	{`no update within 30s; it subscribed to "lobby", "secret" (refused)`, func(c cast) {
		c.ann.Subscribe("lobby")
		c.ann.Subscribe("secret")
		c.ann.NextUpdate()
	}},
	{`no update within 30s, want leave of X in "lobby"; connection broke`, func(c cast) {
		c.ann.Kill()
		c.ann.ExpectUpdate("leave", "lobby", "X")
	}},
	{`got join of BOB in "lobby", want leave of BOB in "lobby"`, func(c cast) {
		c.ann.Subscribe("lobby")
		c.bob.Join("lobby")
		c.ann.ExpectUpdate("leave", "lobby", c.bob.ID())
	}},
	{`no such update within 30s, but there came: join of BOB in "lobby"; leave of BOB in "lobby" (left); it subscribed to "lobby"`, func(c cast) {
		c.ann.Subscribe("lobby")
		c.bob.Join("lobby")
		c.bob.Leave("lobby")
		c.ann.AwaitUpdate(isState)
	}},
	{`no update should come, but there came: 2 others, then ` + strings.Repeat(`join of BOB in "lobby"; leave of BOB in "lobby" (left); `, 9) +
		`join of BOB in "lobby"; leave of BOB in "lobby" (left)`, func(c cast) {
		c.ann.Subscribe("lobby")
		for range 11 {
			c.bob.Join("lobby")
			c.bob.Leave("lobby")
		}
		time.Sleep(time.Second)
		c.ann.NoUpdate(0)
	}},
	{`no such update within 30s, but nothing came; it is subscribed to nothing`, func(c cast) { c.ann.AwaitUpdate(isState) }},
	{`no update should come, but there came: join of BOB in "lobby"`, func(c cast) {
		c.ann.Subscribe("lobby")
		time.AfterFunc(time.Minute, func() { _, _ = c.bob.Call("mesh/join-room", map[string]string{"roomName": "lobby"}) })
		c.ann.NoUpdate(61 * time.Second)
	}},
	{`no update can come: connection broke`, func(c cast) {
		c.ann.Kill()
		c.ann.NoUpdate(time.Second)
	}},
	{`no push "app/a" within 30s, but there came: app/b 1; it is subscribed to nothing`, func(c cast) {
		c.push("app/b")
		c.ann.NextPush("app/a")
	}},
	{`no push "app/b" should come, but 1`, func(c cast) {
		c.push("app/b")
		c.ann.NoPush("app/b", 0)
	}},
	{`the subscription of "lobby" has not ended within 30s, but nothing came; it subscribed to "lobby"`, func(c cast) {
		c.ann.Subscribe("lobby")
		c.ann.AwaitEnded("lobby")
	}},
	{`no push can come: connection broke`, func(c cast) {
		c.ann.Kill()
		c.ann.NoPush("app/b", time.Second)
	}},
	{`no frame of another protocol within 30s, but nothing came; it is subscribed to nothing`, func(c cast) { c.ann.NextMessage() }},
	{`the connection has not ended within 30s`, func(c cast) { c.ann.AwaitClose() }},
	{`connection broke`, func(c cast) {
		c.ann.Kill()
		c.ann.Leave("lobby")
	}},
	{`mesh/set-my-connection-metadata: Refused (EREFUSED, CommandError)`, func(c cast) { c.ann.SetMetadata(1, "") }},
	{`mesh/join-room: invalid room name: it is empty (EINVALID, CommandError)`, func(c cast) { c.ann.Join("") }},
	{`state: json: unsupported type: func()`, func(c cast) { c.ann.PublishState("lobby", func() {}, meshtest.StateOptions{}) }},
	{`metadata: json: unsupported type: func()`, func(c cast) { c.ann.SetMetadata(func() {}, "") }},
	{`no answer to app/hang within 30s`, func(c cast) {
		_ = c.srv.HandleCommand("app/hang", func(ctx context.Context, _ *mesh.Connection, _ json.RawMessage) (any, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		_, err := c.ann.Call("app/hang", nil)
		c.tb.Fatalf("%v", err)
	}},
}

func TestFailureMessages(t *testing.T) {
	for _, f := range failures {
		t.Run(f.want, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				srv := newMesh(t, meshtest.StartRedis(t).Client())
				track(t, srv, "^secret$", mesh.PresenceOptions{
					Guard: func(context.Context, mesh.Member, string) (bool, error) { return false, nil },
				})
				server := meshtest.StartServer(t, srv)
				names := []string{"meshtest: ", ""}
				got := failing(t, func(tb meshtest.TB) {
					ann, bob := server.Connect(tb), server.Connect(tb)
					names = append(names, "client "+ann.ID()+": ", "", ann.ID(), "ANN", bob.ID(), "BOB")
					f.test(cast{tb, srv, ann, bob})
				})
				require.True(t, strings.HasPrefix(got, "meshtest: "), got)
				require.Equal(t, 1, strings.Count(got, "meshtest: "), got)
				require.Equal(t, f.want, strings.NewReplacer(names...).Replace(got))
			})
		})
	}
}

func TestStartFailures(t *testing.T) {
	t.Parallel()
	require.Contains(t, failing(t, func(tb meshtest.TB) {
		meshtest.StartServer(tb, http.NotFoundHandler(), part{"a", errors.New("broken"), new([]string)})
	}), "meshtest: start meshtest_test.part: broken")
	require.Equal(t, "meshtest: connect: handshake refused: 404 404 page not found", failing(t, func(tb meshtest.TB) {
		meshtest.StartServer(tb, http.NotFoundHandler()).Connect(tb)
	}))
	r := meshtest.StartRedis(t)
	other := meshtest.StartRedis(t).Client()
	require.Equal(t, "meshtest: not a client that Redis.Client has returned", failing(t, func(tb meshtest.TB) {
		meshtest.StartServer(tb, http.NotFoundHandler()).Kill(r, other)
	}))
}

func TestStopFailures(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		got := failing(t, func(tb meshtest.TB) {
			meshtest.StartServer(tb, newMesh(t, r.Client())).Connect(tb).Join("lobby")
			r.Hang()
		})
		r.Resume()
		require.Contains(t, got, "meshtest: shut down *mesh.Server (a Redis that was cut or hung must be back by then): ")

		release := make(chan struct{})
		defer close(release)
		entered := make(chan struct{})
		got = failing(t, func(tb meshtest.TB) {
			server := meshtest.StartServer(tb, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				close(entered)
				<-release
			}))
			go func() { _, _ = server.Dial() }() // ends when the server breaks its connection
			<-entered
		})
		require.Equal(t, "meshtest: handlers are still running after their connections broke", got)
	})
}

// The text of a snapshot is readable: it shows JSON as text and not as bytes.
func TestSnapshotsAsText(t *testing.T) {
	t.Parallel()
	for want, s := range map[string]meshtest.Snapshot{
		"refused":    {},
		"present []": {Success: true},
		`present [a {"n":1} b], state of a {"x":1}, state of b {}, 9 in all, stale`: {
			Success: true, Total: 9, Stale: true,
			Present: []meshtest.Member{{ID: "b"}, {ID: "a", Metadata: json.RawMessage(`{"n":1}`)}},
			States:  map[string]json.RawMessage{"b": json.RawMessage(`{}`), "a": json.RawMessage(`{"x":1}`)},
		},
	} {
		require.Equal(t, want, fmt.Sprintf("%+v", s))
	}
}
