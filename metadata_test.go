package mesh_test

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/testhook"
)

// TestEqualMetadataIsNoChange checks that setting equal metadata keeps the version and
// asks no guard again, on any server and for any caller.
func TestEqualMetadataIsNoChange(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s1, s2 := w.Server(harness.ByHeader, func(o *mesh.Options) {
			o.ClientMetadata = func(_ context.Context, _ mesh.Member, proposed json.RawMessage) (any, error) { return proposed, nil }
		}), w.Server()
		var asked atomic.Int64
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) { asked.Add(1); return true, nil }})
		}
		p := s1.Dial(harness.Meta(`{"a":1}`))
		p.Join("lobby")
		p.Subscribe("lobby")
		version := func() (v uint64) {
			value, err := testhook.PartsOf(s1.Server).Store.ConnMeta(ctx, p.ID)
			require.NoError(t, err)
			require.JSONEq(t, `{"a":1}`, string(value.Data))
			return value.Version
		}
		before := version()
		require.NoError(t, s1.Connections().SetMetadata(ctx, p.ID, map[string]int{"a": 1}, mesh.MetadataOptions{}))
		require.NoError(t, s2.Connections().SetMetadata(ctx, p.ID, map[string]int{"a": 1}, mesh.MetadataOptions{Strategy: mesh.Merge}))
		require.JSONEq(t, `{"success":true}`, string(p.Call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":{"a":1}}`))))
		w.Sleep(100 * time.Millisecond)
		assert.Equal(t, before, version())
		assert.EqualValues(t, 1, asked.Load())

		// A server whose memory is behind Redis must not skip the change.
		require.NoError(t, s2.Connections().SetMetadata(ctx, p.ID, map[string]int{"a": 2}, mesh.MetadataOptions{}))
		require.NoError(t, s1.Connections().SetMetadata(ctx, p.ID, map[string]int{"a": 1}, mesh.MetadataOptions{}))
		w.Sleep(100 * time.Millisecond)
		assert.Greater(t, version(), before)

		require.NoError(t, s1.Rooms().SetMetadata(ctx, "lobby", "topic", mesh.MetadataOptions{}))
		first, err := testhook.PartsOf(s1.Server).Store.RoomMeta(ctx, "lobby")
		require.NoError(t, err)
		require.NoError(t, s2.Rooms().SetMetadata(ctx, "lobby", "topic", mesh.MetadataOptions{}))
		second, err := testhook.PartsOf(s1.Server).Store.RoomMeta(ctx, "lobby")
		require.NoError(t, err)
		assert.Equal(t, first.Version, second.Version)
	})
}

// TestAGuardThatSetsMetadata checks that a guard that sets the metadata of its viewer is
// asked again until the metadata stays the same. If that does not happen within the time
// limit of guards, the viewer is refused.
func TestAGuardThatSetsMetadata(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		value   func(n int64) any
		lasting bool
	}{
		{"the same value each time", func(int64) any { return "seen" }, true},
		{"three different values", func(n int64) any { return min(n, 3) }, true},
		{"another value each time", func(n int64) any { return n }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				log := &testlog.TextLog{}
				s := w.Server(harness.ByHeader, func(o *mesh.Options) { o.Logger = log.Logger() })
				var asked atomic.Int64
				s.Track(".*", mesh.PresenceOptions{Guard: func(ctx context.Context, m mesh.Member, _ string) (bool, error) {
					n := asked.Add(1)
					// The question may be cancelled during the call.
					err := s.Connections().SetMetadata(context.WithoutCancel(ctx), m.ID, tc.value(n), mesh.MetadataOptions{})
					return true, err
				}})
				p := s.Dial()
				began := time.Now()
				answer := p.Room("mesh/subscribe-presence", "lobby")
				assert.Equal(t, tc.lasting, answer.Success)
				assert.LessOrEqual(t, time.Since(began), 6*time.Second)
				w.Sleep(20 * time.Second)
				assert.LessOrEqual(t, asked.Load(), int64(150))
				if tc.lasting {
					assert.LessOrEqual(t, asked.Load(), int64(8))
					assert.Zero(t, p.Pushed("mesh/presence-ended"))
					assert.Equal(t, 1, s.Stats().Subscriptions)
					assert.NotContains(t, log.String(), "no lasting answer")
					return
				}
				assert.Zero(t, s.Stats().Subscriptions)
				assert.Contains(t, log.String(), "no lasting answer")
				asked.Store(0)
				w.Sleep(time.Minute)
				assert.Zero(t, asked.Load(), "the guard is not asked any more")
			})
		})
	}
}

// TestAGuardThatBeginsToSetMetadata checks that a subscription ends with a push if its
// guard begins to change the metadata each time.
func TestAGuardThatBeginsToSetMetadata(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader)
		var asked, sets atomic.Int64
		s.Track(".*", mesh.PresenceOptions{Guard: func(ctx context.Context, m mesh.Member, _ string) (bool, error) {
			n := asked.Add(1)
			if sets.Load() > 0 {
				_ = s.Connections().SetMetadata(context.WithoutCancel(ctx), m.ID, n, mesh.MetadataOptions{})
			}
			return true, nil
		}})
		p := s.Dial()
		p.Subscribe("lobby")
		sets.Store(1)
		require.NoError(t, s.Presence().Recheck(p.ID))
		w.Sleep(12 * time.Second)
		assert.Equal(t, 1, p.Pushed("mesh/presence-ended"))
		assert.LessOrEqual(t, asked.Load(), int64(150))
		asked.Store(0)
		w.Sleep(time.Minute)
		assert.Zero(t, asked.Load())
	})
}

// TestFastChangesOfMetadataAreCombined changes the metadata of a connection in many
// rooms all the time. Each room may cost at most ten rechecks and ten writes a second,
// and the last change must arrive.
func TestFastChangesOfMetadataAreCombined(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "thousands of changes")
	for _, how := range []string{"sequential", "simultaneous", "from another server"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				const rooms, changes = 100, 200
				ctx := t.Context()
				p, far := w.Manager(), w.Manager()
				var asked atomic.Int64
				require.NoError(t, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{
					Guard: func(context.Context, mesh.Member, string) (bool, error) { asked.Add(1); return true, nil },
				}))
				require.NoError(t, p.Connect(ctx, "c", nil))
				require.NoError(t, p.Connect(ctx, "busy", nil))
				var subs []*harness.Tap
				for i := range rooms {
					room := fmt.Sprint("r", i)
					require.NoError(t, p.Join(ctx, room, "c"))
					subs = append(subs, w.Tap(p, room, mesh.SubscribeOptions{Viewer: "c"}))
				}
				for _, s := range subs {
					s.Wait(w, 1)
				}
				w.Sleep(time.Second)
				asked.Store(0)
				ops := testhook.PartsOf(p).Local.Stats().Ops
				began := time.Now()
				set := func(m *mesh.PresenceManager, n int) {
					assert.NoError(t, m.Connections().SetMetadata(ctx, "c", n, mesh.MetadataOptions{}))
				}
				var all sync.WaitGroup
				for n := range changes {
					switch how {
					case "simultaneous":
						all.Go(func() { set(p, n) })
					case "from another server":
						set(far, n)
					default:
						set(p, n)
					}
					if how != "sequential" {
						w.Sleep(5 * time.Millisecond)
					}
				}
				all.Wait()
				took := time.Since(began)
				require.Less(t, took, 3*time.Second)
				w.Sleep(time.Second)
				most := int64(took/guards.RecheckPause) + 3
				assert.LessOrEqual(t, asked.Load(), rooms*most, "guard calls in %v", took)
				assert.LessOrEqual(t, int64(testhook.PartsOf(p).Local.Stats().Ops-ops), rooms*most, "writes in %v", took)

				data, err := far.Connections().RoomMetadata(ctx, "r7")
				require.NoError(t, err)
				assert.Equal(t, fmt.Sprint(changes-1), string(data["c"]), "the last change")
				require.NoError(t, p.Join(ctx, "r7", "busy"))
				w.Eventually(3*time.Second, func() bool {
					events := subs[7].Got() // the changes of metadata come first
					last := events[len(events)-1]
					return last.Type == mesh.EventJoin && last.ConnectionID == "busy"
				}, "the subscription is open")
			})
		})
	}
}
