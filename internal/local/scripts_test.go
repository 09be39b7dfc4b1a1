package local

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/meshtest"
)

// servers are two registries on one embedded Redis with the scripts of the store.
type servers struct {
	*testing.T
	*store.Store
	a, b *rig
}

func onScripts(t *testing.T, f func(s *servers)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := meshtest.StartRedis(t).Client()
		s := &servers{T: t, Store: store.New(client, keys.Space{Prefix: "t:", Spread: 1})}
		start := func(inc string) *rig {
			r := newRig(t, withUsers, func(cfg *Config) { cfg.Store = s.Store })
			r.setIncarnation(inc)
			r.keep("room", 10*time.Second)
			return r
		}
		s.a, s.b = start("A"), start("B")
		f(s)
		for _, r := range []*rig{s.a, s.b} {
			for range 3 { // the index is compared
				r.sleep(3 * time.Second)
				r.Heartbeat(-1, false)
			}
			synctest.Wait()
			size, err := s.OwnedSize(t.Context(), 0, r.incarnation())
			require.NoError(t, err)
			stored, _ := r.writers[0].comparable(r.incarnation())
			require.Equal(t, size, stored, "index of %s", r.incarnation())
			require.Zero(t, r.Stats().Orphans)
		}
	})
}

// room returns the records of the room by their connections.
func (s *servers) room() map[string]store.Record {
	s.Helper()
	records, _, err := s.Some(s.Context(), "room", 100)
	require.NoError(s, err)
	list := make(map[string]store.Record)
	for _, r := range records {
		list[r.Conn] = r
	}
	return list
}

// A place that one server has handed over is taken on another one.
func TestScriptsKeepAndReturn(t *testing.T) {
	onScripts(t, func(s *servers) {
		c := s.a.connectAs("c", "ann")
		s.a.join(c, "room")
		s.a.publish(c, "room", `"s"`, 0)
		c.Close(store.CauseLost, true)
		<-c.Gone()
		require.Equal(s, []string{"kept c/room"}, s.a.takeHeard())
		kept := s.room()["c"]
		require.True(s, kept.Kept())
		require.Equal(s, store.CauseLost, kept.KeptCause)
		require.Equal(s, 10*time.Second, kept.Grace)
		joined := s.b.join(s.b.connectAs("d", "ann"), "room")
		require.Equal(s, []any{1, 1, "c"}, []any{joined.Total, joined.Users, joined.Replaced})
		require.Equal(s, []string{"replaced c/room of ~ by d"}, s.b.takeHeard())
		require.Len(s, s.room(), 1)
	})
}

// A silent connection returns to its own place, or gives it up.
func TestScriptsSilence(t *testing.T) {
	onScripts(t, func(s *servers) {
		s.a.rule("room", time.Second)
		c := s.a.connectAs("c", "ann")
		s.a.join(c, "room")
		s.a.sleep(3 * time.Second)
		require.Equal(s, []string{"kept c/room"}, s.a.takeHeard())
		require.Equal(s, store.CauseSilent, s.room()["c"].KeptCause)
		c.Touched()
		s.a.sleep(100 * time.Millisecond)
		require.Equal(s, []string{"replaced c/room of ~ by c"}, s.a.takeHeard())
		require.Equal(s, "A", s.room()["c"].Incarnation)
		s.a.sleep(3 * time.Second)
		require.True(s, new(s.room()["c"]).Kept())
		s.a.leave(c, "room")
		require.Empty(s, s.room())
		require.Zero(s, s.a.Stats().Kept)
	})
}

// A join takes the place of a live connection of its own server, and of another one. The
// owner does not write the entry again, and its index is right.
func TestScriptsReplace(t *testing.T) {
	onScripts(t, func(s *servers) {
		c, d, e := s.a.connectAs("c", "ann"), s.a.connectAs("d", "ann"), s.b.connectAs("e", "ann")
		s.a.join(c, "room")
		_, err := d.JoinIf(s.Context(), "room", JoinOptions{Replaces: "c"})
		require.NoError(s, err)
		require.Equal(s, []string{"replaced c/room of A by d"}, s.a.takeHeard())
		require.False(s, c.In("room"))
		joined, err := e.JoinIf(s.Context(), "room", JoinOptions{Replaces: "d"})
		require.NoError(s, err)
		require.Equal(s, []string{"replaced d/room of A by e"}, s.b.takeHeard())
		require.Equal(s, d, s.a.Forget("room", "d", joined.Position))
		s.a.heartbeat(true)
		require.Len(s, s.room(), 1)
		require.Equal(s, "B", s.room()["e"].Incarnation)
	})
}

// Caps bound joins, and neither further connections of a user nor rebuilds.
func TestScriptsCaps(t *testing.T) {
	onScripts(t, func(s *servers) {
		for _, r := range []*rig{s.a, s.b} {
			r.cap("room", 3, 1)
		}
		ann := s.a.connectAs("c", "ann")
		s.a.join(ann, "room")
		s.b.join(s.b.connectAs("d", "ann"), "room")
		bob := s.b.connectAs("e", "bob")
		_, err := bob.Join(s.Context(), "room")
		requireFull(s.b, err, store.BoundUsers, 1)
		joined, err := bob.JoinIf(s.Context(), "room", JoinOptions{OverCap: true})
		require.NoError(s, err)
		require.Equal(s, []int{3, 2}, []int{joined.Total, joined.Users})
		_, err = s.a.connectAs("f", "ann").Join(s.Context(), "room")
		requireFull(s.a, err, store.BoundConnections, 3)
		s.b.reregister("B2", false)
		s.b.sleep(time.Second)
		require.Len(s, s.room(), 3)
		require.Equal(s, "B2", s.room()["e"].Incarnation)
	})
}

// Records follow the rule and the user.
func TestScriptsGraceAndUser(t *testing.T) {
	onScripts(t, func(s *servers) {
		c := s.a.connectAs("c", "ann")
		s.a.join(c, "room")
		s.a.keep("room", time.Minute)
		s.a.ApplyRules(s.a.Rooms())
		s.a.sleep(time.Second)
		require.Equal(s, time.Minute, s.room()["c"].Grace)
		c.SetMeta(2, []byte("@bob"))
		s.a.sleep(time.Second)
		record := s.room()["c"]
		require.Equal(s, []any{"bob", time.Minute, "@bob"}, []any{record.User, record.Grace, string(record.Meta)})
		c.SetMeta(3, []byte("none"))
		s.a.sleep(time.Second)
		record = s.room()["c"]
		require.Equal(s, []any{"", time.Duration(0)}, []any{record.User, record.Grace})
	})
}
