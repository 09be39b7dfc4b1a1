package mesh

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

	"github.com/meshpresence/mesh/internal/redistest"
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
	{"members", func(l *loss) string { return l.keys().Members(lostPlain) }},
	{"members of a timed room", func(l *loss) string { return l.keys().Members(lostTimed) }},
	{"seq", func(l *loss) string { return l.keys().Seq(lostPlain) }},
	{"seq of a timed room", func(l *loss) string { return l.keys().Seq(lostTimed) }},
	{"conn", func(l *loss) string { return l.keys().Conn(lostTimed, l.stay[0].id) }},
	{"conn of who closes", func(l *loss) string { return l.keys().Conn(lostTimed, l.goes.id) }},
	{"state", func(l *loss) string { return l.keys().State(lostPlain, l.stay[0].id) }},
	{"state that ends", func(l *loss) string { return l.keys().State(lostTimed, l.stay[1].id) }},
	{"owned", func(l *loss) string { return l.keys().Owned(0, l.servers[0].n.lease.Incarnation()) }},
	{"fence", func(l *loss) string { return l.keys().Fence(0, l.servers[0].n.lease.Incarnation()) }},
	{"connection metadata", func(l *loss) string { return l.keys().ConnMeta(l.stay[0].id) }},
	{"instances", func(l *loss) string { return l.keys().Instances() }},
	{"index of rooms", func(l *loss) string { return l.keys().Rooms(0) }},
	{"format", func(l *loss) string { return l.keys().Format() }},
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
					// By default, single keys with each story, and pairs with one.
					chosen := (i+k)%len(lostAudiences) == audience && (j == 0 || (i*7+j*5)%len(lostStories) == k)
					if !chosen && !*lostAll || testing.Short() && j > 0 {
						continue
					}
					t.Run(a.name+" and "+b.name+", "+watched+", "+story.String(), func(t *testing.T) {
						t.Parallel()
						embedded(t, func(t *testing.T, w *world) { newLoss(t, w, audience).run(story, a, b) })
					})
				}
			}
		}
	}
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
				w := &world{t: t, real: server, prefix: fmt.Sprintf("app%d:", i)}
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
			embedded(t, func(t *testing.T, w *world) {
				l := newLoss(t, w, len(lostAudiences)-1)
				require.NoError(t, l.admin.Del(t.Context(), key.of(l), lostKeys[0].of(l)).Err())
				all := append([]*peer{l.goes}, l.stay...)
				for _, p := range all {
					p.close()
				}
				l.sleep(time.Second)
				for i, watcher := range l.watchers {
					leaves := 0
					for _, u := range watcher.got()[l.told[i]:] {
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
	*world
	t        *testing.T
	admin    redis.UniversalClient
	servers  []*testServer
	stay     []*peer // of the first server, then of the second
	goes     *peer   // of the first server
	comes    *peer   // of the second server, in no room yet
	watchers []*peer
	told     []int // updates of each watcher before the loss
}

func newLoss(t *testing.T, w *world, audience int) *loss {
	l := &loss{world: w, t: t, admin: w.client()}
	for range 2 {
		s := w.tracked(leaseOf(3*lostBeat), allowMetadata)
		require.NoError(t, s.TrackPresence(Exact(lostTimed), PresenceOptions{TTL: time.Minute}))
		l.servers = append(l.servers, s)
		for range 3 {
			l.stay = append(l.stay, s.dial())
		}
	}
	l.goes = l.stay[2]
	l.stay = slices.Delete(l.stay, 2, 3)
	l.comes = l.servers[1].dial()
	for i, p := range append([]*peer{l.goes}, l.stay...) {
		p.join(lostPlain)
		p.join(lostTimed)
		require.NoError(t, l.servers[0].Connections().SetMetadata(t.Context(), p.id, map[string]int{"n": i}, MetadataOptions{}))
	}
	l.stay[0].state(lostPlain, json.RawMessage(busyState))
	l.stay[1].state(lostTimed, json.RawMessage(typingState), map[string]any{"expireAfter": 600_000})
	l.goes.state(lostPlain, json.RawMessage(goingState))
	for _, s := range l.servers[:audience] {
		p := s.dial()
		p.subscribe(lostPlain)
		p.subscribe(lostTimed)
		l.watchers = append(l.watchers, p)
	}
	w.sleep(4 * lostBeat) // servers compare everything once after their start
	for _, p := range l.watchers {
		l.told = append(l.told, len(p.got()))
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
		l.comes.join(lostPlain)
		l.comes.join(lostTimed)
		l.stay = append(l.stay, l.comes)
	}
	if story.closes {
		l.goes.close()
	} else {
		l.stay = append(l.stay, l.goes)
	}
	l.eventually(2*lostBeat+l.unhurried(300*time.Millisecond), func() bool { return l.wrong() == "" }, "%s", stringer(l.wrong))
	l.t.Logf("restored after %v", time.Since(lost))
	l.sleep(6 * lostBeat) // time for late or superfluous events
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
		if k.of != nil && strings.Contains(key, l.goes.id) && !slices.Contains(l.stay, l.goes) {
			continue
		}
		if l.admin.Exists(ctx, key).Val() == 0 {
			return k.name + ": " + key + " is missing"
		}
	}
	ids := make([]string, len(l.stay))
	for i, p := range l.stay {
		ids[i] = p.id
	}
	slices.Sort(ids)
	for _, room := range []string{lostPlain, lostTimed} {
		if diff := l.wrongRoom(ctx, room, ids); diff != "" {
			return room + ": " + diff
		}
	}
	page, err := l.servers[0].Rooms().List(ctx, RoomQuery{})
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
		entries, err3 := s.Rooms().Entries(ctx, room, EntryQuery{})
		if err != nil || err2 != nil || err3 != nil || n != len(ids) || len(entries.Entries) != len(ids) {
			return fmt.Sprintf("%d counted, %d entries: %v %v %v", n, len(entries.Entries), err, err2, err3)
		}
		var got []string
		for _, m := range members {
			got = append(got, m.ID)
			want := ""
			switch {
			case m.ID == l.stay[0].id && room == lostPlain:
				want = busyState
			case m.ID == l.stay[1].id && room == lostTimed:
				want = typingState
			case m.ID == l.goes.id && room == lostPlain:
				want = goingState
			}
			if string(m.State) != want || (m.ID != l.comes.id) != (len(m.Metadata) > 0) {
				return fmt.Sprintf("%s has state %s, metadata %s", m.ID, m.State, m.Metadata)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, ids) {
			return fmt.Sprintf("members %v, not %v", got, ids)
		}
		position := l.admin.Get(ctx, l.keys().Seq(room)).Val()
		_, rest, _ := strings.Cut(position, " "+s.n.lease.Incarnation()+" ")
		mine := 0
		_, _ = fmt.Sscan(rest, &mine)
		if len(s.n.owner.InRoom(room)) != mine {
			return fmt.Sprintf("server %d has %d, counted in %q", i, len(s.n.owner.InRoom(room)), position)
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
			for _, u := range p.got()[l.told[i]:] {
				if u.RoomName == room {
					got = append(got, u.Type+" "+u.ConnectionID)
				}
			}
			var want []string
			if story.joins {
				want = append(want, "join "+l.comes.id)
			}
			if story.closes {
				want = append(want, "leave "+l.goes.id)
			}
			assert.ElementsMatch(l.t, want, got, "watcher %d of %s: %v", i, room, p.got()[l.told[i]:])
			assert.Len(l.t, p.subscribe(room).ids(l.t), len(l.stay), "watcher %d of %s", i, room)
		}
	}
}

// sends checks that a frame for a room reaches all members.
func (l *loss) sends() {
	for _, room := range []string{lostPlain, lostTimed} {
		require.NoError(l.t, l.servers[0].Rooms().Send(l.t.Context(), room, "note-"+room, json.RawMessage(`1`)))
		for i, p := range l.stay {
			l.eventually(time.Second+l.unhurried(0), func() bool { return p.pushed("note-"+room) == 1 }, "member %d of %s gets the frame", i, room)
		}
	}
}

// leaves ends everything, after which only keys with a TTL may be left.
func (l *loss) leaves() {
	for _, p := range append(append(l.stay, l.comes, l.goes), l.watchers...) {
		p.close()
	}
	l.sleep(lostBeat / 2)
	for _, s := range l.servers {
		s.shutdown()
	}
	for _, key := range l.admin.Keys(l.t.Context(), l.keys().prefix+"*").Val() {
		if key != l.keys().Format() && l.admin.PTTL(l.t.Context(), key).Val() == -1 {
			l.t.Errorf("left in Redis: %s", key)
		}
	}
}
