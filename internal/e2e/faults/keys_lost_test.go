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

var lostAll = flag.Bool("lost.all", false, "TestKeysLost: every pair of keys with every audience and every story")

const (
	lostBeat  = time.Second // LeaseTTL is three times this
	lostTimed = "timed"     // a room whose keys no refresh restores in time
	lostPlain = "lobby"

	busyState, typingState, goingState = `{"is":"busy"}`, `{"is":"typing"}`, `{"is":"going"}`
)

// lostKey is a kind of key, and where one of it is found.
type lostKey struct {
	name string
	of   func(l *loss) string
}

// lostKeys is the whole layout, but for what only the app knows (metadata of
// rooms) and for the list of the dead, which TestListOfTheDeadLost is about.
var lostKeys = []lostKey{
	{"members", func(l *loss) string { return l.Keys().Members(lostPlain) }},
	{"members of a timed room", func(l *loss) string { return l.Keys().Members(lostTimed) }},
	{"seq", func(l *loss) string { return l.Keys().Seq(lostPlain) }},
	{"seq of a timed room", func(l *loss) string { return l.Keys().Seq(lostTimed) }},
	{"conn", func(l *loss) string { return l.Keys().Conn(lostTimed, l.stay[0].ID) }},
	{"conn of who closes", func(l *loss) string { return l.Keys().Conn(lostTimed, l.goes.ID) }},
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

// lostStory is what happens between the loss and the repair.
type lostStory struct{ closes, joins bool }

func (s lostStory) String() string { return fmt.Sprintf("closes=%v joins=%v", s.closes, s.joins) }

var (
	lostStories   = []lostStory{{}, {closes: true}, {joins: true}, {closes: true, joins: true}}
	lostAudiences = []string{"none watches", "one server watches", "both watch"}
)

// TestKeysLost deletes each key of the layout, alone and together with each
// other one: within two heartbeats everything is as it was, and no subscriber gets
// an event that is not true.
func TestKeysLost(t *testing.T) {
	t.Parallel()
	for i, a := range lostKeys {
		for j, b := range lostKeys[i:] {
			for k, story := range lostStories {
				for audience, watched := range lostAudiences {
					if !*lostAll && !lostChosen(i, j, k, audience) {
						continue
					}
					t.Run(a.name+" and "+b.name+", "+watched+", "+story.String(), func(t *testing.T) {
						t.Parallel()
						harness.Embedded(t, func(t *testing.T, w *harness.World) { newLoss(t, w, audience).run(story, a, b) })
					})
				}
			}
		}
	}
}

// lostChosen reports whether a case runs by default: single keys with each story,
// and a third of the pairs with one story. With -short, it is single keys with
// one story.
func lostChosen(i, j, story, audience int) bool {
	switch stories := len(lostStories); {
	case (i+story)%len(lostAudiences) != audience:
		return false
	case harness.Light():
		return j == 0 && i%stories == story
	}
	return j == 0 || (i*7+j*5)%(3*len(lostStories)) == story
}

// TestKeysLostOnRedis is the same for single keys on a real Redis.
func TestKeysLostOnRedis(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	var all sync.WaitGroup // most of the time they wait
	defer all.Wait()
	for i, key := range lostKeys {
		all.Go(func() {
			t.Run(key.name, func(t *testing.T) {
				w := &harness.World{T: t, Real: server, Prefix: fmt.Sprintf("app%d:", i)}
				newLoss(t, w, len(lostAudiences)-1).run(lostStories[i%len(lostStories)], key, key)
			})
		})
	}
}

// TestEverybodyLeavesALostRoom: no member is left whose server could write the room
// again, and watchers still get each leave.
func TestEverybodyLeavesALostRoom(t *testing.T) {
	t.Parallel()
	for _, key := range lostKeys[:5] {
		t.Run(key.name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				l := newLoss(t, w, len(lostAudiences)-1)
				require.NoError(t, l.admin.Del(t.Context(), key.of(l), lostKeys[0].of(l)).Err())
				all := append([]*harness.Peer{l.goes}, l.stay...)
				for _, p := range all {
					p.Close()
				}
				l.Sleep(time.Second)
				for i, watcher := range l.watchers {
					leaves := 0
					for _, u := range watcher.Got()[l.told[i]:] {
						leaves += one(u.Type == "leave")
						require.Equal(t, "leave", u.Type)
					}
					require.Equal(t, 2*len(all), leaves, "each has left both rooms")
				}
				l.leaves()
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

// loss is two servers with three members each, in two rooms.
type loss struct {
	*harness.World
	t        *testing.T
	admin    redis.UniversalClient
	servers  []*harness.Server
	stay     []*harness.Peer // of the first server, then of the second
	goes     *harness.Peer   // of the first server
	comes    *harness.Peer   // of the second server, in no room yet
	watchers []*harness.Peer
	told     []int // updates of each watcher before the loss
}

func newLoss(t *testing.T, w *harness.World, audience int) *loss {
	l := &loss{World: w, t: t, admin: w.Client()}
	for range 2 {
		s := w.Tracked(harness.LeaseOf(3*lostBeat), harness.AllowMetadata)
		require.NoError(t, s.TrackPresence(mesh.Exact(lostTimed), mesh.PresenceOptions{TTL: time.Minute}))
		l.servers = append(l.servers, s)
		for range 3 {
			l.stay = append(l.stay, s.Dial())
		}
	}
	l.goes = l.stay[2]
	l.stay = slices.Delete(l.stay, 2, 3)
	l.comes = l.servers[1].Dial()
	for i, p := range append([]*harness.Peer{l.goes}, l.stay...) {
		p.Join(lostPlain)
		p.Join(lostTimed)
		require.NoError(t, l.servers[0].Connections().SetMetadata(t.Context(), p.ID, map[string]int{"n": i}, mesh.MetadataOptions{}))
	}
	l.stay[0].State(lostPlain, json.RawMessage(busyState))
	l.stay[1].State(lostTimed, json.RawMessage(typingState), map[string]any{"expireAfter": 600_000})
	l.goes.State(lostPlain, json.RawMessage(goingState))
	for _, s := range l.servers[:audience] {
		p := s.Dial()
		p.Subscribe(lostPlain)
		p.Subscribe(lostTimed)
		l.watchers = append(l.watchers, p)
	}
	w.Sleep(4 * lostBeat) // servers compare everything once after their start
	for _, p := range l.watchers {
		l.told = append(l.told, len(p.Got()))
	}
	return l
}

func (l *loss) run(story lostStory, keys ...lostKey) {
	for _, k := range keys {
		key := k.of(l)
		kind := l.admin.Type(l.t.Context(), key).Val()
		require.NotEqual(l.t, "none", kind, "%s: %s is there", k.name, key)
	}
	names := []string{keys[0].of(l), keys[1].of(l)}
	require.NoError(l.t, l.admin.Del(l.t.Context(), names...).Err())
	lost := time.Now()
	if story.joins {
		l.comes.Join(lostPlain)
		l.comes.Join(lostTimed)
		l.stay = append(l.stay, l.comes)
	}
	if story.closes {
		l.goes.Close()
	} else {
		l.stay = append(l.stay, l.goes)
	}
	l.Eventually(2*lostBeat+300*time.Millisecond, func() bool { return l.wrong() == "" }, "%s", stringer(l.wrong))
	l.t.Logf("restored after %v", time.Since(lost))
	l.Sleep(6 * lostBeat) // time for late or superfluous events
	require.Empty(l.t, l.wrong())
	l.heard(story)
	l.sends()
	l.leaves()
}

// stringer is a text that is made when it is needed.
type stringer func() string

func (s stringer) String() string { return s() }

// wrong returns the part that is not restored yet.
func (l *loss) wrong() string {
	ctx := l.t.Context()
	for _, k := range lostKeys {
		key := k.of(l)
		if k.of != nil && strings.Contains(key, l.goes.ID) && !slices.Contains(l.stay, l.goes) {
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
			case m.ID == l.goes.ID && room == lostPlain:
				want = goingState
			}
			if string(m.State) != want || (m.ID != l.comes.ID) != (len(m.Metadata) > 0) {
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

// heard checks the watchers' events since the loss: one leave of the connection that
// closed, one join of the one that came, and otherwise only repetitions.
func (l *loss) heard(story lostStory) {
	for i, p := range l.watchers {
		for _, room := range []string{lostPlain, lostTimed} {
			var got []string
			for _, u := range p.Got()[l.told[i]:] {
				if u.RoomName == room {
					got = append(got, u.Type+" "+u.ConnectionID)
				}
			}
			var want []string
			if story.joins {
				want = append(want, "join "+l.comes.ID)
			}
			if story.closes {
				want = append(want, "leave "+l.goes.ID)
			}
			assert.ElementsMatch(l.t, want, got, "watcher %d of %s: %v", i, room, p.Got()[l.told[i]:])
			assert.Len(l.t, p.Subscribe(room).IDs(l.t), len(l.stay), "watcher %d of %s", i, room)
		}
	}
}

// sends checks that a frame for a room reaches all members.
func (l *loss) sends() {
	for _, room := range []string{lostPlain, lostTimed} {
		require.NoError(l.t, l.servers[0].Rooms().Send(l.t.Context(), room, "note-"+room, json.RawMessage(`1`)))
		for i, p := range l.stay {
			l.Eventually(time.Second, func() bool { return p.Pushed("note-"+room) == 1 }, "member %d of %s gets the frame", i, room)
		}
	}
}

// leaves ends everything, after which only keys with a TTL may be left.
func (l *loss) leaves() {
	for _, p := range append(append(l.stay, l.comes, l.goes), l.watchers...) {
		p.Close()
	}
	l.Sleep(lostBeat / 2)
	for _, s := range l.servers {
		s.End()
	}
	for _, key := range l.admin.Keys(l.t.Context(), l.KeyPrefix()+"*").Val() {
		if key != l.Keys().Format() && l.admin.PTTL(l.t.Context(), key).Val() == -1 {
			l.t.Errorf("left in Redis: %s", key)
		}
	}
}
