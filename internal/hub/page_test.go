package hub

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// page returns a page for a sink, and the connections on it.
func (h *harness) page(sink Sink, at PageCursor, limit int) (p Page, conns []string) {
	h.t.Helper()
	require.True(h.t, h.hub.Page(room, sink, at, limit, func(got Page) { p = got }))
	var list []struct{ ID string }
	require.NoError(h.t, json.Unmarshal(p.Present.Append(nil), &list))
	for _, m := range list {
		conns = append(conns, m.ID)
	}
	return p, conns
}

func TestPages(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		for i := range 7 {
			h.redis.join(room, fmt.Sprint("c", i), withState(fmt.Sprint(i), false))
		}
		s := h.watch()
		p, conns := h.page(s, PageCursor{}, 3)
		assert.Equal(t, []string{"c4", "c5", "c6"}, conns)
		assert.Equal(t, `{"c4":4,"c5":5,"c6":6}`, string(p.States))
		assert.Equal(t, 7, p.Total)
		assert.EqualValues(t, 7, p.Seq)
		assert.False(t, p.Stale || p.Restart)
		_, conns = h.page(s, p.Next, 3)
		assert.Equal(t, []string{"c1", "c2", "c3"}, conns)
		again, conns := h.page(s, p.Next, 4)
		assert.Equal(t, []string{"c0", "c1", "c2", "c3"}, conns)
		assert.False(t, again.More)
		assert.Zero(t, again.Next)

		// The last members leave, so that fewer are left than the cursor says.
		h.send(h.redis.leave(room, "c6"), h.redis.leave(room, "c5"), h.redis.leave(room, "c4"), h.redis.leave(room, "c3"))
		_, conns = h.page(s, p.Next, 1000)
		assert.Equal(t, []string{"c0", "c1", "c2"}, conns)
		_, conns = h.page(s, PageCursor{List: p.Next.List, Left: 1 << 40}, 1000)
		assert.Len(t, conns, 3, "such a cursor was never given")
		h.send(h.redis.leave(room, "c0"), h.redis.leave(room, "c1"), h.redis.leave(room, "c2"))
		p, conns = h.page(s, p.Next, 1)
		assert.Empty(t, conns)
		assert.False(t, p.More)
		assert.Equal(t, "[] {}", fmt.Sprintf("%s %s", p.Present.Append(nil), p.States))
	})
}

func TestPageOfOthers(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		never := func(Page) { t.Error("a page") }
		assert.False(t, h.hub.Page(room, h.newSink(), PageCursor{}, 1, never), "no mirror")
		s := h.watch()
		assert.False(t, h.hub.Page(room, h.newSink(), PageCursor{}, 1, never), "another sink")
		h.hub.Unwatch(room, s)
		assert.False(t, h.hub.Page(room, s, PageCursor{}, 1, never), "it does not watch any more")
		h.listener.silent = true
		early := h.newSink()
		require.NoError(t, h.hub.WatchNow("elsewhere", early, func(View) {}))
		assert.False(t, h.hub.Page("elsewhere", early, PageCursor{}, 1, never), "not read yet")
	})
}

// After the mirror has read the room again, its members may be in another order.
func TestPagesOfARepairedMirror(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		for i := range 6 {
			h.redis.join(room, fmt.Sprint("c", i))
		}
		s := h.watch()
		p, _ := h.page(s, PageCursor{}, 2)
		h.hub.HandleDisconnect()
		next, _ := h.page(s, p.Next, 2)
		assert.True(t, next.Stale)
		assert.False(t, next.Restart)
		h.redis.join(room, "missed")
		h.hub.HandleSubscribed(room, true)
		h.sleep(time.Second)
		next, conns := h.page(s, next.Next, 3)
		assert.True(t, next.Restart)
		assert.False(t, next.Stale)
		assert.Len(t, conns, 3)
		next, _ = h.page(s, next.Next, 3)
		assert.False(t, next.Restart)
		assert.True(t, next.More)
	})
}

func TestPageOfLargeMembers(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		for i := range 4 {
			h.redis.join(room, fmt.Sprint("c", i), withState(`"`+strings.Repeat("x", pageBytes*2/3)+`"`, false))
		}
		s := h.watch()
		p, conns := h.page(s, PageCursor{}, 100)
		assert.Len(t, conns, 2)
		p, conns = h.page(s, p.Next, 100)
		assert.Len(t, conns, 2)
		assert.False(t, p.More)
	})
}

// Others come and go while pages are read. Each member that is there all the time is on a
// page.
func TestPagesMissNoMember(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		for seed := range uint64(200) {
			rng := rand.New(rand.NewPCG(seed, 1))
			present, stays := make(map[string]bool), make(map[string]bool)
			step := func() {
				conn := fmt.Sprint("c", rng.IntN(40))
				if present[conn] {
					h.send(h.redis.leave(room, conn))
					delete(stays, conn)
				} else {
					h.send(h.redis.join(room, conn))
				}
				present[conn] = !present[conn]
			}
			s := h.watch()
			for range rng.IntN(60) {
				step()
			}
			for conn, in := range present {
				if in {
					stays[conn] = true
				}
			}
			seen := make(map[string]bool)
			for p, first := (Page{More: true}), true; p.More; first = false {
				var conns []string
				p, conns = h.page(s, p.Next, 1+rng.IntN(5))
				require.False(t, p.Restart && !first)
				for _, conn := range conns {
					require.True(t, present[conn], "a member that has left")
					seen[conn] = true
				}
				for range rng.IntN(6) {
					step()
				}
			}
			for conn := range stays {
				require.True(t, seen[conn], "seed %d: %s is missing", seed, conn)
			}
			h.hub.Unwatch(room, s)
			for conn, in := range present {
				if in {
					h.send(h.redis.leave(room, conn))
				}
			}
		}
	})
}
