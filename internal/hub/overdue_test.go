package hub

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

// A mirror reports a kept place that should have ended, as often as it compares its room,
// and no member that is connected, that left, or whose time is not over.
func TestOverduePlaces(t *testing.T) {
	t.Parallel()
	var ms members
	rec := func(conn string, until int64) *store.Record {
		r := &store.Record{Conn: conn, Entry: "e-" + conn, Incarnation: "i"}
		if until > 0 {
			r.Incarnation, r.KeptUntil, r.KeptCause = store.NoOwner, until, store.CauseLost
		}
		return r
	}
	put := func(conn string, until int64) {
		r := rec(conn, until)
		ms.put(newMember(r), r.KeptUntil)
	}
	put("here", 0)
	put("late", 5)
	put("later", 50)
	put("back", 5)
	put("back", 0)
	put("gone", 5)
	ms.remove("gone")
	assert.Equal(t, []Overdue{{Conn: "late", Entry: "e-late", Until: 5}}, ms.overdue(10))
	ev := &store.Event{Type: store.Disconnected, Record: *rec("here", 7)}
	ms.change(ev)
	assert.Len(t, ms.overdue(10), 2)
	assert.Empty(t, ms.overdue(5))
}

// The hub reports overdue places at its regular comparisons.
func TestOverduePlacesAreReported(t *testing.T) {
	got := make(chan string, 100)
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.joinAs(room, "a", "ann", "")
		h.redis.disconnect(room, "a", store.CauseClosed) // kept for 5 s
		h.watch()
		h.sleep(10 * time.Second)
		assert.Empty(t, got)
		h.sleep(20 * time.Second)
		assert.NotEmpty(t, got)
		assert.Equal(t, room+" a", <-got)
	}, countUsers, func(c *Config) { c.Overdue = func(room string, o Overdue) { got <- room + " " + o.Conn } })
}
