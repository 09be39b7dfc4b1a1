package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/meshtest"
)

// listed are the pages of a room.
type listed struct {
	members  map[string]int // connection id -> number of pages
	states   map[string]string
	pages    int
	restarts int
	last     meshtest.Snapshot
}

// listAll reads all pages from a cursor on. each is called after each page but the last.
func listAll(t *testing.T, p *harness.Peer, room, cursor string, limit int, each func(page int)) listed {
	t.Helper()
	got := listed{members: make(map[string]int), states: make(map[string]string)}
	for {
		s := p.Client.ListPresence(room, cursor, limit)
		require.True(t, s.Success)
		if s.Restart {
			got.restarts++
		}
		for _, m := range s.Present {
			got.members[m.ID]++
		}
		for id, state := range s.States {
			got.states[id] = string(state)
		}
		got.pages++
		if got.last = s; s.Next == "" {
			return got
		}
		require.LessOrEqual(t, got.pages, 1000)
		if each != nil {
			each(got.pages)
		}
		cursor = s.Next
	}
}

// fill writes members c0000, c0001, … of a room.
func fill(w *harness.World, room string, n int) {
	ops := make([]store.Op, n)
	for i := range ops {
		ops[i] = store.Op{
			Kind: store.OpJoin, Room: room, Conn: fmt.Sprintf("c%04d", i), Entry: "e", MetaVersion: 1, Meta: fmt.Appendf(nil, `{"n":%d}`, i),
			StateVersion: 1, State: fmt.Appendf(nil, `{"s":%d}`, i),
		}
	}
	w.Fill(ops)
}

func TestListOfALargeRoom(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const members = 1234
		s := w.Tracked()
		fill(w, "large", members)
		subscriber, other := s.Dial(), s.Dial()
		require.Len(t, subscriber.Client.Subscribe("large").Present, 1000)
		for name, p := range map[string]*harness.Peer{"mirror": subscriber, "Redis": other} {
			got := listAll(t, p, "large", "", 100, nil)
			require.Len(t, got.members, members, name)
			require.Len(t, got.states, members, name)
			require.Zero(t, got.restarts, name)
			require.Equal(t, `{"s":77}`, got.states["c0077"], name)
			require.Equal(t, members, got.last.Total, name)
			require.NotEmpty(t, got.last.Epoch, name)
			require.EqualValues(t, members, got.last.Seq, name)
			require.Zero(t, got.last.Users, name)
			require.GreaterOrEqual(t, got.pages, members/150, name)

			first := p.Client.ListPresence("large", "", 0)
			require.InDelta(t, 100, len(first.Present), 50, name)
			var meta struct{ N int }
			require.NoError(t, json.Unmarshal(first.Present[0].Metadata, &meta))
			require.Equal(t, fmt.Sprintf("c%04d", meta.N), first.Present[0].ID)
			require.False(t, first.Present[0].JoinedAt.IsZero())
		}
		require.Equal(t, 13, listAll(t, subscriber, "large", "", 100, nil).pages)
		require.Equal(t, 2, listAll(t, subscriber, "large", "", 1000, nil).pages)
	})
}

func TestListOfASmallRoom(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		a, b := s.Dial(), s.Dial()
		require.Empty(t, a.Client.ListPresence("lobby", "", 0).Present)
		a.Join("lobby")
		b.Join("lobby")
		require.Equal(t, "true", a.State("lobby", map[string]any{"n": 1}))
		a.Subscribe("lobby")
		for _, p := range []*harness.Peer{a, b} {
			got := listAll(t, p, "lobby", "", 1000, nil)
			require.Equal(t, map[string]int{a.ID: 1, b.ID: 1}, got.members)
			require.Equal(t, map[string]string{a.ID: `{"n":1}`}, got.states)
			one := listAll(t, p, "lobby", "", 1, nil)
			require.Len(t, one.members, 2)
			require.GreaterOrEqual(t, one.pages, 2) // Redis may return empty pages
		}
		text := string(b.Call("mesh/list-presence", map[string]any{"roomName": "nobody"}))
		require.JSONEq(t, `{"success":true,"present":[],"states":{},"total":0}`, text)
	})
}

// A page has at most as many members as other answers may list.
func TestListKeepsTheLimitOfAnswers(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.Limits.SnapshotMembers = 10 })
		fill(w, "large", 50)
		p := s.Dial()
		require.LessOrEqual(t, len(p.Client.ListPresence("large", "", 1000).Present), 15)
		p.Subscribe("large")
		require.Len(t, p.Client.ListPresence("large", "", 1000).Present, 10)
		require.Len(t, listAll(t, p, "large", "", 1000, nil).members, 50)
	})
}

func TestListWhileMembersComeAndGo(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		var stay, go1 []*harness.Peer
		for range 12 {
			p, q := s.Dial(), s.Dial()
			p.Join("lobby")
			q.Join("lobby")
			stay, go1 = append(stay, p), append(go1, q)
		}
		subscriber, other := s.Dial(), s.Dial()
		subscriber.Subscribe("lobby")
		for _, p := range []*harness.Peer{subscriber, other} {
			got := listAll(t, p, "lobby", "", 3, func(page int) {
				q := go1[page%len(go1)]
				q.Leave("lobby")
				q.Join("lobby")
				go1[(page+5)%len(go1)].Leave("lobby")
			})
			for _, member := range stay {
				require.Contains(t, got.members, member.ID)
			}
			for _, q := range go1 {
				q.Join("lobby")
			}
		}
	})
}

// TestListIsInOrderWithUpdates changes the room while a subscriber reads pages. Each page
// must show the room exactly as the updates before it have left it.
func TestListIsInOrderWithUpdates(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		a, subscriber := s1.Dial(), s2.Dial()
		a.Join("lobby")
		id := int64(5000)
		send := func(p *harness.Peer, command string, payload map[string]any) {
			id++
			payload["roomName"] = "lobby"
			require.NoError(t, p.Send(map[string]any{"id": id, "command": command, "payload": payload}))
		}
		// The first pages are asked for before the answer to the subscription has come, so
		// that updates wait for the end of its pause.
		send(subscriber, "mesh/subscribe-presence", map[string]any{})
		const pages = 60
		for n := range pages {
			send(a, "mesh/publish-presence-state", map[string]any{"state": map[string]any{"n": n}})
			send(subscriber, "mesh/list-presence", map[string]any{})
		}
		frames := func() []harness.Frame {
			subscriber.Mu.Lock()
			defer subscriber.Mu.Unlock()
			return append([]harness.Frame(nil), subscriber.Frames...)
		}
		answers := func() (n int) {
			for _, f := range frames() {
				if f.ID != nil && f.Command == "mesh/list-presence" {
					n++
				}
			}
			return n
		}
		w.Eventually(10*time.Second, func() bool { return answers() == pages }, "all pages")
		known, seq, subscribed := "", uint64(0), false
		for _, f := range frames() {
			var answer struct {
				Seq    uint64
				States map[string]json.RawMessage
				State  json.RawMessage
			}
			switch {
			case f.Command == "mesh/subscribe-presence" && f.ID != nil:
				subscribed = true
				require.NoError(t, json.Unmarshal(f.Payload, &answer))
				known, seq = string(answer.States[a.ID]), answer.Seq
			case f.Command == "mesh/presence-update":
				require.NoError(t, json.Unmarshal(f.Payload, &answer))
				known, seq = string(answer.State), answer.Seq
			case f.Command == "mesh/list-presence" && f.ID != nil:
				require.True(t, subscribed)
				require.NoError(t, json.Unmarshal(f.Payload, &answer))
				require.Equal(t, known, string(answer.States[a.ID]))
				require.Equal(t, seq, answer.Seq)
			}
		}
	})
}

func TestListRestarts(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		fill(w, "lobby", 40)
		p, q := s1.Dial(), s2.Dial()
		p.Subscribe("lobby")
		q.Subscribe("lobby")
		fromRedis := s1.Dial().Client.ListPresence("lobby", "", 10)
		fromMirror := p.Client.ListPresence("lobby", "", 10)
		require.False(t, fromRedis.Restart || fromMirror.Restart)
		for name, from := range map[string]struct {
			peer   *harness.Peer
			cursor string
		}{
			"another server": {q, fromMirror.Next}, "now subscribed": {p, fromRedis.Next}, "no longer subscribed": {s1.Dial(), fromMirror.Next},
		} {
			got := listAll(t, from.peer, "lobby", from.cursor, 10, nil)
			require.Equal(t, 1, got.restarts, name)
			require.Len(t, got.members, 40, name)
		}
		got := listAll(t, s2.Dial(), "lobby", fromRedis.Next, 10, nil)
		require.Zero(t, got.restarts, "the same Redis process, through another server")
		require.Len(t, got.members, 40-len(fromRedis.Present))
		if w.Mem != nil {
			w.Mem.NewRunID()
			w.Sleep(time.Millisecond)
			got := listAll(t, s2.Dial(), "lobby", fromRedis.Next, 10, nil)
			require.Equal(t, 1, got.restarts)
			require.Len(t, got.members, 40)
		}
	})
}

func TestListIsRefused(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		var allowed atomic.Bool
		s := w.Server()
		s.Track("^lobby$", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) { return allowed.Load(), nil }})
		a := s.Dial()
		a.Join("lobby")
		for _, room := range []string{"lobby", "untracked"} {
			require.JSONEq(t, `{"success":false,"present":[]}`, string(a.Call("mesh/list-presence", map[string]any{"roomName": room})))
		}
		allowed.Store(true)
		require.NoError(t, s.Rooms().Recheck(t.Context(), "lobby"))
		require.True(t, a.Client.ListPresence("lobby", "", 0).Has(a.ID))
		require.True(t, a.Subscribe("lobby").Success)
		require.True(t, a.Client.ListPresence("lobby", "", 0).Has(a.ID))
		allowed.Store(false)
		require.NoError(t, s.Rooms().Recheck(t.Context(), "lobby"))
		require.JSONEq(t, `{"success":false,"present":[]}`, string(a.Call("mesh/list-presence", map[string]any{"roomName": "lobby"})))
		w.Eventually(5*time.Second, func() bool { return a.EndedRoom("lobby") }, "the subscription ends")
	})
}

func TestInvalidLists(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		p := w.Tracked().Dial()
		encode := base64.RawURLEncoding.EncodeToString
		for _, bad := range []map[string]any{
			{"limit": 0}, {"limit": 1001}, {"limit": 1.5}, {"limit": "x"}, {"limit": -1}, {"roomName": ""},
			{"cursor": "x"}, {"cursor": "€"}, {"cursor": encode([]byte("r1.zz"))}, {"cursor": encode([]byte(".1.a"))}, {"cursor": encode([]byte("r1.-1.a"))},
			{"cursor": encode([]byte("ABC.1.0"))}, {"cursor": encode([]byte("ABC.1.x"))}, {"cursor": strings.Repeat("a", 1025)}, {"cursor": 7},
		} {
			if _, ok := bad["roomName"]; !ok {
				bad["roomName"] = "lobby"
			}
			var answer struct{ Code string }
			require.NoError(t, json.Unmarshal(p.Call("mesh/list-presence", bad), &answer))
			require.Equal(t, "EINVALID", answer.Code, bad)
		}
	})
}

func TestListWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		fill(w, "lobby", 5)
		subscriber, other := s.Dial(), s.Dial()
		subscriber.Subscribe("lobby")
		w.Away()
		w.Eventually(5*time.Second, func() bool { return subscriber.Client.ListPresence("lobby", "", 3).Stale }, "stale")
		require.Len(t, listAll(t, subscriber, "lobby", "", 3, nil).members, 5)
		var answer struct{ Code string }
		require.NoError(t, json.Unmarshal(other.Call("mesh/list-presence", map[string]any{"roomName": "lobby"}), &answer))
		require.Equal(t, "EUNAVAILABLE", answer.Code)
		w.Back()
		w.Eventually(20*time.Second, func() bool { return !subscriber.Client.ListPresence("lobby", "", 3).Stale }, "not stale")
	})
}
