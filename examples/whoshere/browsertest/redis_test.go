package browsertest

import (
	"testing"
)

// redisAway checks that the page says that its data may be out of date, shows no leaves,
// and is live again when Redis is back.
func (w *world) redisAway(t *testing.T) {
	const room = "away"
	ann, bob := w.meet(t, room)
	w.redis.Pause()
	ann.awaitWhile(ann.types, `status() === "stale" && !document.getElementById("notice").hidden && rows("Bob").length === 1`)
	ann.shot("stale")
	w.redis.Resume()
	ann.await(`status() === "live" && document.getElementById("notice").hidden`)
	bob.awaitWhile(ann.types, `text("typing-text") === "Ann is typing"`)
	w.settle(t, room, ann, bob)
	for _, tab := range []*tab{ann, bob} {
		if n := get[int](tab, `seen.gone.filter(({name}) => name !== "Zed").length + toasts("leave", "Ann") + toasts("leave", "Bob")`); n != 0 {
			t.Errorf("%s: %d leaves were shown", tab.name, n)
		}
		tab.clean(false)
	}
}
