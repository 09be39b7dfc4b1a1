package browsertest

import (
	"testing"

	"github.com/meshpresence/mesh/internal/redistest"
)

// world is two servers on one Redis, and a browser for each. Ann's tabs use the first
// server, Bob's the second.
type world struct {
	redis    *redistest.Server
	one, two *server
	ann, bob *browser
}

func newWorld(t testing.TB) *world {
	t.Helper()
	path := chromium(t)
	w := &world{redis: redistest.Start(t)}
	w.one, w.two = newServer(t, w.redis), newServer(t, w.redis)
	w.ann, w.bob = newBrowser(t, path), newBrowser(t, path)
	for _, tab := range []*tab{
		w.ann.open(t, "Ann", w.one.url("room=hall"), desktop),
		w.bob.open(t, "Bob", w.two.url("room=hall"), desktop),
	} {
		tab.rename(tab.name)
		tab.clean(false)
		tab.close()
	}
	return w
}

// meet opens a tab for Ann and one for Bob in a room, and returns when each sees the
// other.
func (w *world) meet(t testing.TB, room string) (ann, bob *tab) {
	t.Helper()
	ann = w.ann.open(t, "Ann", w.one.url("room="+room), desktop)
	bob = w.bob.open(t, "Bob", w.two.url("room="+room), smaller)
	for _, tab := range []*tab{ann, bob} {
		tab.await(`rows("Ann").length === 1 && rows("Bob").length === 1 && all("#people li").length === 2`)
	}
	return ann, bob
}

// settle returns when these tabs have shown everything that happened in a room until now.
// A new person joins and is seen. The page collects toasts with a timer, which was
// started before the timer here.
func (w *world) settle(t testing.TB, room string, tabs ...*tab) {
	t.Helper()
	p := newPerson(t, w.one, "")
	p.join(room, map[string]any{"name": "Zed"})
	for _, tab := range tabs {
		tab.await(`rows("Zed").length === 1`)
		get[int](tab, `window.settled = 0, setTimeout(() => window.settled = 1, 500)`)
		tab.await(`window.settled === 1`)
	}
	p.Kill()
	for _, tab := range tabs {
		tab.await(`rows("Zed").length === 0`)
	}
}

func TestPage(t *testing.T) {
	w := newWorld(t)
	t.Run("two people", w.twoPeople)
	t.Run("tabs of one user", w.tabsOfOneUser)
	t.Run("rooms", w.rooms)
	t.Run("hostile", w.hostile)
	t.Run("phone", w.phone)
	t.Run("dark", w.dark)
	t.Run("killed server", w.killedServer)
	t.Run("redis away", w.redisAway) // last: servers declare no others dead for a while after it
}
