package mesh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// notBanned is a join guard that takes a moment and reads metadata.
func notBanned(_ context.Context, m Member, _ string) (bool, error) {
	time.Sleep(300 * time.Millisecond)
	return !strings.Contains(string(m.Metadata), "banned"), nil
}

// never refuses.
func never(context.Context, Member, string) (bool, error) { return false, nil }

// flightCase is what happens while a join waits for its guard.
type flightCase struct {
	name string
	do   func(t *testing.T, w *world, here, there *testServer, p *peer)
	ends bool // the connection
	// joins says that the join may take place for a moment.
	joins bool
}

var flightCases = []flightCase{
	{name: "metadata", do: func(t *testing.T, _ *world, here, _ *testServer, p *peer) {
		require.NoError(t, here.Connections().SetMetadata(t.Context(), p.id, "banned", MetadataOptions{}))
	}},
	{name: "metadata, from another server", do: func(t *testing.T, _ *world, _, there *testServer, p *peer) {
		require.NoError(t, there.Connections().SetMetadata(t.Context(), p.id, "banned", MetadataOptions{}))
	}},
	{name: "rule", do: func(t *testing.T, _ *world, here, _ *testServer, _ *peer) {
		require.NoError(t, here.TrackPresence(Exact("lobby"), PresenceOptions{JoinGuard: never}))
	}},
	{name: "Remove", do: func(t *testing.T, _ *world, here, _ *testServer, p *peer) {
		was, err := here.Rooms().Remove(t.Context(), "lobby", p.id)
		require.NoError(t, err)
		assert.False(t, was, "it was not in yet")
	}},
	{name: "Remove, from another server", do: func(t *testing.T, _ *world, _, there *testServer, p *peer) {
		_, err := there.Rooms().Remove(t.Context(), "lobby", p.id)
		require.NoError(t, err)
	}},
	{name: "Remove after Add", joins: true, do: func(t *testing.T, _ *world, here, there *testServer, p *peer) {
		require.NoError(t, there.Rooms().Add(t.Context(), "lobby", p.id))
		was, err := here.Rooms().Remove(t.Context(), "lobby", p.id)
		require.NoError(t, err)
		assert.True(t, was)
	}},
	{name: "Clear", do: func(t *testing.T, _ *world, here, _ *testServer, _ *peer) {
		require.NoError(t, here.Rooms().Clear(t.Context(), "lobby"))
	}},
	{name: "Clear, from another server", do: func(t *testing.T, _ *world, _, there *testServer, _ *peer) {
		require.NoError(t, there.Rooms().Clear(t.Context(), "lobby"))
	}},
	{name: "Delete, from another server", do: func(t *testing.T, _ *world, _, there *testServer, _ *peer) {
		require.NoError(t, there.Rooms().Delete(t.Context(), "lobby"))
	}},
	{name: "Leave", do: func(t *testing.T, _ *world, here, _ *testServer, p *peer) {
		_, err := here.Presence().Leave(t.Context(), "lobby", p.id)
		require.NoError(t, err)
	}},
	{name: "Disconnect", ends: true, do: func(t *testing.T, _ *world, here, _ *testServer, p *peer) {
		require.NoError(t, here.Presence().Disconnect(t.Context(), p.id))
	}},
	{name: "Close, from another server", ends: true, do: func(t *testing.T, _ *world, _, there *testServer, p *peer) {
		require.NoError(t, there.Connections().Close(t.Context(), p.id))
	}},
	{name: "the client goes", ends: true, do: func(_ *testing.T, _ *world, _, _ *testServer, p *peer) { p.close() }},
}

func TestABanBeatsAJoinInFlight(t *testing.T) {
	t.Parallel()
	for _, c := range flightCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			everywhereOn(t, nil, func(t *testing.T, w *world) {
				here, there := w.server(byHeader), w.server(byHeader)
				for _, s := range []*testServer{here, there} {
					s.track(".*", PresenceOptions{JoinGuard: notBanned})
				}
				p, watcher := here.dial(meta(`{}`)), there.dial(meta(`{}`))
				watcher.subscribe("lobby")
				answer := make(chan string, 1)
				var asking sync.WaitGroup
				asking.Go(func() {
					data, err := p.tryCall("mesh/join-room", inRoomPayload("lobby"))
					answer <- fmt.Sprint(string(data), err)
				})
				w.sleep(100 * time.Millisecond)
				c.do(t, w, here, there, p)
				asking.Wait()
				if got := <-answer; !c.ends && !c.joins {
					assert.Contains(t, got, `"success":false`)
				}
				w.sleep(400 * time.Millisecond)
				ids, err := there.Rooms().Members(t.Context(), "lobby")
				require.NoError(t, err)
				assert.Empty(t, ids)
				assert.Equal(t, watcher.count("join", p.id), watcher.count("leave", p.id))
				if c.ends {
					p.closed(w.unhurried(2 * time.Second))
					return
				}
				require.NoError(t, there.Rooms().Send(t.Context(), "lobby", "chat", "hello"))
				w.sleep(50 * time.Millisecond)
				assert.Zero(t, p.pushed("chat"))
			})
		})
	}
}

// The app's word is newer than the guard's.
func TestAddLetsAJoinInFlightIn(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		here, there := w.server(byHeader), w.server(byHeader)
		here.track(".*", PresenceOptions{JoinGuard: notBanned})
		p := here.dial(meta(`"banned"`))
		var asking sync.WaitGroup
		asking.Go(func() { assert.True(t, p.room("mesh/join-room", "lobby").Success) })
		w.sleep(100 * time.Millisecond)
		require.NoError(t, there.Rooms().Add(t.Context(), "lobby", p.id))
		asking.Wait()
		in, err := there.Rooms().Contains(t.Context(), "lobby", p.id)
		require.NoError(t, err)
		assert.True(t, in)
	})
}

// Between the yes of the guard and the join there is no moment in which a ban goes
// unnoticed.
func TestABanBetweenTheYesAndTheJoin(t *testing.T) {
	t.Parallel()
	for name, ban := range map[string]func(ctx context.Context, p *PresenceManager) error{
		"Remove": func(ctx context.Context, p *PresenceManager) error {
			_, err := p.Rooms().Remove(ctx, "lobby", "c")
			return err
		},
		"Clear":   func(ctx context.Context, p *PresenceManager) error { return p.Rooms().Clear(ctx, "lobby") },
		"Leave":   func(ctx context.Context, p *PresenceManager) error { _, err := p.Leave(ctx, "lobby", "c"); return err },
		"Recheck": func(_ context.Context, p *PresenceManager) error { return p.Recheck("c") },
		"metadata": func(ctx context.Context, p *PresenceManager) error {
			return p.Connections().SetMetadata(ctx, "c", 1, MetadataOptions{})
		},
		"rule": func(_ context.Context, p *PresenceManager) error {
			return p.TrackPresence(Exact("lobby"), PresenceOptions{JoinGuard: never})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				p, ctx := w.manager(), t.Context()
				var asked atomic.Int64
				require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{JoinGuard: func(context.Context, Member, string) (bool, error) {
					return asked.Add(1) == 1, nil
				}}))
				require.NoError(t, p.Connect(ctx, "c", nil))
				c, err := p.n.conn("c")
				require.NoError(t, err)
				q := &joinQuestion{conn: c, room: "lobby"}
				require.NoError(t, p.n.joins.begin(q))
				defer p.n.joins.end(q)
				err = p.n.joins.ask(ctx, q, false, func(answer error) error {
					if answer != nil {
						return answer
					}
					require.NoError(t, ban(ctx, p))
					_, err := c.JoinIf(ctx, "lobby", func(meta uint64) error { return p.n.joins.answer(q, meta) })
					return err
				})
				require.ErrorIs(t, err, ErrRefused)
				require.False(t, c.In("lobby"))
			})
		})
	}
}

// A join guard that has no lasting answer refuses, in time, and is not asked at
// every turn.
func TestAJoinGuardThatChangesWhatItReads(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		log := &textLog{}
		s := w.server(func(o *Options) { o.Logger = log.logger() })
		var asked atomic.Int64
		s.track(".*", PresenceOptions{JoinGuard: func(ctx context.Context, m Member, _ string) (bool, error) {
			n := asked.Add(1)
			return true, s.Connections().SetMetadata(ctx, m.ID, n, MetadataOptions{})
		}})
		p := s.dial()
		began := time.Now()
		assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/join-room", inRoomPayload("lobby"))))
		assert.LessOrEqual(t, time.Since(began), 6*time.Second)
		assert.LessOrEqual(t, asked.Load(), int64(100))
		assert.Contains(t, log.String(), "no lasting answer")
	})
}

// A rule about other rooms delays no join.
func TestRulesAboutOtherRoomsDoNotHoldUpAJoin(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(byHeader)
		var asked atomic.Int64
		guard := func(context.Context, Member, string) (bool, error) {
			asked.Add(1)
			time.Sleep(50 * time.Millisecond)
			return true, nil
		}
		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{Guard: guard, JoinGuard: guard}))
		p := s.dial(meta(`{}`))
		stop := make(chan struct{})
		var adding sync.WaitGroup
		adding.Go(func() {
			for i := 0; ; i++ {
				assert.NoError(t, s.TrackPresence(Exact(fmt.Sprint("doc", i)), PresenceOptions{}))
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
		began := time.Now()
		p.join("lobby")
		assert.Equal(t, 100*time.Millisecond, time.Since(began), "each guard once")
		close(stop)
		adding.Wait()
		assert.EqualValues(t, 2, asked.Load())
	})
}

// A member that joins again and is refused is out, as the answer says.
func TestARefusedJoinOfAMember(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.server(byHeader)
		s.track(".*", PresenceOptions{JoinGuard: func(_ context.Context, m Member, _ string) (bool, error) {
			return !strings.Contains(string(m.Metadata), "banned"), nil
		}})
		p := s.dial(meta(`{}`))
		p.join("lobby")
		require.NoError(t, s.Connections().SetMetadata(t.Context(), p.id, "banned", MetadataOptions{}))
		in, err := s.Rooms().Contains(t.Context(), "lobby", p.id)
		require.NoError(t, err)
		require.True(t, in, "a change of metadata alone takes no member out")
		assert.False(t, p.room("mesh/join-room", "lobby").Success)
		in, err = s.Rooms().Contains(t.Context(), "lobby", p.id)
		require.NoError(t, err)
		assert.False(t, in)
	})
}

// A join that has been called off answers at once, and says so to the app.
func TestJoinSaysThatItWasTakenOut(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		p := w.manager()
		require.NoError(t, p.TrackPresence(Exact("club"), PresenceOptions{JoinGuard: func(ctx context.Context, _ Member, _ string) (bool, error) {
			<-ctx.Done()
			return true, nil
		}}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		time.AfterFunc(time.Second, func() { _, _ = p.Rooms().Remove(ctx, "club", "c") })
		began := time.Now()
		require.ErrorIs(t, p.Join(ctx, "club", "c"), ErrRefused)
		assert.Equal(t, time.Second, time.Since(began))
		time.AfterFunc(time.Second, func() { _ = p.Disconnect(ctx, "c") })
		require.ErrorIs(t, p.Join(ctx, "club", "c"), ErrClosed)
	})
}

// A join without a join guard that waits for Redis does not take place either, if
// the connection is taken out.
func TestARemovalBeatsAJoinThatWaitsForRedis(t *testing.T) {
	t.Parallel()
	for _, room := range []string{"tracked", "guarded", "untracked"} {
		t.Run(room, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				s := w.server()
				s.track("^tracked$", PresenceOptions{})
				s.track("^guarded$", PresenceOptions{JoinGuard: func(context.Context, Member, string) (bool, error) { return true, nil }})
				insider, p := s.dial(), s.dial()
				insider.join(room)
				w.away()
				var both sync.WaitGroup
				both.Go(func() {
					assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/join-room", inRoomPayload(room))))
				})
				w.sleep(50 * time.Millisecond)
				both.Go(func() {
					_, err := s.Rooms().Remove(t.Context(), room, p.id)
					assert.NoError(t, err)
				})
				w.sleep(50 * time.Millisecond)
				w.back()
				both.Wait()
				w.sleep(time.Second)
				ids, err := s.Rooms().Members(t.Context(), room)
				require.NoError(t, err)
				assert.Equal(t, []string{insider.id}, ids)
			})
		})
	}
}

// TestCancelledWhileGuardsAreAsked: the error of a call that the app cancels
// while a guard is asked is the same as while Redis is.
func TestCancelledWhileGuardsAreAsked(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		var hangs atomic.Bool
		s := w.server()
		ask := func(ctx context.Context, _ Member, _ string) (bool, error) {
			if hangs.Load() {
				<-ctx.Done()
			}
			return true, nil
		}
		require.NoError(t, s.TrackPresence(Exact("club"), PresenceOptions{TTL: time.Second, JoinGuard: ask}))
		require.NoError(t, s.TrackPresence(Exact("bar"), PresenceOptions{JoinGuard: ask}))
		require.NoError(t, s.TrackPresence(Exact("guarded"), PresenceOptions{Guard: ask}))
		m := s.Presence()
		require.NoError(t, m.Connect(t.Context(), "c", nil))
		require.NoError(t, m.Join(t.Context(), "club", "c"))
		w.sleep(4 * time.Second) // its entry ends
		hangs.Store(true)
		for _, tt := range []struct {
			name string
			call func(ctx context.Context) error
		}{
			{"Join", func(ctx context.Context) error { return m.Join(ctx, "bar", "c") }},
			{"PublishState", func(ctx context.Context) error {
				return m.PublishState(ctx, "club", "c", map[string]any{}, StateOptions{})
			}},
			{"Subscribe", func(ctx context.Context) (err error) {
				for _, err = range m.Subscribe(ctx, "guarded", SubscribeOptions{Viewer: "c"}) {
				}
				return err
			}},
			{"ClearState", func(ctx context.Context) error { return m.ClearState(ctx, "club", "c") }},
		} {
			ctx, cancel := context.WithCancelCause(t.Context())
			cause := errors.New("the user left")
			time.AfterFunc(10*time.Millisecond, func() { cancel(cause) })
			err := tt.call(ctx)
			require.ErrorIs(t, err, context.Canceled, tt.name)
			require.ErrorIs(t, err, cause, tt.name)
		}
		hangs.Store(false)
	})
}
