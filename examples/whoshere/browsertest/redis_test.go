package browsertest

import (
	"testing"

	"github.com/chromedp/chromedp"
)

// redisAway: the page says that what it shows may be out of date, nobody is
// said to have left, and all is well again when Redis is back.
func (w *world) redisAway(t *testing.T) {
	const room = "away"
	ann, bob := w.meet(t, room)
	w.redis.Pause()
	ann.run(chromedp.Focus(chromedp.ID("draft")), chromedp.KeyEvent("hello"))
	ann.await(`status() === "stale" && !document.getElementById("notice").hidden && rows("Bob").length === 1`)
	ann.shot("stale")
	w.redis.Resume()
	ann.await(`status() === "live" && document.getElementById("notice").hidden`)
	ann.run(chromedp.KeyEvent("hello"))
	bob.await(`text("typing-text") === "Ann is typing"`)
	w.settle(t, room, ann, bob)
	for _, tab := range []*tab{ann, bob} {
		if n := get[int](tab, `seen.gone.length + seen.toasts.filter(({kind}) => kind === "leave").length`); n != 0 {
			t.Errorf("%s: %d were said to have left", tab.name, n)
		}
		tab.clean(false)
	}
}
