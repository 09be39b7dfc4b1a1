package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// counted subscribes a peer to the numbers of rooms. It returns the answer for each room,
// without its position.
func counted(p *harness.Peer, rooms ...string) map[string]string {
	p.T.Helper()
	var answer struct{ Rooms map[string]json.RawMessage }
	got := p.Call("mesh/subscribe-occupancy", map[string]any{"roomNames": rooms})
	require.NoError(p.T, json.Unmarshal(got, &answer), "%s", got)
	texts := map[string]string{}
	for room, o := range answer.Rooms {
		texts[room] = withoutPosition(o)
	}
	return texts
}

// withoutPosition returns numbers as text, without seq and epoch.
func withoutPosition(o json.RawMessage) string {
	text := string(o)
	if i := strings.Index(text, `,"seq"`); i > 0 {
		rest := strings.SplitN(text[i+1:], ",", 2)[1] // from epoch on
		text = text[:i] + rest[strings.IndexAny(rest, ",}"):]
	}
	return text
}

// pushedNumbers returns the pushes of numbers that a peer has got, as text.
func pushedNumbers(p *harness.Peer) (texts []string) {
	for _, f := range p.PushesOf("mesh/occupancy") {
		texts = append(texts, withoutPosition(f.Payload))
	}
	return texts
}

// numbersOf is the text of one push.
func numbersOf(room string, n int) string {
	return fmt.Sprintf(`{"roomName":%q,"connections":%d}`, room, n)
}

func TestOccupancy(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		near, far := w.Tracked(), w.Tracked()
		p, member := near.Dial(), far.Dial()
		member.Join("full")
		require.Equal(t, map[string]string{
			"full": `{"success":true,"connections":1}`, "empty": `{"success":true,"connections":0}`,
		}, counted(p, "full", "empty", "full"))
		require.Equal(t, 2, near.Stats().Occupancies)
		require.Zero(t, near.Stats().Watched, "a mirror")

		// At one position the numbers are those of a list.
		view := member.Subscribe("full")
		f := p.Call("mesh/subscribe-occupancy", map[string]any{"roomNames": []string{"full"}})
		require.JSONEq(t, fmt.Sprintf(`{"rooms":{"full":{"success":true,"connections":1,"seq":%d,"epoch":%q}}}`, view.Seq, view.Epoch), string(f))

		other := far.Dial()
		other.Join("empty")
		other.Join("full")
		w.Eventually(5*time.Second, func() bool { return len(pushedNumbers(p)) == 2 }, "numbers")
		require.ElementsMatch(t, []string{numbersOf("empty", 1), numbersOf("full", 2)}, pushedNumbers(p))
		last := member.Expect(time.Second, "join", other.ID)
		for _, f := range p.PushesOf("mesh/occupancy") {
			if strings.Contains(string(f.Payload), `"full"`) {
				require.JSONEq(t, fmt.Sprintf(`{"roomName":"full","connections":2,"seq":%d,"epoch":%q}`, last.Seq, last.Epoch), string(f.Payload))
			}
		}

		require.Equal(t, "true", p.Asked("mesh/unsubscribe-occupancy", map[string]any{"roomNames": []string{"full"}}))
		require.Equal(t, "false", p.Asked("mesh/unsubscribe-occupancy", map[string]any{"roomNames": []string{"empty", "full"}}))
		require.Zero(t, near.Stats().Occupancies)
		other.Close()
		w.Eventually(5*time.Second, func() bool { return len(far.Present("full")) == 1 }, "leave")
		w.Sleep(2 * time.Second)
		require.Len(t, pushedNumbers(p), 2)
	})
}

// There is at most one push per room and interval. The last numbers always come, those of
// a room that gets its first member come at once, and those of an empty room come later.
func TestOccupancyInterval(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		s.Track("^slow", mesh.PresenceOptions{})
		require.NoError(t, s.TrackPresence(mesh.Exact("slow"), mesh.PresenceOptions{OccupancyInterval: 5 * time.Second}))
		p := s.Dial()
		counted(p, "fast", "slow")
		began := time.Now()
		peers := s.DialAll(20)
		for _, peer := range peers {
			peer.Join("fast")
			peer.Join("slow")
			w.Sleep(100 * time.Millisecond)
		}
		joined := int(time.Since(began)/time.Second) + 1
		w.Sleep(6 * time.Second)
		var fast, slow []string
		for _, text := range pushedNumbers(p) {
			if strings.Contains(text, "fast") {
				fast = append(fast, text)
			} else {
				slow = append(slow, text)
			}
		}
		require.Equal(t, []string{numbersOf("slow", 1), numbersOf("slow", 20)}, slow)
		require.Equal(t, numbersOf("fast", 1), fast[0])
		require.Equal(t, numbersOf("fast", 20), fast[len(fast)-1])
		require.LessOrEqual(t, len(fast), joined+1)

		// A room that flaps is pushed once: its last push is more than an interval old, and
		// it is not empty for an interval.
		before := len(pushedNumbers(p))
		counted(p, "flapping")
		flapping := peers[0]
		for range 30 {
			flapping.Join("flapping")
			w.Sleep(50 * time.Millisecond)
			flapping.Leave("flapping")
			w.Sleep(50 * time.Millisecond)
		}
		texts := pushedNumbers(p)[before:]
		require.NotEmpty(t, texts)
		require.NotContains(t, texts, numbersOf("flapping", 0))
		w.Sleep(3 * time.Second)
		texts = pushedNumbers(p)[before:]
		require.Equal(t, numbersOf("flapping", 0), texts[len(texts)-1])
		require.LessOrEqual(t, len(texts), 5)

		// A new interval is obeyed.
		require.NoError(t, s.TrackPresence(mesh.Exact("slow"), mesh.PresenceOptions{OccupancyInterval: 100 * time.Millisecond}))
		before = len(pushedNumbers(p))
		for _, peer := range peers[:5] {
			peer.Leave("slow")
			w.Sleep(500 * time.Millisecond)
		}
		require.Len(t, pushedNumbers(p)[before:], 5)
	})
}

func TestOccupancyOptions(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		p := w.Manager()
		for _, d := range []time.Duration{-1, time.Millisecond, time.Minute + 1} {
			err := p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{OccupancyInterval: d})
			require.ErrorIs(t, err, mesh.ErrInvalidOptions)
			require.ErrorContains(t, err, "PresenceOptions.OccupancyInterval")
		}
		for _, d := range []time.Duration{0, 100 * time.Millisecond, time.Minute} {
			require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{OccupancyInterval: d}))
		}
	})
}

// The OccupancyGuard of a room decides about its numbers, or else its Guard. Another answer
// ends a subscription.
func TestOccupancyGuard(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader)
		var list, asked harness.Register
		s.Track("^(list|both)$", mesh.PresenceOptions{Guard: list.Guard})
		require.NoError(t, s.TrackPresence(mesh.Exact("both"), mesh.PresenceOptions{OccupancyGuard: asked.Guard}))
		require.NoError(t, s.TrackPresence(mesh.Exact("numbers"), mesh.PresenceOptions{Guard: harness.Never, OccupancyGuard: asked.Guard}))
		require.NoError(t, s.TrackPresence(mesh.Exact("open"), mesh.PresenceOptions{Guard: harness.Never, OccupancyGuard: mesh.Everyone}))
		require.NoError(t, s.TrackPresence(mesh.Exact("failing"), mesh.PresenceOptions{OccupancyGuard: func(context.Context, mesh.Member, string) (bool, error) {
			return false, errors.New("database is away")
		}}))
		p, member := s.Dial(harness.Meta(harness.Visitor)), s.Dial(harness.Meta(harness.Admin))
		zero, refused := `{"success":true,"connections":0}`, `{"success":false,"code":"EREFUSED"}`
		require.Equal(t, map[string]string{
			"list": zero, "both": zero, "numbers": zero, "open": zero, "failing": refused, "untracked": `{"success":false,"code":"ENOTFOUND"}`,
		}, counted(p, "list", "both", "numbers", "open", "failing", "untracked"))
		require.False(t, p.Room("mesh/subscribe-presence", "numbers").Success)
		require.Equal(t, 2, list.Times(p.ID), "about list, and about both, of which this rule has no OccupancyGuard")
		require.Equal(t, 2, asked.Times(p.ID))

		asked.Set(p.ID, false)
		require.NoError(t, s.Rooms().Recheck(t.Context(), "both"))
		w.Eventually(5*time.Second, func() bool { return p.Pushed("mesh/occupancy-ended") == 1 }, "ended")
		require.JSONEq(t, `{"roomName":"both"}`, string(p.PushesOf("mesh/occupancy-ended")[0].Payload))
		require.Equal(t, map[string]string{"both": refused}, counted(p, "both"))
		require.Equal(t, 3, s.Stats().Occupancies)

		list.Set(p.ID, false)
		require.NoError(t, s.Connections().SetMetadata(t.Context(), p.ID, "new", mesh.MetadataOptions{}))
		w.Eventually(5*time.Second, func() bool { return p.Pushed("mesh/occupancy-ended") == 3 }, "ended")
		for _, room := range []string{"list", "both", "numbers", "open"} {
			member.Join(room)
		}
		w.Eventually(5*time.Second, func() bool { return len(pushedNumbers(p)) == 1 }, "numbers")
		w.Sleep(time.Second)
		require.Equal(t, []string{numbersOf("open", 1)}, pushedNumbers(p))

		// A room without a rule has no numbers.
		require.True(t, s.UntrackPresence(mesh.Exact("open")))
		w.Eventually(5*time.Second, func() bool { return p.Pushed("mesh/occupancy-ended") == 4 }, "ended")
	})
}

func TestOccupancyLimits(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.NoCommandLimit, harness.Limits(func(l *mesh.Limits) {
			l.OccupanciesPerConnection, l.NewRoomsPerMinute = 150, 30
		}))
		names := func(from, n int) (list []string) {
			for i := range n {
				list = append(list, fmt.Sprint("r", from+i))
			}
			return list
		}
		call := func(p *harness.Peer, rooms []string) string {
			got := p.Call("mesh/subscribe-occupancy", map[string]any{"roomNames": rooms})
			if strings.Contains(string(got), `"error"`) {
				return harness.Code(t, got)
			}
			return ""
		}
		p := s.Dial()
		require.Equal(t, "EINVALID", call(p, []string{}))
		require.Equal(t, "ELIMIT", call(p, names(0, 101)))
		require.Empty(t, call(p, names(0, 100)))
		require.Equal(t, "ELIMIT", call(p, names(100, 51)))
		require.Equal(t, 100, s.Stats().Occupancies, "nothing is half done")
		require.Empty(t, call(p, names(50, 100)), "some are subscribed to already")
		require.Equal(t, 150, s.Stats().Occupancies)
		require.Equal(t, "EINVALID", call(p, []string{"r0", ""}))
		require.Equal(t, "EINVALID", harness.Code(t, p.Call("mesh/subscribe-occupancy", map[string]any{"roomNames": "r0"})))
		require.Equal(t, "EINVALID", harness.Code(t, p.Call("mesh/unsubscribe-occupancy", map[string]any{})))
		require.Equal(t, "ELIMIT", harness.Code(t, p.Call("mesh/unsubscribe-occupancy", map[string]any{"roomNames": names(0, 101)})))

		// New rooms: ten times as many as NewRoomsPerMinute.
		for i := range 3 {
			p.Call("mesh/unsubscribe-occupancy", map[string]any{"roomNames": names(100*i, 100)})
			p.Call("mesh/unsubscribe-occupancy", map[string]any{"roomNames": names(100*i+50, 100)})
			got := call(p, names(150+i*60, 60))
			require.Equal(t, i == 2, got == "ELIMIT", "%d: %s", i, got)
		}
		w.Sleep(time.Minute)
		require.Empty(t, call(p, names(300, 40)))
	})
}

// While Redis is away, the last numbers are stale. When it is back, the true ones come.
func TestOccupancyWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		p, member := s.Dial(), s.Dial()
		member.Join("lobby")
		require.Equal(t, map[string]string{"lobby": `{"success":true,"connections":1}`}, counted(p, "lobby"))
		w.Away()
		w.Sleep(15 * time.Second)
		stale := `{"roomName":"lobby","connections":1,"stale":true}`
		require.Equal(t, []string{stale}, pushedNumbers(p))
		require.Equal(t, map[string]string{
			"lobby": `{"success":true,"connections":1,"stale":true}`, "unknown": `{"success":false,"code":"EUNAVAILABLE"}`,
		}, counted(p, "lobby", "unknown"))
		member.Close()
		w.Sleep(3 * time.Second)
		require.Len(t, pushedNumbers(p), 1)
		_, err := s.Presence().Occupancy(t.Context(), "lobby")
		require.ErrorIs(t, err, mesh.ErrUnavailable)
		w.Back()
		w.Sleep(20 * time.Second)
		texts := pushedNumbers(p)
		require.Equal(t, numbersOf("lobby", 0), texts[len(texts)-1])
		require.LessOrEqual(t, len(texts), 3)
		require.Equal(t, map[string]string{"unknown": `{"success":true,"connections":0}`}, counted(p, "unknown"))
	})
}

// When the last subscriber has gone, nothing is left.
func TestOccupancyLeavesNothing(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		c := w.Client()
		channels := func() int {
			names, err := c.PubSubChannels(t.Context(), w.Keys().EventsPrefix()+"*").Result()
			require.NoError(t, err)
			return len(names)
		}
		p, q := s.Dial(), s.Dial()
		counted(p, "a", "b")
		counted(q, "b")
		q.Subscribe("a")
		require.Equal(t, 2, channels())
		require.Equal(t, 3, s.Stats().Occupancies)
		p.Close()
		w.Sleep(time.Minute)
		require.Equal(t, 1, s.Stats().Occupancies)
		require.Equal(t, 2, channels(), "the other connection needs both")
		q.Close()
		w.Sleep(time.Minute)
		require.Zero(t, s.Stats().Occupancies)
		require.Zero(t, channels())
	})
}

// Lost data shows as the last numbers, and not as an empty room.
func TestOccupancyAfterDataLoss(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		p := s.Dial()
		s.DialAll(3, "lobby")
		counted(p, "lobby")
		require.NoError(t, w.Client().FlushAll(t.Context()).Err())
		w.Sleep(40 * time.Second)
		for _, text := range pushedNumbers(p) {
			require.Contains(t, text, `"connections":3`)
		}
		s.Dial().Join("lobby")
		w.Sleep(2 * time.Second)
		texts := pushedNumbers(p)
		require.Equal(t, numbersOf("lobby", 4), texts[len(texts)-1])
	})
}

func TestOccupancyOfTheApp(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		p, far := w.Manager(), w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		require.NoError(t, p.TrackPresence(mesh.Exact("hall"), mesh.PresenceOptions{Guard: harness.Never}))
		require.NoError(t, far.Connect(ctx, "a", nil))
		require.NoError(t, far.Join(ctx, "lobby", "a"))

		all, err := p.Occupancy(ctx, "lobby", "hall", "untracked", "lobby")
		require.NoError(t, err)
		require.Len(t, all, 3)
		require.Equal(t, mesh.Occupancy{Room: "hall"}, all["hall"])
		lobby := all["lobby"]
		require.NotEmpty(t, lobby.Epoch)
		require.Equal(t, mesh.Occupancy{Room: "lobby", Connections: 1, Seq: 1, Epoch: lobby.Epoch}, lobby)
		_, err = p.Occupancy(ctx, "lobby", "")
		require.ErrorIs(t, err, mesh.ErrInvalidRoom)
		all, err = p.Occupancy(ctx)
		require.NoError(t, err)
		require.Empty(t, all)

		var got []mesh.Occupancy
		for o, err := range p.SubscribeOccupancy(ctx, []string{"lobby", "hall", "lobby"}, mesh.SubscribeOptions{}) {
			if err != nil {
				require.ErrorIs(t, err, context.Canceled)
				break
			}
			switch got = append(got, o); len(got) {
			case 1:
				require.Equal(t, lobby, o)
			case 2:
				require.Equal(t, mesh.Occupancy{Room: "hall"}, o)
				require.Equal(t, 2, p.Stats().Occupancies)
				// The loop is slow. It gets only the last numbers.
				for i := range 5 {
					id := fmt.Sprint("slow", i)
					require.NoError(t, far.Connect(ctx, id, nil))
					require.NoError(t, far.Join(ctx, "lobby", id))
					w.Sleep(1100 * time.Millisecond)
				}
				w.Sleep(2 * time.Second)
			case 3:
				require.Equal(t, mesh.Occupancy{Room: "lobby", Connections: 6, Seq: 6, Epoch: lobby.Epoch}, o)
				cancel()
			}
		}
		require.Len(t, got, 3)
		w.Eventually(time.Second, func() bool { return p.Stats().Occupancies == 0 }, "the subscription is left")
	})
}

func TestOccupancyOfTheAppEnds(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		p := w.Manager()
		var register harness.Register
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{OccupancyGuard: register.Guard}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		var pairs atomic.Int64
		// ended ranges over a subscription to its end.
		ended := func(viewer string, rooms ...string) <-chan error {
			end := make(chan error, 1)
			go func() {
				var last error
				for _, err := range p.SubscribeOccupancy(ctx, rooms, mesh.SubscribeOptions{Viewer: viewer}) {
					pairs.Add(1)
					last = err
				}
				end <- last
			}()
			w.Sleep(time.Second)
			return end
		}
		require.NoError(t, <-ended(""))
		require.ErrorIs(t, <-ended("", "lobby", ""), mesh.ErrInvalidRoom)
		err := <-ended("", "lobby", "hall")
		require.ErrorIs(t, err, mesh.ErrNotTracked)
		require.ErrorContains(t, err, `"hall"`)
		require.ErrorIs(t, <-ended("unknown", "lobby"), mesh.ErrUnknownConnection)
		require.EqualValues(t, 3, pairs.Load())

		refused := ended("c", "lobby")
		register.Set("c", false)
		require.NoError(t, p.Recheck("c"))
		err = <-refused
		require.ErrorIs(t, err, mesh.ErrRefused)
		require.ErrorContains(t, err, `"lobby"`)
		require.ErrorIs(t, <-ended("c", "lobby"), mesh.ErrRefused)
		register.Set("c", true)
		require.NoError(t, p.Recheck("c"))
		closed := ended("c", "lobby")
		require.NoError(t, p.Disconnect(ctx, "c"))
		require.ErrorIs(t, <-closed, mesh.ErrClosed)

		untracked := ended("", "lobby")
		require.True(t, p.UntrackPresence(mesh.Exact("lobby")))
		require.ErrorIs(t, <-untracked, mesh.ErrNotTracked)
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		stopped := ended("", "lobby")
		assert.Equal(t, 1, p.Stats().Occupancies)
		w.Away()
		require.ErrorIs(t, <-ended("", "never-read", "lobby"), mesh.ErrNotTracked)
		require.NoError(t, p.TrackPresence(mesh.Exact("never-read"), mesh.PresenceOptions{}))
		unavailable := ended("", "never-read")
		w.Sleep(3 * time.Second)
		require.ErrorIs(t, <-unavailable, mesh.ErrUnavailable)
		w.Back()
		w.Sleep(10 * time.Second)
		require.NoError(t, p.Shutdown(ctx))
		require.ErrorIs(t, <-stopped, mesh.ErrClosed)
		_, err = p.Occupancy(ctx, "lobby")
		require.ErrorIs(t, err, mesh.ErrClosed)
	})
}

// Whatever happens, each client ends with the true numbers of its rooms. It gets nothing
// about others, no two pushes of a room within an interval, and no position twice with
// other numbers.
func TestOccupancyOfRandomHistories(t *testing.T) {
	t.Parallel()
	seeds := uint64(12)
	if harness.Light() {
		seeds = 3
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				newOccupancyHistory(w, seed).run(150)
			})
		})
	}
}

// occupancyHistory is a random history of two servers.
type occupancyHistory struct {
	*harness.World
	rnd     *rand.Rand
	servers []*harness.Server
	members []*harness.Peer
	viewers []*occupancyViewer
	at      map[string]string // numbers by room, epoch and seq
}

// occupancyViewer is a client that follows numbers.
type occupancyViewer struct {
	*harness.Peer
	has    map[string]string // numbers by room; only of subscribed ones
	last   map[string]time.Time
	looked int // pushes that check has seen
}

// roomNumbers is what an answer or a push says about a room.
type roomNumbers struct {
	Success     bool
	RoomName    string
	Connections int
	Seq         uint64
	Epoch       string
	Stale       bool
}

var historyRooms = []string{"a", "b", "c"}

func newOccupancyHistory(w *harness.World, seed uint64) *occupancyHistory {
	h := &occupancyHistory{World: w, rnd: rand.New(rand.NewPCG(seed, 7)), at: map[string]string{}}
	for range 2 {
		h.servers = append(h.servers, w.Tracked(harness.NoCommandLimit))
	}
	for i := range 4 {
		p := h.servers[i%2].Dial()
		h.viewers = append(h.viewers, &occupancyViewer{Peer: p, has: map[string]string{}, last: map[string]time.Time{}})
	}
	return h
}

func (h *occupancyHistory) room() string { return historyRooms[h.rnd.IntN(len(historyRooms))] }

// note notes the numbers of a position, and checks that they are those of before.
func (h *occupancyHistory) note(n *roomNumbers) {
	h.T.Helper()
	require.False(h.T, n.Stale)
	position := fmt.Sprint(n.RoomName, n.Epoch, n.Seq)
	numbers := fmt.Sprint(n.Connections)
	if before, ok := h.at[position]; ok && n.Epoch != "" {
		require.Equal(h.T, before, numbers, "at %s", position)
	}
	h.at[position] = numbers
}

// subscribe lets a viewer subscribe to a room.
func (h *occupancyHistory) subscribe(v *occupancyViewer, room string) {
	h.check(v)
	var answer struct{ Rooms map[string]roomNumbers }
	got := v.Call("mesh/subscribe-occupancy", map[string]any{"roomNames": []string{room}})
	require.NoError(h.T, json.Unmarshal(got, &answer), "%s", got)
	n := answer.Rooms[room]
	require.True(h.T, n.Success)
	n.RoomName = room
	h.note(&n)
	v.has[room] = fmt.Sprint(n.Connections)
	delete(v.last, room)
}

// check looks at the pushes that have come since the last check.
func (h *occupancyHistory) check(v *occupancyViewer) {
	h.T.Helper()
	pushes := v.PushesOf("mesh/occupancy")
	for _, f := range pushes[v.looked:] {
		var n roomNumbers
		require.NoError(h.T, json.Unmarshal(f.Payload, &n))
		require.Contains(h.T, v.has, n.RoomName, "not subscribed")
		numbers := fmt.Sprint(n.Connections)
		require.NotEqual(h.T, v.has[n.RoomName], numbers, "nothing has changed")
		h.note(&n)
		v.has[n.RoomName] = numbers
		if last, ok := v.last[n.RoomName]; ok {
			require.GreaterOrEqual(h.T, time.Since(last), 900*time.Millisecond, "of %s", n.RoomName)
		}
		v.last[n.RoomName] = time.Now()
	}
	v.looked = len(pushes)
}

// step does one random thing.
func (h *occupancyHistory) step() {
	v := h.viewers[h.rnd.IntN(len(h.viewers))]
	switch n := h.rnd.IntN(12); {
	case n < 2:
		h.subscribe(v, h.room())
	case n == 2:
		room := h.room()
		_, was := v.has[room]
		h.check(v)
		require.Equal(h.T, fmt.Sprint(was), v.Asked("mesh/unsubscribe-occupancy", map[string]any{"roomNames": []string{room}}))
		h.check(v) // a push may have come before the answer
		delete(v.has, room)
	case n < 5 || len(h.members) == 0:
		p := h.servers[h.rnd.IntN(2)].Dial()
		p.Join(h.room())
		h.members = append(h.members, p)
	case n < 9:
		p := h.members[h.rnd.IntN(len(h.members))]
		if room := h.room(); h.rnd.IntN(2) == 0 {
			p.Join(room)
		} else {
			p.Leave(room)
		}
	default:
		i := h.rnd.IntN(len(h.members))
		h.members[i].Close()
		h.members = append(h.members[:i], h.members[i+1:]...)
	}
}

func (h *occupancyHistory) run(steps int) {
	for range steps {
		h.step()
		for range h.rnd.IntN(8) {
			h.Sleep(100 * time.Millisecond)
			for _, v := range h.viewers {
				h.check(v)
			}
		}
	}
	for range 40 {
		h.Sleep(100 * time.Millisecond)
		for _, v := range h.viewers {
			h.check(v)
		}
	}
	truth, err := h.servers[0].Presence().Counts(h.T.Context(), historyRooms...)
	require.NoError(h.T, err)
	for _, v := range h.viewers {
		for room, numbers := range v.has {
			require.Equal(h.T, fmt.Sprint(truth[room]), numbers, "of %s", room)
		}
	}
	require.Equal(h.T, len(h.viewers[0].has)+len(h.viewers[2].has), h.servers[0].Stats().Occupancies)
}
