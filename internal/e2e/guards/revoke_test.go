package guards

import (
	"context"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// TestRevokingAccess executes the lines of the section "Revoking access" in
// docs/guide.md, each on a server that does not have the connection.
func TestRevokingAccess(t *testing.T) {
	t.Parallel()
	guideHasTheseLines(t)
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		rights := &harness.Register{}
		home, srv := w.Server(harness.NoCommandLimit), w.Server()
		for _, s := range []*harness.Server{home, srv} {
			s.Track(".*", mesh.PresenceOptions{Guard: rights.Guard, JoinGuard: rights.Guard})
		}
		const room = "doc"
		ctx := t.Context()
		busy, far := home.Dial(), srv.Dial()
		busy.Join(room)
		far.Subscribe(room)
		reader := func() *harness.Peer {
			p := home.Dial()
			p.Join(room)
			p.Subscribe(room)
			p.Subscribe("other")
			return p
		}
		n := 0
		checkRevoked := func(p *harness.Peer, push string) {
			t.Helper()
			before := len(p.Got())
			n++
			require.Equal(t, "true", busy.State(room, map[string]any{"n": n}))
			w.Eventually(2*time.Second, func() bool { return p.Pushed(push) > 0 }, "%s", push)
			w.Eventually(2*time.Second, func() bool { return far.Count("state", busy.ID) >= n }, "other subscribers get the state")
			for _, u := range p.Got()[before:] {
				assert.NotEqual(t, "state", u.Type, "update after the end: %v", u)
			}
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.Call("mesh/subscribe-presence", harness.InRoomPayload(room))))
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.Call("mesh/get-presence-state", harness.InRoomPayload(room))))
			assert.JSONEq(t, `{"success":false,"present":[],"code":"EREFUSED"}`, string(p.Call("mesh/join-room", harness.InRoomPayload(room))))
			w.Eventually(2*time.Second, func() bool {
				in, err := srv.Rooms().Contains(ctx, room, p.ID)
				require.NoError(t, err)
				return !in
			}, "the connection is no member")
		}

		p := reader()
		connID := p.ID
		rights.Set(connID, false)
		_, err := srv.Rooms().Remove(ctx, room, connID)
		require.NoError(t, err)
		checkRevoked(p, "mesh/presence-ended")

		p = reader()
		rights.Set(p.ID, false)
		err = srv.Rooms().Recheck(ctx, room)
		require.NoError(t, err)
		checkRevoked(p, "mesh/membership-ended")
		assert.Equal(t, 1, p.Pushed("mesh/presence-ended"), "only the subscription to the room ends")

		p = reader()
		connID = p.ID
		rights.Set(connID, false)
		err = srv.Connections().Recheck(ctx, connID)
		require.NoError(t, err)
		checkRevoked(p, "mesh/membership-ended")
		w.Eventually(2*time.Second, func() bool { return p.Pushed("mesh/presence-ended") == 2 }, "all subscriptions of the connection end")

		p = reader()
		rights.Set(p.ID, false)
		err = srv.Rooms().Clear(ctx, room)
		require.NoError(t, err)
		busy.Join(room)
		checkRevoked(p, "mesh/presence-ended")

		p = reader()
		connID = p.ID
		rights.Set(connID, false)
		err = srv.Connections().Close(ctx, connID)
		require.NoError(t, err)
		assert.Equal(t, 1000, p.Closed(2*time.Second))
		assert.Zero(t, far.Pushed("mesh/presence-ended"), "other subscriptions stay")
	})
}

// guideHasTheseLines checks that this file has the lines of the section in
// docs/guide.md.
func guideHasTheseLines(t *testing.T) {
	t.Helper()
	guide, err := os.ReadFile(harness.InModule("docs", "guide.md"))
	require.NoError(t, err)
	code := regexp.MustCompile("(?s)## Revoking access\n.*?```go\n(.*?)```").FindSubmatch(guide)
	require.NotNil(t, code)
	lines := strings.Split(strings.TrimSpace(string(code[1])), "\n")
	require.Len(t, lines, 5)
	source, err := os.ReadFile("revoke_test.go")
	require.NoError(t, err)
	rest := string(source)
	for _, line := range lines {
		statement, _, _ := strings.Cut(line, " //")
		var found bool
		_, rest, found = strings.Cut(rest, "\n\t\t"+strings.TrimSpace(statement)+"\n")
		require.True(t, found, "%q is not executed above, or not in the order of the page", statement)
	}
}

// Each of these calls makes a server forget the answers of guards, also for connections
// that only subscribe or only send requests.
func TestAnswersOfGuardsAreForgotten(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(ctx context.Context, s *mesh.Server, conn string) error{
		"Remove": func(ctx context.Context, s *mesh.Server, conn string) error {
			_, err := s.Rooms().Remove(ctx, "doc", conn)
			return err
		},
		"Clear":         func(ctx context.Context, s *mesh.Server, _ string) error { return s.Rooms().Clear(ctx, "doc") },
		"Delete":        func(ctx context.Context, s *mesh.Server, _ string) error { return s.Rooms().Delete(ctx, "doc") },
		"Rooms.Recheck": func(ctx context.Context, s *mesh.Server, _ string) error { return s.Rooms().Recheck(ctx, "doc") },
		"Connections.Recheck": func(ctx context.Context, s *mesh.Server, conn string) error {
			return s.Connections().Recheck(ctx, conn)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
				rights := &harness.Register{}
				home, far := w.Server(harness.NoCommandLimit), w.Server()
				for _, s := range []*harness.Server{home, far} {
					s.Track(".*", mesh.PresenceOptions{Guard: rights.Guard})
				}
				require.NoError(t, far.Rooms().SetMetadata(t.Context(), "doc", "topic", mesh.MetadataOptions{}))
				watches, asks, refused, stays := home.Dial(), home.Dial(), home.Dial(), home.Dial()
				watches.Subscribe("doc")
				stays.Subscribe("doc")
				assert.True(t, asks.Room("mesh/get-presence-state", "doc").Success)
				rights.Set(refused.ID, false)
				assert.False(t, refused.Room("mesh/subscribe-presence", "doc").Success)

				rights.Set(watches.ID, false)
				rights.Set(asks.ID, false)
				rights.Set(refused.ID, true)
				for _, p := range []*harness.Peer{watches, asks, refused, stays} {
					require.NoError(t, do(t.Context(), far.Server, p.ID))
				}
				stays.Join("doc")
				w.Eventually(2*time.Second, func() bool { return watches.Pushed("mesh/presence-ended") == 1 }, "the subscription ends")
				stays.Expect(2*time.Second, "join", stays.ID)
				assert.Zero(t, watches.Count("join", stays.ID))
				assert.False(t, asks.Room("mesh/get-presence-state", "doc").Success)
				assert.True(t, refused.Room("mesh/subscribe-presence", "doc").Success)
				assert.Zero(t, stays.Pushed("mesh/presence-ended"))
			})
		})
	}
}

// A server that was declared dead may have missed rechecks, so it asks the guards
// again.
func TestAReregisteredServerAsksAgain(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		rights := &harness.Register{}
		s := w.Server()
		s.Track(".*", mesh.PresenceOptions{Guard: rights.Guard})
		p := s.Dial()
		p.Subscribe("doc")
		rights.Set(p.ID, false)
		require.NoError(t, w.Client().FlushAll(t.Context()).Err())
		w.Sleep(15 * time.Second)
		assert.Equal(t, 1, p.Pushed("mesh/presence-ended"))
	})
}

// Recheck asks about members on any server, even if they were accepted long ago, and
// about joins that wait.
func TestRecheckCoversMembers(t *testing.T) {
	t.Parallel()
	for _, of := range []string{"room", "connection", "connection of this server"} {
		t.Run(of, func(t *testing.T) {
			t.Parallel()
			harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
				rights := &harness.Register{}
				home, far := w.Server(), w.Server()
				var slow atomic.Bool
				guard := func(ctx context.Context, m mesh.Member, room string) (bool, error) {
					ok, err := rights.Guard(ctx, m, room) // reads first, answers later
					if slow.Load() {
						time.Sleep(300 * time.Millisecond)
					}
					return ok, err
				}
				for _, s := range []*harness.Server{home, far} {
					s.Track(".*", mesh.PresenceOptions{JoinGuard: guard})
				}
				out, stays, joins, watcher := home.Dial(), home.Dial(), home.Dial(), far.Dial()
				watcher.Subscribe("doc")
				out.Join("doc")
				stays.Join("doc")
				slow.Store(true)
				var waits sync.WaitGroup
				waits.Go(func() { assert.False(t, joins.Room("mesh/join-room", "doc").Success) })
				w.Sleep(100 * time.Millisecond)
				rights.Set(out.ID, false)
				rights.Set(joins.ID, false)
				for _, id := range []string{out.ID, stays.ID, joins.ID} {
					switch of {
					case "room":
						require.NoError(t, far.Rooms().Recheck(t.Context(), "doc"))
					case "connection":
						require.NoError(t, far.Connections().Recheck(t.Context(), id))
					default:
						require.NoError(t, home.Presence().Recheck(id))
					}
				}
				waits.Wait()
				watcher.Expect(2*time.Second, "leave", out.ID)
				w.Eventually(2*time.Second, func() bool { return out.Pushed("mesh/membership-ended") == 1 }, "the push arrives")
				w.Sleep(400 * time.Millisecond)
				ids, err := far.Rooms().ConnectionIDs(t.Context(), "doc")
				require.NoError(t, err)
				assert.Equal(t, []string{stays.ID}, ids)
				assert.Zero(t, stays.Pushed("mesh/membership-ended"))
				assert.Zero(t, watcher.Count("join", joins.ID))
				assert.Zero(t, watcher.Count("leave", stays.ID))
			})
		})
	}
}
