package mesh

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
)

// register is a database of rights that guards ask.
type register struct {
	mu    sync.Mutex // guards out, asked
	out   map[string]bool
	asked map[string]int // by connection id
}

func (r *register) guard(_ context.Context, m Member, _ string) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.asked == nil {
		r.asked = make(map[string]int)
	}
	r.asked[m.ID]++
	return !r.out[m.ID], nil
}

func (r *register) set(conn string, allowed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.out == nil {
		r.out = make(map[string]bool)
	}
	r.out[conn] = !allowed
}

func (r *register) times(conn string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked[conn]
}

// TestRevokingAccess executes the lines of the README's section of that name, each
// on a server that does not have the connection.
func TestRevokingAccess(t *testing.T) {
	t.Parallel()
	readmeHasTheseLines(t)
	everywhere(t, func(t *testing.T, w *world) {
		rights := &register{}
		home, srv := w.server(noCommandLimit), w.server()
		for _, s := range []*testServer{home, srv} {
			s.track(".*", PresenceOptions{Guard: rights.guard, JoinGuard: rights.guard})
		}
		const room = "doc"
		ctx := t.Context()
		busy, far := home.dial(), srv.dial()
		busy.join(room)
		far.subscribe(room)
		reader := func() *peer {
			p := home.dial()
			p.join(room)
			p.subscribe(room)
			p.subscribe("other")
			return p
		}
		n := 0
		blind := func(p *peer, told string) {
			t.Helper()
			before := len(p.got())
			n++
			require.Equal(t, "true", busy.state(room, map[string]any{"n": n}))
			w.eventually(w.unhurried(2*time.Second), func() bool { return p.pushed(told) > 0 }, "%s", told)
			w.eventually(w.unhurried(2*time.Second), func() bool { return far.count("state", busy.id) >= n }, "the others are told")
			for _, u := range p.got()[before:] {
				assert.NotEqual(t, "state", u.Type, "no event after it: %v", u)
			}
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/subscribe-presence", inRoomPayload(room))))
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/get-presence-state", inRoomPayload(room))))
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/join-room", inRoomPayload(room))))
			w.eventually(w.unhurried(2*time.Second), func() bool {
				in, err := srv.Rooms().Contains(ctx, room, p.id)
				require.NoError(t, err)
				return !in
			}, "it is out")
		}

		p := reader()
		connID := p.id
		rights.set(connID, false)
		_, err := srv.Rooms().Remove(ctx, room, connID)
		require.NoError(t, err)
		blind(p, "mesh/presence-ended")

		p = reader()
		rights.set(p.id, false)
		err = srv.Rooms().Recheck(ctx, room)
		require.NoError(t, err)
		blind(p, "mesh/membership-ended")
		assert.Equal(t, 1, p.pushed("mesh/presence-ended"), "only the room's")

		p = reader()
		connID = p.id
		rights.set(connID, false)
		err = srv.Connections().Recheck(ctx, connID)
		require.NoError(t, err)
		blind(p, "mesh/membership-ended")
		w.eventually(w.unhurried(2*time.Second), func() bool { return p.pushed("mesh/presence-ended") == 2 }, "all its rooms")

		p = reader()
		rights.set(p.id, false)
		err = srv.Rooms().Clear(ctx, room)
		require.NoError(t, err)
		busy.join(room)
		blind(p, "mesh/presence-ended")

		p = reader()
		connID = p.id
		rights.set(connID, false)
		err = srv.Connections().Close(ctx, connID)
		require.NoError(t, err)
		assert.Equal(t, 1000, p.closed(w.unhurried(2*time.Second)))
		assert.Zero(t, far.pushed("mesh/presence-ended"), "the others stay")
	})
}

// readmeHasTheseLines compares the code of the README's section with this file.
func readmeHasTheseLines(t *testing.T) {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	code := regexp.MustCompile("(?s)### Revoking access\n.*?```go\n(.*?)```").FindSubmatch(readme)
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
		require.True(t, found, "%q is executed above, in the order of the README", statement)
	}
}

// Everything that voids verdicts does so for connections that only watch, or only
// make requests.
func TestVerdictsAreVoid(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(ctx context.Context, s *Server, conn string) error{
		"Remove": func(ctx context.Context, s *Server, conn string) error {
			_, err := s.Rooms().Remove(ctx, "doc", conn)
			return err
		},
		"Clear":               func(ctx context.Context, s *Server, _ string) error { return s.Rooms().Clear(ctx, "doc") },
		"Delete":              func(ctx context.Context, s *Server, _ string) error { return s.Rooms().Delete(ctx, "doc") },
		"Rooms.Recheck":       func(ctx context.Context, s *Server, _ string) error { return s.Rooms().Recheck(ctx, "doc") },
		"Connections.Recheck": func(ctx context.Context, s *Server, conn string) error { return s.Connections().Recheck(ctx, conn) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everywhereOn(t, nil, func(t *testing.T, w *world) {
				rights := &register{}
				home, far := w.server(noCommandLimit), w.server()
				for _, s := range []*testServer{home, far} {
					s.track(".*", PresenceOptions{Guard: rights.guard})
				}
				require.NoError(t, far.Rooms().SetMetadata(t.Context(), "doc", "topic", MetadataOptions{}))
				watches, asks, refused, stays := home.dial(), home.dial(), home.dial(), home.dial()
				watches.subscribe("doc")
				stays.subscribe("doc")
				assert.True(t, asks.room("mesh/get-presence-state", "doc").Success)
				rights.set(refused.id, false)
				assert.False(t, refused.room("mesh/subscribe-presence", "doc").Success)

				rights.set(watches.id, false)
				rights.set(asks.id, false)
				rights.set(refused.id, true)
				for _, p := range []*peer{watches, asks, refused, stays} {
					require.NoError(t, do(t.Context(), far.Server, p.id))
				}
				stays.join("doc")
				w.eventually(w.unhurried(2*time.Second), func() bool { return watches.pushed("mesh/presence-ended") == 1 }, "the end")
				stays.expect(w.unhurried(2*time.Second), "join", stays.id)
				assert.Zero(t, watches.count("join", stays.id))
				assert.False(t, asks.room("mesh/get-presence-state", "doc").Success)
				assert.True(t, refused.room("mesh/subscribe-presence", "doc").Success)
				assert.Zero(t, stays.pushed("mesh/presence-ended"))
			})
		})
	}
}

// A server that was taken for dead has missed rechecks: it asks by itself.
func TestARebornServerAsksAgain(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		rights := &register{}
		s := w.server()
		s.track(".*", PresenceOptions{Guard: rights.guard})
		p := s.dial()
		p.subscribe("doc")
		rights.set(p.id, false)
		require.NoError(t, w.client().FlushAll(t.Context()).Err())
		w.sleep(15 * time.Second)
		assert.Equal(t, 1, p.pushed("mesh/presence-ended"))
	})
}

// Recheck covers members whose join guards were asked long ago, wherever they are,
// and joins that wait.
func TestRecheckCoversMembers(t *testing.T) {
	t.Parallel()
	for _, of := range []string{"room", "connection", "connection of this server"} {
		t.Run(of, func(t *testing.T) {
			t.Parallel()
			everywhereOn(t, nil, func(t *testing.T, w *world) {
				rights := &register{}
				home, far := w.server(), w.server()
				var slow atomic.Bool
				guard := func(ctx context.Context, m Member, room string) (bool, error) {
					ok, err := rights.guard(ctx, m, room) // reads first, answers later
					if slow.Load() {
						time.Sleep(300 * time.Millisecond)
					}
					return ok, err
				}
				for _, s := range []*testServer{home, far} {
					s.track(".*", PresenceOptions{JoinGuard: guard})
				}
				out, stays, joins, watcher := home.dial(), home.dial(), home.dial(), far.dial()
				watcher.subscribe("doc")
				out.join("doc")
				stays.join("doc")
				slow.Store(true)
				var waits sync.WaitGroup
				waits.Go(func() { assert.False(t, joins.room("mesh/join-room", "doc").Success) })
				w.sleep(100 * time.Millisecond)
				rights.set(out.id, false)
				rights.set(joins.id, false)
				for _, id := range []string{out.id, stays.id, joins.id} {
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
				watcher.expect(w.unhurried(2*time.Second), "leave", out.id)
				w.eventually(w.unhurried(2*time.Second), func() bool { return out.pushed("mesh/membership-ended") == 1 }, "the push")
				w.sleep(400 * time.Millisecond)
				ids, err := far.Rooms().Members(t.Context(), "doc")
				require.NoError(t, err)
				assert.Equal(t, []string{stays.id}, ids)
				assert.Zero(t, stays.pushed("mesh/membership-ended"))
				assert.Zero(t, watcher.count("join", joins.id))
				assert.Zero(t, watcher.count("leave", stays.id))
			})
		})
	}
}
