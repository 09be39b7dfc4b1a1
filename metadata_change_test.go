package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Equal bytes are no change, on any server and by any caller.
func TestEqualMetadataIsNoChange(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s1, s2 := w.server(byHeader, func(o *Options) {
			o.ClientMetadata = func(_ context.Context, _ Member, proposed json.RawMessage) (any, error) { return proposed, nil }
		}), w.server()
		var asked atomic.Int64
		for _, s := range []*testServer{s1, s2} {
			s.track(".*", PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) { asked.Add(1); return true, nil }})
		}
		p := s1.dial(meta(`{"a":1}`))
		p.join("lobby")
		p.subscribe("lobby")
		version := func() (v uint64) {
			value, err := s1.n.store.ConnMeta(ctx, p.id)
			require.NoError(t, err)
			require.JSONEq(t, `{"a":1}`, string(value.Data))
			return value.Version
		}
		before := version()
		require.NoError(t, s1.Connections().SetMetadata(ctx, p.id, map[string]int{"a": 1}, MetadataOptions{}))
		require.NoError(t, s2.Connections().SetMetadata(ctx, p.id, map[string]int{"a": 1}, MetadataOptions{Strategy: Merge}))
		require.JSONEq(t, `{"success":true}`, string(p.call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":{"a":1}}`))))
		w.sleep(100 * time.Millisecond)
		assert.Equal(t, before, version())
		assert.EqualValues(t, 1, asked.Load())

		// Memory that is behind Redis does not pass for equal.
		require.NoError(t, s2.Connections().SetMetadata(ctx, p.id, map[string]int{"a": 2}, MetadataOptions{}))
		require.NoError(t, s1.Connections().SetMetadata(ctx, p.id, map[string]int{"a": 1}, MetadataOptions{}))
		w.sleep(100 * time.Millisecond)
		assert.Greater(t, version(), before)

		require.NoError(t, s1.Rooms().SetMetadata(ctx, "lobby", "topic", MetadataOptions{}))
		was, err := s1.n.store.RoomMeta(ctx, "lobby")
		require.NoError(t, err)
		require.NoError(t, s2.Rooms().SetMetadata(ctx, "lobby", "topic", MetadataOptions{}))
		is, err := s1.n.store.RoomMeta(ctx, "lobby")
		require.NoError(t, err)
		assert.Equal(t, was.Version, is.Version)
	})
}

// A guard that sets its subject's metadata is asked as long as it changes them, at
// most for the guards' time limit, and then the answer is no.
func TestAGuardThatSetsMetadata(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		value   func(n int64) any
		lasting bool
	}{
		{"the same each time", func(int64) any { return "seen" }, true},
		{"another one three times", func(n int64) any { return min(n, 3) }, true},
		{"another one each time", func(n int64) any { return n }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				log := &textLog{}
				s := w.server(byHeader, func(o *Options) { o.Logger = log.logger() })
				var asked atomic.Int64
				s.track(".*", PresenceOptions{Guard: func(ctx context.Context, m Member, _ string) (bool, error) {
					n := asked.Add(1)
					// The question may be called off while this waits.
					err := s.Connections().SetMetadata(context.WithoutCancel(ctx), m.ID, tc.value(n), MetadataOptions{})
					return true, err
				}})
				p := s.dial()
				began := time.Now()
				answer := p.room("mesh/subscribe-presence", "lobby")
				assert.Equal(t, tc.lasting, answer.Success)
				assert.LessOrEqual(t, time.Since(began), 6*time.Second)
				w.sleep(20 * time.Second)
				assert.LessOrEqual(t, asked.Load(), int64(150))
				if tc.lasting {
					assert.LessOrEqual(t, asked.Load(), int64(8))
					assert.Zero(t, p.pushed("mesh/presence-ended"))
					assert.Equal(t, 1, s.Stats().Subscriptions)
					assert.NotContains(t, log.String(), "no lasting answer")
					return
				}
				assert.Zero(t, s.Stats().Subscriptions)
				assert.Contains(t, log.String(), "no lasting answer")
				asked.Store(0)
				w.sleep(time.Minute)
				assert.Zero(t, asked.Load(), "it is over")
			})
		})
	}
}

// A subscription whose guard begins to change metadata ends in time, by a push.
func TestAGuardThatBeginsToSetMetadata(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(byHeader)
		var asked, sets atomic.Int64
		s.track(".*", PresenceOptions{Guard: func(ctx context.Context, m Member, _ string) (bool, error) {
			n := asked.Add(1)
			if sets.Load() > 0 {
				_ = s.Connections().SetMetadata(context.WithoutCancel(ctx), m.ID, n, MetadataOptions{})
			}
			return true, nil
		}})
		p := s.dial()
		p.subscribe("lobby")
		sets.Store(1)
		require.NoError(t, s.Presence().Recheck(p.id))
		w.sleep(12 * time.Second)
		assert.Equal(t, 1, p.pushed("mesh/presence-ended"))
		assert.LessOrEqual(t, asked.Load(), int64(150))
		asked.Store(0)
		w.sleep(time.Minute)
		assert.Zero(t, asked.Load())
	})
}

// A connection in many rooms whose metadata change all the time costs no more
// than ten rechecks and rewritings a second, and sees everything.
func TestFastChangesOfMetadataGoTogether(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"here, one after the other", "here, at once", "from another server"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				const rooms, changes = 100, 200
				ctx := t.Context()
				p, far := w.manager(), w.manager()
				var asked atomic.Int64
				require.NoError(t, p.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{
					Guard: func(context.Context, Member, string) (bool, error) { asked.Add(1); return true, nil },
				}))
				require.NoError(t, p.Connect(ctx, "c", nil))
				require.NoError(t, p.Connect(ctx, "busy", nil))
				var subs []*tap
				for i := range rooms {
					room := fmt.Sprint("r", i)
					require.NoError(t, p.Join(ctx, room, "c"))
					subs = append(subs, w.tap(p, room, SubscribeOptions{Viewer: "c"}))
				}
				for _, s := range subs {
					s.wait(w, 1)
				}
				w.sleep(time.Second)
				asked.Store(0)
				ops := p.n.owner.Stats().Ops
				began := time.Now()
				set := func(m *PresenceManager, n int) {
					assert.NoError(t, m.Connections().SetMetadata(ctx, "c", n, MetadataOptions{}))
				}
				var all sync.WaitGroup
				for n := range changes {
					switch how {
					case "here, at once":
						all.Go(func() { set(p, n) })
					case "from another server":
						set(far, n)
					default:
						set(p, n)
					}
					if how != "here, one after the other" {
						w.sleep(5 * time.Millisecond)
					}
				}
				all.Wait()
				took := time.Since(began)
				require.Less(t, took, 3*time.Second)
				w.sleep(time.Second)
				most := int64(took/recheckPause) + 3
				assert.LessOrEqual(t, asked.Load(), rooms*most, "guard calls in %v", took)
				assert.LessOrEqual(t, int64(p.n.owner.Stats().Ops-ops), rooms*most, "rewritings in %v", took)

				data, err := far.Connections().RoomMetadata(ctx, "r7")
				require.NoError(t, err)
				assert.Equal(t, fmt.Sprint(changes-1), string(data["c"]), "the last one is there")
				require.NoError(t, p.Join(ctx, "r7", "busy"))
				assert.Equal(t, "busy", subs[7].wait(w, 2)[1].ConnectionID)
			})
		})
	}
}
