package hub

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestViews(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.hub.cfg.Listed = 5
		for i := range 20 {
			h.redis.join(room, fmt.Sprintf("c%02d", i), withState(`1`, false))
		}
		require.NoError(t, h.hub.Watch(t.Context(), room, &countingSink{}, func(View) {}))
		view := func() View {
			v, ok := h.hub.View(room)
			require.True(t, ok)
			return v
		}
		v := view()
		assert.Equal(t, 20, v.Total)
		assert.True(t, v.Bounded)
		assert.Len(t, v.Members(), 5)
		assert.Equal(t, `["c00","c01","c02","c03","c04"]`, string(v.IDs()))
		assert.Equal(t, `{"c00":1,"c01":1,"c02":1,"c03":1,"c04":1}`, string(v.States()))
		first := &v.States()[0]
		assert.Same(t, first, &view().States()[0], "encoded once")

		// Only members that are not listed change: c19 and c10 leave, d joins.
		h.send(h.redis.leave(room, "c19"), h.redis.join(room, "d"), h.redis.leave(room, "c10"), h.redis.state(room, "d", "2", false))
		assert.Equal(t, 19, view().Total)
		assert.Same(t, first, &view().States()[0], "no listed member has changed")
		assert.EqualValues(t, 24, view().Seq)

		h.send(h.redis.leave(room, "c00"))
		next := view()
		assert.Equal(t, 18, next.Total)
		assert.Equal(t, `["c18","c01","c02","c03","c04"]`, string(next.IDs()), "the last one takes its place")
		assert.Equal(t, `["c00","c01","c02","c03","c04"]`, string(v.IDs()), "a view does not change")
		h.send(h.redis.state(room, "c02", "", false))
		assert.Equal(t, `{"c18":1,"c01":1,"c03":1,"c04":1}`, string(view().States()))
		h.send(h.redis.meta(room, "c04", `"new"`))
		assert.Contains(t, text(view()), `{"id":"c04","metadata":"new","joinedAt":9466848000`)
		_, ok := h.hub.View("elsewhere")
		assert.False(t, ok)
		var none View
		assert.Equal(t, "[] {}", fmt.Sprintf("%s %s", none.IDs(), none.States()))
	})
}

// Invalid JSON, written to Redis by hand, counts as none. Otherwise a frame with a
// whole room would be unreadable.
func TestMembersWithBrokenJSON(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s := h.watch()
		for i, broken := range []string{`{`, `1,2`, "\"\xff\"", ` `, ``} {
			conn := fmt.Sprint("c", i)
			h.send(h.redis.join(room, conn, withState(broken, false)), h.redis.meta(room, conn, broken))
			v, ok := h.hub.View(room)
			require.True(t, ok)
			assert.Contains(t, text(v), `{"id":"`+conn+`","metadata":null,"joinedAt":9466848000`)
			assert.Equal(t, "{}", string(v.States()))
			assert.Nil(t, v.Members()[i].Meta())
			assert.Equal(t, []string{fmt.Sprintf(`join %s {"n":"%s"}`, conn, conn), "metadata " + conn}, s.takeLines())
			h.send(h.redis.state(room, conn, "1", false), h.redis.state(room, conn, broken, false))
			assert.Equal(t, []string{"state " + conn + " 1", "state " + conn}, s.takeLines())
		}
		for _, u := range s.updates {
			assert.True(t, json.Valid(u.Frame().Bytes()), "%s", u.Frame().Bytes())
		}
	})
}

// text returns the listed members as JSON.
func text(v View) string { return string(v.Present.Append(nil)) }
