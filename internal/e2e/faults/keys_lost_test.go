package faults

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/testhook"
)

var lostAll = flag.Bool("lost.all", false, "TestKeysLost: every pair of keys with every number of watching servers and every scenario")

const (
	lostHeartbeat = time.Second // LeaseTTL is three times this
	lostTimed     = "timed"     // a room with a TTL so long that no refresh restores its keys in time
	lostPlain     = "lobby"

	busyState, typingState, leavingState = `{"is":"busy"}`, `{"is":"typing"}`, `{"is":"leaving"}`
)

// lostKey is a kind of key, with a function that returns the name of one such key.
type lostKey struct {
	name string
	of   func(l *loss) string
}

// lostKeys lists all kinds of keys, except for the metadata of rooms, which only the
// app can restore, and the list of dead servers, which the tests of internal/lease
// cover.
var lostKeys = []lostKey{
	{"members", func(l *loss) string { return l.Keys().Members(lostPlain) }},
	{"members of a timed room", func(l *loss) string { return l.Keys().Members(lostTimed) }},
	{"seq", func(l *loss) string { return l.Keys().Seq(lostPlain) }},
	{"seq of a timed room", func(l *loss) string { return l.Keys().Seq(lostTimed) }},
	{"conn", func(l *loss) string { return l.Keys().Conn(lostTimed, l.stay[0].ID) }},
	{"conn of a client that leaves", func(l *loss) string { return l.Keys().Conn(lostTimed, l.leaver.ID) }},
	{"state", func(l *loss) string { return l.Keys().State(lostPlain, l.stay[0].ID) }},
	{"state that ends", func(l *loss) string { return l.Keys().State(lostTimed, l.stay[1].ID) }},
	{"owned", func(l *loss) string {
		return l.Keys().Owned(0, testhook.PartsOf(l.servers[0].Server).Lease.Incarnation())
	}},
	{"fence", func(l *loss) string {
		return l.Keys().Fence(0, testhook.PartsOf(l.servers[0].Server).Lease.Incarnation())
	}},
	{"connection metadata", func(l *loss) string { return l.Keys().ConnMeta(l.stay[0].ID) }},
	{"instances", func(l *loss) string { return l.Keys().Instances() }},
	{"index of rooms", func(l *loss) string { return l.Keys().Rooms(0) }},
	{"format", func(l *loss) string { return l.Keys().Format() }},
}

// lostScenario tells what else happens between the loss and the repair.
type lostScenario struct{ closes, joins bool }

func (s lostScenario) String() string { return fmt.Sprintf("closes=%v joins=%v", s.closes, s.joins) }

var (
	lostScenarios = []lostScenario{{}, {closes: true}, {joins: true}, {closes: true, joins: true}}
	lostWatching  = []string{"none watches", "one server watches", "both watch"}
)

// TestKeysLost deletes each key of the layout, alone and together with each other key.
// Within two heartbeats everything must be restored, and no subscriber may receive a
// wrong event.
func TestKeysLost(t *testing.T) {
	t.Parallel()
	for i, a := range lostKeys {
		for j, b := range lostKeys[i:] {
			for k, scenario := range lostScenarios {
				for watching, watched := range lostWatching {
					if !*lostAll && !lostChosen(i, j, k, watching) {
						continue
					}
					t.Run(a.name+" and "+b.name+", "+watched+", "+scenario.String(), func(t *testing.T) {
						t.Parallel()
						harness.Embedded(t, func(t *testing.T, w *harness.World) { newLoss(t, w, watching).run(scenario, a, b) })
					})
				}
			}
		}
	}
}

// lostChosen reports whether a case runs by default: single keys with each scenario,
// and a third of the pairs with one scenario. With -short, only single keys with one
// scenario run.
func lostChosen(i, j, scenario, watching int) bool {
	switch scenarios := len(lostScenarios); {
	case (i+scenario)%len(lostWatching) != watching:
		return false
	case harness.Light():
		return j == 0 && i%scenarios == scenario
	}
	return j == 0 || (i*7+j*5)%(3*len(lostScenarios)) == scenario
}

// TestKeysLostOnRedis deletes single keys on a real Redis.
func TestKeysLostOnRedis(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	var all sync.WaitGroup // the cases mostly wait, so they all run at once
	defer all.Wait()
	for i, key := range lostKeys {
		all.Go(func() {
			t.Run(key.name, func(t *testing.T) {
				w := &harness.World{T: t, Real: server, Prefix: fmt.Sprintf("app%d:", i)}
				newLoss(t, w, len(lostWatching)-1).run(lostScenarios[i%len(lostScenarios)], key, key)
			})
		})
	}
}

// TestAllMembersLeaveALostRoom checks that watchers receive each leave although no
// remaining member's server could write the room again.
func TestAllMembersLeaveALostRoom(t *testing.T) {
	t.Parallel()
	for _, key := range lostKeys[:5] {
		t.Run(key.name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				l := newLoss(t, w, len(lostWatching)-1)
				require.NoError(t, l.admin.Del(t.Context(), key.of(l), lostKeys[0].of(l)).Err())
				all := append([]*harness.Peer{l.leaver}, l.stay...)
				for _, p := range all {
					p.Close()
				}
				l.Sleep(time.Second)
				for i, watcher := range l.watchers {
					leaves := 0
					for _, u := range watcher.Got()[l.before[i]:] {
						leaves += one(u.Type == "leave")
						require.Equal(t, "leave", u.Type)
					}
					require.Equal(t, 2*len(all), leaves, "each member has left both rooms")
				}
				l.finish()
			})
		})
	}
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

// loss is a test with two servers, each with three members in two rooms.
type loss struct {
	*harness.World
	t        *testing.T
	admin    redis.UniversalClient
	servers  []*harness.Server
	stay     []*harness.Peer // of the first server, then of the second
	leaver   *harness.Peer   // of the first server
	joiner   *harness.Peer   // of the second server, in no room at first
	watchers []*harness.Peer
	before   []int // number of each watcher's updates before the loss
}

func newLoss(t *testing.T, w *harness.World, watching int) *loss {
	l := &loss{World: w, t: t, admin: w.Client()}
	for range 2 {
		s := w.Tracked(harness.LeaseOf(3*lostHeartbeat), harness.AllowMetadata)
		require.NoError(t, s.TrackPresence(mesh.Exact(lostTimed), mesh.PresenceOptions{TTL: time.Minute}))
		l.servers = append(l.servers, s)
		for range 3 {
			l.stay = append(l.stay, s.Dial())
		}
	}
	l.leaver = l.stay[2]
	l.stay = slices.Delete(l.stay, 2, 3)
	l.joiner = l.servers[1].Dial()
	for i, p := range append([]*harness.Peer{l.leaver}, l.stay...) {
		p.Join(lostPlain)
		p.Join(lostTimed)
		require.NoError(t, l.servers[0].Connections().SetMetadata(t.Context(), p.ID, map[string]int{"n": i}, mesh.MetadataOptions{}))
	}
	l.stay[0].State(lostPlain, json.RawMessage(busyState))
	l.stay[1].State(lostTimed, json.RawMessage(typingState), map[string]any{"expireAfter": 600_000})
	l.leaver.State(lostPlain, json.RawMessage(leavingState))
	for _, s := range l.servers[:watching] {
		p := s.Dial()
		p.Subscribe(lostPlain)
		p.Subscribe(lostTimed)
		l.watchers = append(l.watchers, p)
	}
	w.Sleep(4 * lostHeartbeat) // time for the first reconcile after the start
	for _, p := range l.watchers {
		l.before = append(l.before, len(p.Got()))
	}
	return l
}

func (l *loss) run(scenario lostScenario, keys ...lostKey) {
	for _, k := range keys {
		key := k.of(l)
		kind := l.admin.Type(l.t.Context(), key).Val()
		require.NotEqual(l.t, "none", kind, "%s: %s exists", k.name, key)
	}
	names := []string{keys[0].of(l), keys[1].of(l)}
	require.NoError(l.t, l.admin.Del(l.t.Context(), names...).Err())
	lost := time.Now()
	if scenario.joins {
		l.joiner.Join(lostPlain)
		l.joiner.Join(lostTimed)
		l.stay = append(l.stay, l.joiner)
	}
	if scenario.closes {
		l.leaver.Close()
	} else {
		l.stay = append(l.stay, l.leaver)
	}
	l.Eventually(2*lostHeartbeat+300*time.Millisecond, func() bool { return l.wrong() == "" }, "%s", stringer(l.wrong))
	l.t.Logf("restored after %v", time.Since(lost))
	l.Sleep(6 * lostHeartbeat) // time for late or superfluous events
	require.Empty(l.t, l.wrong())
	l.checkEvents(scenario)
	l.checkSend()
	l.finish()
}

// stringer is a text that is computed when it is printed.
type stringer func() string

func (s stringer) String() string { return s() }

// wrong returns the first part that is not restored yet, or "".
func (l *loss) wrong() string {
	ctx := l.t.Context()
	for _, k := range lostKeys {
		key := k.of(l)
		if k.of != nil && strings.Contains(key, l.leaver.ID) && !slices.Contains(l.stay, l.leaver) {
			continue
		}
		if l.admin.Exists(ctx, key).Val() == 0 {
			return k.name + ": " + key + " is missing"
		}
	}
	ids := make([]string, len(l.stay))
	for i, p := range l.stay {
		ids[i] = p.ID
	}
	slices.Sort(ids)
	for _, room := range []string{lostPlain, lostTimed} {
		if diff := l.wrongRoom(ctx, room, ids); diff != "" {
			return room + ": " + diff
		}
	}
	page, err := l.servers[0].Rooms().List(ctx, mesh.RoomQuery{})
	if err != nil || page.Total != 2 || len(page.Rooms) != 2 || page.Rooms[0].Members != len(ids) {
		return fmt.Sprintf("list %+v %v", page, err)
	}
	return ""
}

func (l *loss) wrongRoom(ctx context.Context, room string, ids []string) string {
	count := 0
	for i, s := range l.servers {
		members, err := s.Presence().Members(ctx, room)
		n, err2 := s.Presence().Count(ctx, room)
		entries, err3 := s.Rooms().Entries(ctx, room, mesh.EntryQuery{})
		if err != nil || err2 != nil || err3 != nil || n != len(ids) || len(entries.Entries) != len(ids) {
			return fmt.Sprintf("%d counted, %d entries: %v %v %v", n, len(entries.Entries), err, err2, err3)
		}
		var got []string
		for _, m := range members {
			got = append(got, m.ID)
			want := ""
			switch {
			case m.ID == l.stay[0].ID && room == lostPlain:
				want = busyState
			case m.ID == l.stay[1].ID && room == lostTimed:
				want = typingState
			case m.ID == l.leaver.ID && room == lostPlain:
				want = leavingState
			}
			if string(m.State) != want || (m.ID != l.joiner.ID) != (len(m.Metadata) > 0) {
				return fmt.Sprintf("%s has state %s, metadata %s", m.ID, m.State, m.Metadata)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, ids) {
			return fmt.Sprintf("members %v, not %v", got, ids)
		}
		position := l.admin.Get(ctx, l.Keys().Seq(room)).Val()
		_, rest, _ := strings.Cut(position, " "+testhook.PartsOf(s.Server).Lease.Incarnation()+" ")
		mine := 0
		_, _ = fmt.Sscan(rest, &mine)
		if len(testhook.PartsOf(s.Server).Local.InRoom(room)) != mine {
			return fmt.Sprintf("server %d has %d, counted in %q", i, len(testhook.PartsOf(s.Server).Local.InRoom(room)), position)
		}
		count += mine
	}
	if count != len(ids) {
		return fmt.Sprintf("%d counted", count)
	}
	return ""
}

// checkEvents checks the updates that watchers received since the loss: one leave of
// the connection that closed, and one join of the connection that joined.
func (l *loss) checkEvents(scenario lostScenario) {
	for i, p := range l.watchers {
		for _, room := range []string{lostPlain, lostTimed} {
			var got []string
			for _, u := range p.Got()[l.before[i]:] {
				if u.RoomName == room {
					got = append(got, u.Type+" "+u.ConnectionID)
				}
			}
			var want []string
			if scenario.joins {
				want = append(want, "join "+l.joiner.ID)
			}
			if scenario.closes {
				want = append(want, "leave "+l.leaver.ID)
			}
			assert.ElementsMatch(l.t, want, got, "watcher %d of %s: %v", i, room, p.Got()[l.before[i]:])
			assert.Len(l.t, p.Subscribe(room).IDs(l.t), len(l.stay), "watcher %d of %s", i, room)
		}
	}
}

// checkSend checks that a frame for a room reaches all members.
func (l *loss) checkSend() {
	for _, room := range []string{lostPlain, lostTimed} {
		require.NoError(l.t, l.servers[0].Rooms().Send(l.t.Context(), room, "note-"+room, json.RawMessage(`1`)))
		for i, p := range l.stay {
			l.Eventually(time.Second, func() bool { return p.Pushed("note-"+room) == 1 }, "member %d of %s gets the frame", i, room)
		}
	}
}

// finish closes all connections and stops the servers. Only keys with a TTL may remain.
func (l *loss) finish() {
	for _, p := range append(append(l.stay, l.joiner, l.leaver), l.watchers...) {
		p.Close()
	}
	l.Sleep(lostHeartbeat / 2)
	for _, s := range l.servers {
		s.End()
	}
	for _, key := range l.admin.Keys(l.t.Context(), l.KeyPrefix()+"*").Val() {
		if key != l.Keys().Format() && l.admin.PTTL(l.t.Context(), key).Val() == -1 {
			l.t.Errorf("left in Redis: %s", key)
		}
	}
}
