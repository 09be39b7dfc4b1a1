package meshtest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

func TestVerbs(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		ctx := t.Context()
		srv := newMesh(t, meshtest.StartRedis(t).Client(), func(o *mesh.Options) {
			o.ClientMetadata = func(_ context.Context, _ mesh.Member, proposed json.RawMessage) (any, error) {
				return proposed, nil
			}
		})
		server := meshtest.StartServer(t, srv)
		ann, bob := server.Connect(t), server.Connect(t)
		require.NotEqual(t, ann.ID(), bob.ID())
		require.Nil(t, ann.Metadata())
		ann.SetMetadata(map[string]any{"name": "Ann", "at": 1}, "")
		ann.SetMetadata(map[string]any{"at": 2}, "merge")
		require.JSONEq(t, `{"name":"Ann","at":2}`, string(ann.Metadata()))
		require.Nil(t, bob.MetadataOf(ann.ID()), "no room in common")

		first := bob.Subscribe("lobby")
		require.True(t, first.Success)
		require.Empty(t, first.Present)
		joined := ann.Join("lobby")
		require.True(t, joined.Success)
		require.True(t, joined.Has(ann.ID()))
		require.False(t, joined.Has(bob.ID()))
		join := bob.NextUpdate()
		require.Equal(t, "join", join.Type)
		require.JSONEq(t, `{"name":"Ann","at":2}`, string(join.Metadata))
		require.JSONEq(t, `{"name":"Ann","at":2}`, string(bob.MetadataOf(ann.ID())))
		require.WithinDuration(t, time.Now(), join.Time, time.Minute)
		require.NotEmpty(t, join.Epoch)

		typing := map[string]bool{"typing": true}
		require.False(t, bob.PublishState("lobby", typing, meshtest.StateOptions{}), "not in the room")
		require.True(t, ann.PublishState("lobby", typing, meshtest.StateOptions{}))
		state := bob.ExpectUpdate("state", "lobby", ann.ID())
		require.JSONEq(t, `{"typing":true}`, string(state.State))
		require.Greater(t, state.Seq, join.Seq)
		require.True(t, ann.ClearState("lobby"))
		require.Nil(t, bob.ExpectUpdate("state", "lobby", ann.ID()).State)
		require.True(t, ann.PublishState("lobby", typing, meshtest.StateOptions{Silent: true}))
		seen := bob.State("lobby")
		require.Equal(t, []string{ann.ID()}, seen.IDs())
		require.JSONEq(t, `{"typing":true}`, string(seen.States[ann.ID()]))
		require.True(t, ann.PublishState("lobby", typing, meshtest.StateOptions{ExpireAfter: 100 * time.Millisecond}))
		bob.AwaitUpdate(func(u meshtest.Update) bool {
			return u.Type == "state" && u.State == nil && u.ConnectionID != bob.ID()
		})

		require.Nil(t, bob.RoomMetadata("lobby"))
		require.NoError(t, srv.Rooms().SetMetadata(ctx, "lobby", "open", mesh.MetadataOptions{}))
		require.JSONEq(t, `"open"`, string(bob.RoomMetadata("lobby")))

		ann.Leave("lobby")
		bob.ExpectUpdate("leave", "lobby", ann.ID())
		require.True(t, bob.Unsubscribe("lobby"))
		require.False(t, bob.Unsubscribe("lobby"))
		require.Empty(t, bob.Updates())
	})
}

func TestCommandsOfTheApp(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		require.NoError(t, srv.HandleCommand("app/add", func(_ context.Context, _ *mesh.Connection, p json.RawMessage) (any, error) {
			if p == nil {
				return nil, &mesh.CommandError{Code: "EINVALID", Name: "Sum", Message: "what?"}
			}
			var in []int
			if err := json.Unmarshal(p, &in); err != nil {
				return nil, errors.New("not numbers")
			}
			return in[0] + in[1], nil
		}))
		ann := meshtest.StartServer(t, srv).Connect(t)

		_, err := ann.Call("app/add", nil)
		ce, ok := errors.AsType[*meshtest.CommandError](err)
		require.True(t, ok, "%v", err)
		require.Equal(t, meshtest.CommandError{Command: "app/add", Code: "EINVALID", Name: "Sum", Message: "what?"}, *ce)
		require.EqualError(t, err, "meshtest: app/add: what? (EINVALID, Sum)")
		_, err = ann.Call("app/add", "x")
		require.Equal(t, "ESERVER", meshtest.CodeOf(err))
		_, err = ann.Call("app/sub", []int{1, 2})
		require.Equal(t, "ENOTFOUND", meshtest.CodeOf(fmt.Errorf("call: %w", err)))
		_, err = ann.Call("app/add", func() {})
		require.Error(t, err)
		require.Empty(t, meshtest.CodeOf(err))
		require.Empty(t, meshtest.CodeOf(nil))

		var wg sync.WaitGroup
		for i := range 8 { // as many as run at once
			wg.Go(func() {
				got, err := ann.Call("app/add", []int{i, 1})
				if err != nil || string(got) != fmt.Sprint(i+1) {
					t.Errorf("%d + 1: %s, %v", i, got, err)
				}
			})
		}
		wg.Wait()
	})
}

func TestPushes(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		ctx := t.Context()
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		ann := meshtest.StartServer(t, srv).Connect(t)
		for i := range 2 {
			require.NoError(t, srv.Connections().Send(ctx, ann.ID(), "app/n", i))
			require.NoError(t, srv.Connections().Send(ctx, ann.ID(), "app/m", i))
		}
		require.Equal(t, 0, decode[int](t, ann.NextPush("app/m")))
		require.Equal(t, 1, decode[int](t, ann.NextPush("app/m")))
		ann.NoPush("app/m", 10*time.Millisecond)
		require.Equal(t, 0, decode[int](t, ann.NextPush("app/n")))
		require.Equal(t, 1, decode[int](t, ann.NextPush("app/n")))
	})
}

func TestGuardEndsASubscription(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		ctx := t.Context()
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		track(t, srv, "^staff", mesh.PresenceOptions{Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			return string(m.Metadata) == `"staff"`, nil
		}})
		ann := meshtest.StartServer(t, srv).Connect(t)
		require.False(t, ann.Subscribe("staff").Success)
		require.NoError(t, srv.Connections().SetMetadata(ctx, ann.ID(), "staff", mesh.MetadataOptions{}))
		require.True(t, ann.Subscribe("staff").Success)
		require.True(t, ann.Subscribe("staff2").Success)
		require.NoError(t, srv.Connections().SetMetadata(ctx, ann.ID(), "guest", mesh.MetadataOptions{}))
		ann.AwaitEnded("staff2") // in either order
		ann.AwaitEnded("staff")
	})
}

func TestSilence(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		track(t, srv, "^lobby$", mesh.PresenceOptions{})
		require.NoError(t, srv.TrackPresence(mesh.Exact("brief"), mesh.PresenceOptions{TTL: 20 * time.Second}))
		server := meshtest.StartServer(t, srv)
		ann, bob := server.Connect(t), server.Connect(t)
		ann.Join("brief")
		bob.Subscribe("brief")
		bob.NoUpdate(2 * time.Minute) // Ann's client answers pings

		began := time.Now()
		ann.Silence()
		bob.ExpectUpdate("leave", "brief", ann.ID())
		require.LessOrEqual(t, time.Since(began), 21*time.Second)
		ann.Resume() // the late answers make it return
		bob.ExpectUpdate("join", "brief", ann.ID())
		bob.NoUpdate(2 * time.Minute)

		ann.Silence()
		began = time.Now()
		end := server.Connect(t, meshtest.WithTimeout(5*time.Minute)) // so that its timeout is longer than Ann's silence
		end.Silence()
		require.Equal(t, 1011, end.AwaitClose().Code)
		require.Equal(t, 1011, ann.AwaitClose().Code)
		require.LessOrEqual(t, time.Since(began), 4*30*time.Second, "two intervals without a pong, and the rest of the one before")
	})
}

func TestCloseAndKill(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		reasons := make(chan error, 5)
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		srv.OnDisconnection(func(_ context.Context, _ *mesh.Connection, reason error) { reasons <- reason })
		server := meshtest.StartServer(t, srv)
		ann, bob := server.Connect(t), server.Connect(t)
		ann.Close()
		ann.Close()
		require.ErrorContains(t, <-reasons, "(peer): 1000")
		require.Equal(t, meshtest.CloseError{Code: 1000}, ann.AwaitClose())
		bob.Kill()
		bob.Kill()
		require.ErrorContains(t, <-reasons, "(broken)")
		require.Equal(t, meshtest.CloseError{Code: 1006}, bob.AwaitClose())
		bob.Close()

		carl := server.Connect(t)
		c, ok := srv.Connection(carl.ID())
		require.True(t, ok)
		c.Close(4001, "enough")
		require.Equal(t, meshtest.CloseError{Code: 4001, Reason: "enough"}, carl.AwaitClose())
		_, err := carl.Call("mesh/noop", nil)
		require.EqualError(t, err, `meshtest: connection closed: 4001 "enough"`)
		require.ErrorContains(t, <-reasons, "(closed): 4001")

		dora := server.Connect(t)
		require.NoError(t, dora.Write(websocket.CloseMessage, websocket.FormatCloseMessage(4002, "mine")))
		require.ErrorContains(t, <-reasons, `(peer): 4002 "mine"`)
		require.Equal(t, 4002, dora.AwaitClose().Code)

		eric := server.Connect(t)
		_ = eric.Write(websocket.TextMessage, make([]byte, 100<<10)) // the connection may end before the write does
		require.Equal(t, 1009, eric.AwaitClose().Code)
		err = eric.Write(websocket.TextMessage, nil)
		require.EqualError(t, err, `meshtest: connection closed: 1009 "message too large"`)
	})
}
