package guards

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

func TestRefusedConnectionsLearnNothing(t *testing.T) {
	t.Parallel()
	for name, guard := range map[string]mesh.Guard{
		"refuses": harness.AdminsOnly,
		"fails": func(ctx context.Context, m mesh.Member, room string) (bool, error) {
			if ok, _ := harness.AdminsOnly(ctx, m, room); ok {
				return true, nil
			}
			return true, errors.New("the database is away: secret")
		},
		"fails with an error of the library": func(ctx context.Context, m mesh.Member, room string) (bool, error) {
			if ok, _ := harness.AdminsOnly(ctx, m, room); ok {
				return true, nil
			}
			return false, mesh.ErrNotTracked
		},
		"panics": func(ctx context.Context, m mesh.Member, room string) (bool, error) {
			if ok, _ := harness.AdminsOnly(ctx, m, room); ok {
				return true, nil
			}
			panic("secret")
		},
		"hangs": func(ctx context.Context, m mesh.Member, room string) (bool, error) {
			if ok, _ := harness.AdminsOnly(ctx, m, room); ok {
				return true, nil
			}
			<-ctx.Done()
			return true, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Everywhere(t, func(t *testing.T, w *harness.World) {
				learnNothing(t, w, guard)
			})
		})
	}
}

// learnNothing sends every request, as a refused connection and as an allowed one.
func learnNothing(t *testing.T, w *harness.World, guard mesh.Guard) {
	var servers []*harness.Server
	for range 2 {
		s := w.Server(harness.ByHeader, func(o *mesh.Options) { o.GuardTimeout = 100 * time.Millisecond })
		s.Track("^secret$", mesh.PresenceOptions{Guard: guard})
		servers = append(servers, s)
	}
	s1, s2 := servers[0], servers[1]
	require.NoError(t, s1.Rooms().SetMetadata(t.Context(), "secret", "the topic", mesh.MetadataOptions{}))
	insider, boss, spy := s1.Dial(harness.Meta(`{"isAdmin":true,"name":"insider"}`)), s1.Dial(harness.Meta(harness.Admin)), s1.Dial(harness.Meta(harness.Visitor))
	far := s2.Dial(harness.Meta(`{"isAdmin":true,"name":"far"}`))
	insider.Join("secret")
	far.Join("secret")
	require.Equal(t, "true", insider.State("secret", map[string]any{"a": 1}))

	paths := []struct{ command, payload, refused, allowed string }{
		{"mesh/join-room", `{"roomName":"secret"}`, `{"success":true,"present":[]}`, "insider"},
		{"mesh/subscribe-presence", `{"roomName":"secret"}`, `{"success":false,"present":[]}`, `"a":1`},
		{"mesh/get-presence-state", `{"roomName":"secret"}`, `{"success":false,"present":[]}`, insider.ID},
		{"mesh/get-room-metadata", `{"roomName":"secret"}`, `{"metadata":null}`, "the topic"},
		{"mesh/get-connection-metadata", `{"connectionId":"` + insider.ID + `"}`, `{"metadata":null}`, "insider"},
		{"mesh/get-connection-metadata", `{"connectionId":"` + far.ID + `"}`, `{"metadata":null}`, "far"},
		{"mesh/publish-presence-state", `{"roomName":"secret","state":{"b":2}}`, `false`, "true"},
		{"mesh/clear-presence-state", `{"roomName":"secret"}`, `false`, "true"},
		{"mesh/unsubscribe-presence", `{"roomName":"secret"}`, `false`, "true"},
		{"mesh/subscribe-presence", `{"roomName":"secret"}`, `{"success":false,"present":[]}`, `"a":1`},
	}
	for range 2 { // without a mirror on this server, then with a mirror for another viewer
		for _, p := range paths {
			assert.JSONEq(t, p.refused, string(spy.Call(p.command, json.RawMessage(p.payload))), "%s %s", p.command, p.payload)
		}
		for _, p := range paths {
			assert.Contains(t, string(boss.Call(p.command, json.RawMessage(p.payload))), p.allowed, "%s %s", p.command, p.payload)
		}
	}
	require.Equal(t, "true", insider.State("secret", map[string]any{"a": 2}))
	boss.Expect(2*time.Second, "state", insider.ID)
	far.Leave("secret")
	boss.Expect(2*time.Second, "leave", far.ID)
	assert.Empty(t, spy.Got(), "no update")
	assert.Zero(t, spy.Pushed("mesh/presence-ended"), "the subscription never began")
	in, err := s2.Rooms().Contains(t.Context(), "secret", spy.ID)
	require.NoError(t, err)
	assert.True(t, in, "a member that may not see the room")
	learnNothingFromChanges(t, w, s1, s2, spy, insider)
}

func TestEveryMatchingRuleMustAllow(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader)
		yes := func(context.Context, mesh.Member, string) (bool, error) { return true, nil }
		s.Track(".*", mesh.PresenceOptions{Guard: yes})
		require.NoError(t, s.TrackPresence(mesh.Exact("admin-room"), mesh.PresenceOptions{Guard: harness.AdminsOnly}))
		s.Track("^a", mesh.PresenceOptions{})
		s.Track("^vip-", mesh.PresenceOptions{Guard: harness.AdminsOnly}) // a pattern that is added later
		p, q := s.Dial(harness.Meta(harness.Visitor)), s.Dial(harness.Meta(harness.Admin))
		assert.False(t, p.Room("mesh/subscribe-presence", "admin-room").Success, "a general rule does not allow it")
		assert.True(t, p.Room("mesh/subscribe-presence", "another").Success)
		assert.False(t, p.Room("mesh/subscribe-presence", "vip-1").Success, "a general pattern does not allow it")
		assert.True(t, q.Room("mesh/subscribe-presence", "vip-1").Success)
		assert.True(t, q.Room("mesh/subscribe-presence", "admin-room").Success)
	})
}

func TestChangedMetadataEndsASubscription(t *testing.T) {
	t.Parallel()
	for _, from := range []string{"here", "another server"} {
		t.Run(from, func(t *testing.T) {
			t.Parallel()
			harness.Everywhere(t, func(t *testing.T, w *harness.World) {
				s1, s2 := w.Server(harness.ByHeader, harness.NoCommandLimit), w.Server(harness.ByHeader, harness.NoCommandLimit)
				for _, s := range []*harness.Server{s1, s2} {
					s.Track(".*", mesh.PresenceOptions{Guard: harness.AdminsOnly})
				}
				changer := s1
				if from != "here" {
					changer = s2
				}
				watcher, busy := s1.Raw(harness.Meta(harness.Admin)), s1.Dial(harness.Meta(harness.Admin))
				busy.Join("lobby")
				watcher.Send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
				require.Contains(t, watcher.Next(), `"success":true`)

				// Read all updates of a busy room.
				var frames []string
				var received atomic.Int32
				read := make(chan struct{})
				go func() {
					defer close(read)
					for {
						_, data, err := watcher.WS.ReadMessage()
						if err != nil {
							return
						}
						frames = append(frames, string(data))
						received.Add(1)
						if strings.Contains(string(data), `"id":9,`) {
							return
						}
					}
				}()
				require.NoError(t, watcher.WS.SetReadDeadline(time.Time{}))
				var wg sync.WaitGroup
				for i := range 30 {
					require.Equal(t, "true", busy.State("lobby", map[string]any{"i": i}))
					if i == 10 {
						w.Eventually(2*time.Second, func() bool { return received.Load() > 0 }, "the first update")
						wg.Go(func() {
							assert.NoError(t, changer.Connections().SetMetadata(t.Context(), watcher.ID, json.RawMessage(harness.Visitor), mesh.MetadataOptions{}))
						})
					}
				}
				wg.Wait()
				w.Eventually(2*time.Second, func() bool { return s1.Stats().Subscriptions == 0 }, "the subscription ends")
				require.Equal(t, "true", busy.State("lobby", map[string]any{"after": true}))
				// The client cannot use it any more.
				watcher.Send(`{"id":7,"command":"mesh/unsubscribe-presence","payload":{"roomName":"lobby"}}`)
				watcher.Send(`{"id":8,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
				w.Sleep(100 * time.Millisecond)
				watcher.Send(`{"id":9,"command":"mesh/noop"}`)
				<-read

				ended := -1
				for i, f := range frames {
					switch {
					case strings.Contains(f, "presence-ended"):
						assert.JSONEq(t, `{"command":"mesh/presence-ended","payload":{"roomName":"lobby"}}`, f)
						assert.Negative(t, ended, "the subscription ended twice")
						ended = i
					case strings.Contains(f, "presence-update"):
						assert.Negative(t, ended, "update after the end: %s", f)
						assert.NotContains(t, f, "after")
						assert.Contains(t, f, fmt.Sprintf(`{"i":%d}`, i), "an update is missing")
					}
				}
				require.GreaterOrEqual(t, ended, 1, "%v", frames)
				rest := frames[ended+1:]
				require.Len(t, rest, 3, "%v", rest)
				assert.JSONEq(t, `{"id":7,"command":"mesh/unsubscribe-presence","payload":false}`, rest[0])
				assert.JSONEq(t, `{"id":8,"command":"mesh/subscribe-presence","payload":{"success":false,"present":[]}}`, rest[1])
			})
		})
	}
}

func TestNoEventAfterMetadataWereChanged(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader)
		s.Track(".*", mesh.PresenceOptions{Guard: harness.AdminsOnly})
		watcher, busy, steady := s.Dial(harness.Meta(harness.Admin)), s.Dial(harness.Meta(harness.Admin)), s.Dial(harness.Meta(harness.Admin))
		steady.Subscribe("lobby")
		busy.Join("lobby")
		for i := range 10 {
			require.NoError(t, s.Connections().SetMetadata(t.Context(), watcher.ID, json.RawMessage(harness.Admin), mesh.MetadataOptions{}))
			watcher.Subscribe("lobby")
			require.NoError(t, s.Connections().SetMetadata(t.Context(), watcher.ID, json.RawMessage(harness.Visitor), mesh.MetadataOptions{}))
			require.Equal(t, "true", busy.State("lobby", map[string]any{"i": i}))
			w.Eventually(time.Second, func() bool { return watcher.Pushed("mesh/presence-ended") == i+1 }, "the subscription ends")
			// The state must be delivered before the watcher may see the room again.
			w.Eventually(2*time.Second, func() bool { return steady.Count("state", busy.ID) == i+1 }, "the state is delivered")
		}
		w.Sleep(50 * time.Millisecond)
		assert.Empty(t, watcher.Got())
		assert.Equal(t, 10, watcher.Pushed("mesh/presence-ended"))
	})
}

func TestChangedRulesEndASubscription(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.ByHeader)
		p, q := s.Dial(harness.Meta(harness.Visitor)), s.Dial(harness.Meta(harness.Admin))
		p.Subscribe("lobby")
		q.Subscribe("lobby")
		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{Guard: harness.AdminsOnly}))
		q.Join("lobby")
		w.Sleep(10 * time.Millisecond)
		assert.Equal(t, 1, p.Pushed("mesh/presence-ended"))
		assert.Empty(t, p.Got())
		assert.Zero(t, q.Pushed("mesh/presence-ended"))
		assert.Equal(t, 1, q.Count("join", q.ID))
		// Without the guard, the client may subscribe again.
		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		p.Subscribe("lobby")
	})
}

func TestDeliveryWaitsForTheGuard(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader)
		answer := make(chan struct{})
		s.Track(".*", mesh.PresenceOptions{Guard: func(ctx context.Context, m mesh.Member, room string) (bool, error) {
			if strings.Contains(string(m.Metadata), "slow") {
				<-answer
			}
			return harness.AdminsOnly(ctx, m, room)
		}})
		yes, no, other := s.Dial(harness.Meta(harness.Admin)), s.Dial(harness.Meta(harness.Admin)), s.Dial(harness.Meta(harness.Admin))
		for _, p := range []*harness.Peer{yes, no, other} {
			p.Subscribe("lobby")
		}
		set := func(p *harness.Peer, text string) {
			require.NoError(t, s.Connections().SetMetadata(t.Context(), p.ID, json.RawMessage(text), mesh.MetadataOptions{}))
		}
		set(yes, `{"isAdmin":true,"slow":1}`)
		set(no, `{"isAdmin":false,"slow":1}`)
		other.Join("lobby")
		require.Equal(t, "true", other.State("lobby", map[string]any{"a": 1}))
		w.Sleep(time.Second)
		assert.Len(t, other.Got(), 2, "other subscribers do not wait")
		assert.Empty(t, yes.Got())
		assert.Empty(t, no.Got())
		close(answer)
		w.Sleep(10 * time.Millisecond)
		require.Len(t, yes.Got(), 2)
		assert.Equal(t, "join", yes.Got()[0].Type)
		assert.Equal(t, "state", yes.Got()[1].Type)
		assert.Empty(t, no.Got())
		assert.Equal(t, 1, no.Pushed("mesh/presence-ended"))
	})
}

func TestAnswersWhileMetadataChange(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader)
		s.Track(".*", mesh.PresenceOptions{Guard: func(ctx context.Context, m mesh.Member, room string) (bool, error) {
			time.Sleep(10 * time.Millisecond) // as with a database
			return harness.AdminsOnly(ctx, m, room)
		}})
		for _, before := range []string{harness.Admin, harness.Visitor} {
			for _, after := range []string{`{"isAdmin":true,"n":2}`, `{"isAdmin":false,"n":2}`} {
				for _, delay := range []time.Duration{0, 5 * time.Millisecond, 10 * time.Millisecond, 15 * time.Millisecond} {
					r := s.Raw(harness.Meta(before))
					r.Send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
					time.Sleep(delay)
					require.NoError(t, s.Connections().SetMetadata(t.Context(), r.ID, json.RawMessage(after), mesh.MetadataOptions{}))
					w.Sleep(100 * time.Millisecond)
					r.Send(`{"id":2,"command":"mesh/noop"}`)
					answers, pushes := 0, 0
					for {
						f := r.Next()
						if strings.Contains(f, `"id":2`) {
							break
						}
						if strings.Contains(f, `"id":1`) {
							answers++
						} else {
							pushes++
						}
					}
					assert.Equal(t, 1, answers, "%s to %s after %v: one answer", before, after, delay)
					assert.LessOrEqual(t, pushes, 1)
					require.NoError(t, r.WS.Close())
					w.Sleep(10 * time.Millisecond)
				}
			}
		}
		assert.Zero(t, s.Stats().Subscriptions)
	})
}

func TestAHangingGuardDelaysOnlyItsViewer(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader, func(o *mesh.Options) { o.GuardTimeout = 2 * time.Second })
		release := make(chan struct{})
		s.Track(".*", mesh.PresenceOptions{Guard: func(_ context.Context, m mesh.Member, room string) (bool, error) {
			if room == "hung" && strings.Contains(string(m.Metadata), "false") {
				<-release
			}
			return true, nil
		}})
		slow, quick := s.Dial(harness.Meta(harness.Visitor)), s.Dial(harness.Meta(harness.Admin))
		begun := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(slow.Call("mesh/subscribe-presence", harness.InRoomPayload("hung"))))
			assert.InDelta(t, 2, time.Since(begun).Seconds(), 0.1)
			assert.True(t, slow.Room("mesh/subscribe-presence", "lobby").Success)
		})
		for _, room := range []string{"hung", "lobby"} {
			quick.Subscribe(room)
			quick.Join(room)
		}
		assert.Less(t, time.Since(begun), 10*time.Millisecond, "other viewers do not wait")
		wg.Wait()
		assert.EqualValues(t, 1, s.Stats().CallbackTimeouts)
		close(release)
	})
}

func TestAnswersOfGuardsAreKept(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Server(harness.ByHeader), w.Server(harness.ByHeader)
		var asked atomic.Int32
		guard := func(ctx context.Context, m mesh.Member, room string) (bool, error) {
			asked.Add(1)
			return harness.AdminsOnly(ctx, m, room)
		}
		s1.Track(".*", mesh.PresenceOptions{Guard: guard})
		s2.Track(".*", mesh.PresenceOptions{Guard: guard})
		p := s1.Dial(harness.Meta(harness.Admin))
		everything := func() {
			p.Room("mesh/join-room", "lobby")
			p.Room("mesh/subscribe-presence", "lobby")
			p.Call("mesh/get-presence-state", harness.InRoomPayload("lobby"))
			p.State("lobby", map[string]any{"a": 1})
			p.Call("mesh/get-room-metadata", harness.InRoomPayload("lobby"))
			p.Call("mesh/get-connection-metadata", map[string]any{"connectionId": "nobody"})
			p.Room("mesh/subscribe-presence", "lobby")
		}
		everything()
		assert.EqualValues(t, 1, asked.Load(), "asked once")
		everything()
		assert.EqualValues(t, 1, asked.Load())
		p.Room("mesh/join-room", "other")
		assert.EqualValues(t, 2, asked.Load(), "once per room")
		p.Leave("other")

		require.NoError(t, s2.Connections().SetMetadata(t.Context(), p.ID, json.RawMessage(harness.Visitor), mesh.MetadataOptions{}))
		w.Sleep(10 * time.Millisecond)
		assert.EqualValues(t, 3, asked.Load(), "once per change, for the watched room")
		everything()
		assert.EqualValues(t, 3, asked.Load(), "a refusal is kept, too")
		require.NoError(t, s1.Presence().Recheck(p.ID))
		everything()
		assert.EqualValues(t, 4, asked.Load(), "again after Recheck")
		s1.Track("^nothing$", mesh.PresenceOptions{})
		everything()
		assert.EqualValues(t, 4, asked.Load(), "not after a change of rules about other rooms")
		s1.Track("^lob", mesh.PresenceOptions{})
		everything()
		assert.EqualValues(t, 5, asked.Load(), "again after a change of a rule about this room")
	})
}

func TestAFailedGuardIsAskedAgain(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		var fails atomic.Bool
		fails.Store(true)
		s.Track(".*", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) {
			if fails.Load() {
				return false, errors.New("away")
			}
			return true, nil
		}})
		p := s.Dial()
		assert.False(t, p.Room("mesh/subscribe-presence", "lobby").Success)
		fails.Store(false)
		w.Sleep(1100 * time.Millisecond)
		assert.True(t, p.Room("mesh/subscribe-presence", "lobby").Success)
		assert.EqualValues(t, 1, s.Stats().CallbackErrors)
	})
}

func TestJoinGuards(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader, func(o *mesh.Options) { o.HookTimeout = 100 * time.Millisecond })
		s.Track(".*", mesh.PresenceOptions{JoinGuard: func(ctx context.Context, m mesh.Member, room string) (bool, error) {
			switch room {
			case "panics":
				panic("secret")
			case "fails":
				return true, errors.New("secret")
			case "hangs":
				<-ctx.Done()
				return true, nil
			}
			return harness.AdminsOnly(ctx, m, room)
		}})
		p, q := s.Dial(harness.Meta(harness.Visitor)), s.Dial(harness.Meta(harness.Admin))
		for _, room := range []string{"lobby", "panics", "fails", "hangs"} {
			assert.JSONEq(t, `{"success":false,"present":[],"code":"EREFUSED"}`, string(p.Call("mesh/join-room", harness.InRoomPayload(room))), room)
			ids, err := s.Rooms().ConnectionIDs(t.Context(), room)
			require.NoError(t, err)
			assert.Empty(t, ids, room)
		}
		q.Join("lobby")
		assert.Equal(t, []string{q.ID}, p.Subscribe("lobby").IDs(t), "a join guard does not refuse subscriptions")
		require.ErrorIs(t, s.Presence().Join(t.Context(), "lobby", p.ID), mesh.ErrRefused)
		require.NoError(t, s.Rooms().Add(t.Context(), "lobby", p.ID, mesh.AddOptions{}), "Add does not ask the join guard")
		// The join guard is asked for each join.
		require.NoError(t, s.Connections().SetMetadata(t.Context(), p.ID, json.RawMessage(harness.Admin), mesh.MetadataOptions{}))
		assert.True(t, p.Room("mesh/join-room", "attic").Success)
	})
}
