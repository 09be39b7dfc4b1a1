package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// byHeader makes the header X-Meta a connection's metadata.
func byHeader(o *Options) {
	o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
		return json.RawMessage(r.Header.Get("X-Meta")), nil
	}
}

func meta(text string) http.Header { return http.Header{"X-Meta": {text}} }

// adminsOnly is the guard of the seed's example.
func adminsOnly(_ context.Context, m Member, _ string) (bool, error) {
	v, err := MetadataOf[struct{ IsAdmin bool }](m)
	return v.IsAdmin, err
}

const (
	admin   = `{"isAdmin":true}`
	visitor = `{"isAdmin":false}`
)

func TestTheRefusedLearnNothing(t *testing.T) {
	t.Parallel()
	for name, guard := range map[string]Guard{
		"refuses": adminsOnly,
		"fails": func(ctx context.Context, m Member, room string) (bool, error) {
			if ok, _ := adminsOnly(ctx, m, room); ok {
				return true, nil
			}
			return true, errors.New("the database is away: secret")
		},
		"fails as if it were about something else": func(ctx context.Context, m Member, room string) (bool, error) {
			if ok, _ := adminsOnly(ctx, m, room); ok {
				return true, nil
			}
			return false, ErrNotTracked
		},
		"panics": func(ctx context.Context, m Member, room string) (bool, error) {
			if ok, _ := adminsOnly(ctx, m, room); ok {
				return true, nil
			}
			panic("secret")
		},
		"hangs": func(ctx context.Context, m Member, room string) (bool, error) {
			if ok, _ := adminsOnly(ctx, m, room); ok {
				return true, nil
			}
			<-ctx.Done()
			return true, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, func(t *testing.T, w *world) {
				learnNothing(t, w, guard)
			})
		})
	}
}

// learnNothing asks on every path, as one who is refused and as one who is not.
func learnNothing(t *testing.T, w *world, guard Guard) {
	var servers []*testServer
	for range 2 {
		s := w.server(byHeader, func(o *Options) { o.GuardTimeout = 100 * time.Millisecond })
		s.track("^secret$", PresenceOptions{Guard: guard})
		servers = append(servers, s)
	}
	s1, s2 := servers[0], servers[1]
	require.NoError(t, s1.Rooms().SetMetadata(t.Context(), "secret", "the topic", MetadataOptions{}))
	insider, boss, spy := s1.dial(meta(`{"isAdmin":true,"name":"insider"}`)), s1.dial(meta(admin)), s1.dial(meta(visitor))
	far := s2.dial(meta(`{"isAdmin":true,"name":"far"}`))
	insider.join("secret")
	far.join("secret")
	require.Equal(t, "true", insider.state("secret", map[string]any{"a": 1}))

	paths := []struct{ command, payload, refused, allowed string }{
		{"mesh/join-room", `{"roomName":"secret"}`, `{"success":true,"present":[]}`, "insider"},
		{"mesh/subscribe-presence", `{"roomName":"secret"}`, `{"success":false,"present":[]}`, `"a":1`},
		{"mesh/get-presence-state", `{"roomName":"secret"}`, `{"success":false,"present":[]}`, insider.id},
		{"mesh/get-room-metadata", `{"roomName":"secret"}`, `{"metadata":null}`, "the topic"},
		{"mesh/get-connection-metadata", `{"connectionId":"` + insider.id + `"}`, `{"metadata":null}`, "insider"},
		{"mesh/get-connection-metadata", `{"connectionId":"` + far.id + `"}`, `{"metadata":null}`, "far"},
		{"mesh/publish-presence-state", `{"roomName":"secret","state":{"b":2}}`, `false`, "true"},
		{"mesh/clear-presence-state", `{"roomName":"secret"}`, `false`, "true"},
		{"mesh/unsubscribe-presence", `{"roomName":"secret"}`, `false`, "true"},
		{"mesh/subscribe-presence", `{"roomName":"secret"}`, `{"success":false,"present":[]}`, `"a":1`},
	}
	for range 2 { // not mirrored here, and mirrored for somebody else
		for _, p := range paths {
			assert.JSONEq(t, p.refused, string(spy.call(p.command, json.RawMessage(p.payload))), "%s %s", p.command, p.payload)
		}
		for _, p := range paths {
			assert.Contains(t, string(boss.call(p.command, json.RawMessage(p.payload))), p.allowed, "%s %s", p.command, p.payload)
		}
	}
	require.Equal(t, "true", insider.state("secret", map[string]any{"a": 2}))
	boss.expect(2*time.Second, "state", insider.id)
	far.leave("secret")
	boss.expect(2*time.Second, "leave", far.id)
	assert.Empty(t, spy.got(), "no update")
	assert.Zero(t, spy.pushed("mesh/presence-ended"), "it never began")
	in, err := s2.Rooms().Contains(t.Context(), "secret", spy.id)
	require.NoError(t, err)
	assert.True(t, in, "present and blind")
	learnNothingByWhatHappensToIt(t, w, s1, s2, spy, insider)
}

func TestEveryMatchingRuleMustAllow(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(byHeader)
		yes := func(context.Context, Member, string) (bool, error) { return true, nil }
		s.track(".*", PresenceOptions{Guard: yes})
		require.NoError(t, s.TrackPresence(Exact("admin-room"), PresenceOptions{Guard: adminsOnly}))
		s.track("^a", PresenceOptions{})
		s.track("^vip-", PresenceOptions{Guard: adminsOnly}) // a pattern, and a late one
		p, q := s.dial(meta(visitor)), s.dial(meta(admin))
		assert.False(t, p.room("mesh/subscribe-presence", "admin-room").Success, "a broad rule opens nothing")
		assert.True(t, p.room("mesh/subscribe-presence", "another").Success)
		assert.False(t, p.room("mesh/subscribe-presence", "vip-1").Success, "nor does a broad pattern")
		assert.True(t, q.room("mesh/subscribe-presence", "vip-1").Success)
		assert.True(t, q.room("mesh/subscribe-presence", "admin-room").Success)
	})
}

func TestChangedMetadataEndsASubscription(t *testing.T) {
	t.Parallel()
	for _, from := range []string{"here", "another server"} {
		t.Run(from, func(t *testing.T) {
			t.Parallel()
			everywhere(t, func(t *testing.T, w *world) {
				s1, s2 := w.server(byHeader, noCommandLimit), w.server(byHeader, noCommandLimit)
				for _, s := range []*testServer{s1, s2} {
					s.track(".*", PresenceOptions{Guard: adminsOnly})
				}
				changer := s1
				if from != "here" {
					changer = s2
				}
				watcher, busy := s1.raw(meta(admin)), s1.dial(meta(admin))
				busy.join("lobby")
				watcher.send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
				require.Contains(t, watcher.next(), `"success":true`)

				// Something happens all the time, and all of it is read.
				var frames []string
				var came atomic.Int32
				read := make(chan struct{})
				go func() {
					defer close(read)
					for {
						_, data, err := watcher.ws.ReadMessage()
						if err != nil {
							return
						}
						frames = append(frames, string(data))
						came.Add(1)
						if strings.Contains(string(data), `"id":9,`) {
							return
						}
					}
				}()
				require.NoError(t, watcher.ws.SetReadDeadline(time.Time{}))
				var wg sync.WaitGroup
				for i := range 30 {
					require.Equal(t, "true", busy.state("lobby", map[string]any{"i": i}))
					if i == 10 {
						w.eventually(2*time.Second, func() bool { return came.Load() > 0 }, "the first update")
						wg.Go(func() {
							assert.NoError(t, changer.Connections().SetMetadata(t.Context(), watcher.id, json.RawMessage(visitor), MetadataOptions{}))
						})
					}
				}
				wg.Wait()
				w.eventually(2*time.Second, func() bool { return s1.Stats().Subscriptions == 0 }, "the end")
				require.Equal(t, "true", busy.state("lobby", map[string]any{"after": true}))
				// It is over for the client too.
				watcher.send(`{"id":7,"command":"mesh/unsubscribe-presence","payload":{"roomName":"lobby"}}`)
				watcher.send(`{"id":8,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
				w.sleep(100 * time.Millisecond)
				watcher.send(`{"id":9,"command":"mesh/noop"}`)
				<-read

				ended := -1
				for i, f := range frames {
					switch {
					case strings.Contains(f, "presence-ended"):
						assert.JSONEq(t, `{"command":"mesh/presence-ended","payload":{"roomName":"lobby"}}`, f)
						assert.Negative(t, ended, "once")
						ended = i
					case strings.Contains(f, "presence-update"):
						assert.Negative(t, ended, "nothing comes after the end: %s", f)
						assert.NotContains(t, f, "after")
						assert.Contains(t, f, fmt.Sprintf(`{"i":%d}`, i), "in order, none missing")
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
	everywhere(t, func(t *testing.T, w *world) {
		s := w.server(byHeader)
		s.track(".*", PresenceOptions{Guard: adminsOnly})
		watcher, busy, steady := s.dial(meta(admin)), s.dial(meta(admin)), s.dial(meta(admin))
		steady.subscribe("lobby")
		busy.join("lobby")
		for i := range 10 {
			require.NoError(t, s.Connections().SetMetadata(t.Context(), watcher.id, json.RawMessage(admin), MetadataOptions{}))
			watcher.subscribe("lobby")
			require.NoError(t, s.Connections().SetMetadata(t.Context(), watcher.id, json.RawMessage(visitor), MetadataOptions{}))
			require.Equal(t, "true", busy.state("lobby", map[string]any{"i": i}))
			w.eventually(time.Second, func() bool { return watcher.pushed("mesh/presence-ended") == i+1 }, "the end")
			// It must be through before the watcher may see what comes.
			w.eventually(2*time.Second, func() bool { return steady.count("state", busy.id) == i+1 }, "the state")
		}
		w.sleep(50 * time.Millisecond)
		assert.Empty(t, watcher.got())
		assert.Equal(t, 10, watcher.pushed("mesh/presence-ended"))
	})
}

func TestChangedRulesEndASubscription(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(byHeader)
		p, q := s.dial(meta(visitor)), s.dial(meta(admin))
		p.subscribe("lobby")
		q.subscribe("lobby")
		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{Guard: adminsOnly}))
		q.join("lobby")
		w.sleep(10 * time.Millisecond)
		assert.Equal(t, 1, p.pushed("mesh/presence-ended"))
		assert.Empty(t, p.got())
		assert.Zero(t, q.pushed("mesh/presence-ended"))
		assert.Equal(t, 1, q.count("join", q.id))
		// And back again.
		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{}))
		p.subscribe("lobby")
	})
}

func TestDeliveryWaitsForAVerdict(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(byHeader)
		think := make(chan struct{})
		s.track(".*", PresenceOptions{Guard: func(ctx context.Context, m Member, room string) (bool, error) {
			if strings.Contains(string(m.Metadata), "think") {
				<-think
			}
			return adminsOnly(ctx, m, room)
		}})
		yes, no, other := s.dial(meta(admin)), s.dial(meta(admin)), s.dial(meta(admin))
		for _, p := range []*peer{yes, no, other} {
			p.subscribe("lobby")
		}
		set := func(p *peer, text string) {
			require.NoError(t, s.Connections().SetMetadata(t.Context(), p.id, json.RawMessage(text), MetadataOptions{}))
		}
		set(yes, `{"isAdmin":true,"think":1}`)
		set(no, `{"isAdmin":false,"think":1}`)
		other.join("lobby")
		require.Equal(t, "true", other.state("lobby", map[string]any{"a": 1}))
		w.sleep(time.Second)
		assert.Len(t, other.got(), 2, "nobody else waits")
		assert.Empty(t, yes.got())
		assert.Empty(t, no.got())
		close(think)
		w.sleep(10 * time.Millisecond)
		require.Len(t, yes.got(), 2)
		assert.Equal(t, "join", yes.got()[0].Type)
		assert.Equal(t, "state", yes.got()[1].Type)
		assert.Empty(t, no.got())
		assert.Equal(t, 1, no.pushed("mesh/presence-ended"))
	})
}

func TestAnswersWhileMetadataChange(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(byHeader)
		s.track(".*", PresenceOptions{Guard: func(ctx context.Context, m Member, room string) (bool, error) {
			time.Sleep(10 * time.Millisecond) // a database
			return adminsOnly(ctx, m, room)
		}})
		for _, before := range []string{admin, visitor} {
			for _, after := range []string{`{"isAdmin":true,"n":2}`, `{"isAdmin":false,"n":2}`} {
				for _, delay := range []time.Duration{0, 5 * time.Millisecond, 10 * time.Millisecond, 15 * time.Millisecond} {
					r := s.raw(meta(before))
					r.send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
					time.Sleep(delay)
					require.NoError(t, s.Connections().SetMetadata(t.Context(), r.id, json.RawMessage(after), MetadataOptions{}))
					w.sleep(100 * time.Millisecond)
					r.send(`{"id":2,"command":"mesh/noop"}`)
					answers, pushes := 0, 0
					for {
						f := r.next()
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
					require.NoError(t, r.ws.Close())
					w.sleep(10 * time.Millisecond)
				}
			}
		}
		assert.Zero(t, s.Stats().Subscriptions)
	})
}

func TestAHangingGuardHoldsUpOnlyItsAsker(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(byHeader, func(o *Options) { o.GuardTimeout = 2 * time.Second })
		release := make(chan struct{})
		s.track(".*", PresenceOptions{Guard: func(_ context.Context, m Member, room string) (bool, error) {
			if room == "hung" && strings.Contains(string(m.Metadata), "false") {
				<-release
			}
			return true, nil
		}})
		slow, quick := s.dial(meta(visitor)), s.dial(meta(admin))
		begun := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(slow.call("mesh/subscribe-presence", inRoomPayload("hung"))))
			assert.InDelta(t, 2, time.Since(begun).Seconds(), 0.1)
			assert.True(t, slow.room("mesh/subscribe-presence", "lobby").Success)
		})
		for _, room := range []string{"hung", "lobby"} {
			quick.subscribe(room)
			quick.join(room)
		}
		assert.Less(t, time.Since(begun), 10*time.Millisecond, "nobody else waits")
		wg.Wait()
		assert.EqualValues(t, 1, s.Stats().CallbackTimeouts)
		close(release)
	})
}

func TestVerdictsAreKept(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s1, s2 := w.server(byHeader), w.server(byHeader)
		var asked atomic.Int32
		guard := func(ctx context.Context, m Member, room string) (bool, error) {
			asked.Add(1)
			return adminsOnly(ctx, m, room)
		}
		s1.track(".*", PresenceOptions{Guard: guard})
		s2.track(".*", PresenceOptions{Guard: guard})
		p := s1.dial(meta(admin))
		everything := func() {
			p.room("mesh/join-room", "lobby")
			p.room("mesh/subscribe-presence", "lobby")
			p.call("mesh/get-presence-state", inRoomPayload("lobby"))
			p.state("lobby", map[string]any{"a": 1})
			p.call("mesh/get-room-metadata", inRoomPayload("lobby"))
			p.call("mesh/get-connection-metadata", map[string]any{"connectionId": "nobody"})
			p.room("mesh/subscribe-presence", "lobby")
		}
		everything()
		assert.EqualValues(t, 1, asked.Load(), "asked once")
		everything()
		assert.EqualValues(t, 1, asked.Load())
		p.room("mesh/join-room", "other")
		assert.EqualValues(t, 2, asked.Load(), "once per room")
		p.leave("other")

		require.NoError(t, s2.Connections().SetMetadata(t.Context(), p.id, json.RawMessage(visitor), MetadataOptions{}))
		w.sleep(10 * time.Millisecond)
		assert.EqualValues(t, 3, asked.Load(), "once per change, for what it watches")
		everything()
		assert.EqualValues(t, 3, asked.Load(), "a no is kept too")
		require.NoError(t, s1.Presence().Recheck(p.id))
		everything()
		assert.EqualValues(t, 4, asked.Load(), "and on request")
		s1.track("^nothing$", PresenceOptions{})
		everything()
		assert.EqualValues(t, 4, asked.Load(), "not when rules about other rooms change")
		s1.track("^lob", PresenceOptions{})
		everything()
		assert.EqualValues(t, 5, asked.Load(), "and when one about this room does")
	})
}

func TestAFailedGuardIsAskedAgain(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server()
		var fails atomic.Bool
		fails.Store(true)
		s.track(".*", PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) {
			if fails.Load() {
				return false, errors.New("away")
			}
			return true, nil
		}})
		p := s.dial()
		assert.False(t, p.room("mesh/subscribe-presence", "lobby").Success)
		fails.Store(false)
		w.sleep(1100 * time.Millisecond)
		assert.True(t, p.room("mesh/subscribe-presence", "lobby").Success)
		assert.EqualValues(t, 1, s.Stats().CallbackErrors)
	})
}

func TestJoinGuards(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.server(byHeader, func(o *Options) { o.HookTimeout = 100 * time.Millisecond })
		s.track(".*", PresenceOptions{JoinGuard: func(ctx context.Context, m Member, room string) (bool, error) {
			switch room {
			case "panics":
				panic("secret")
			case "fails":
				return true, errors.New("secret")
			case "hangs":
				<-ctx.Done()
				return true, nil
			}
			return adminsOnly(ctx, m, room)
		}})
		p, q := s.dial(meta(visitor)), s.dial(meta(admin))
		for _, room := range []string{"lobby", "panics", "fails", "hangs"} {
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/join-room", inRoomPayload(room))), room)
			ids, err := s.Rooms().Members(t.Context(), room)
			require.NoError(t, err)
			assert.Empty(t, ids, room)
		}
		q.join("lobby")
		assert.Equal(t, []string{q.id}, p.subscribe("lobby").ids(t), "it may watch")
		require.ErrorIs(t, s.Presence().Join(t.Context(), "lobby", p.id), ErrRefused)
		require.NoError(t, s.Rooms().Add(t.Context(), "lobby", p.id), "the app itself may")
		// It is asked each time.
		require.NoError(t, s.Connections().SetMetadata(t.Context(), p.id, json.RawMessage(admin), MetadataOptions{}))
		assert.True(t, p.room("mesh/join-room", "attic").Success)
	})
}
