package browsertest

import (
	"fmt"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
)

// twoPeople checks that two people see each other join, type, point and leave, across
// servers.
func (w *world) twoPeople(t *testing.T) {
	ann := w.ann.open(t, "Ann", w.one.url("room=two"), desktop)
	ann.await(`!document.getElementById("alone").hidden`)
	ann.shot("alone")
	bob := w.bob.open(t, "Bob", w.two.url("room=two"), smaller)
	bob.await(`rows("Ann").length === 1`)
	ann.await(`rows("Bob").length === 1 && toasts("join", "Bob") === 1 && document.getElementById("alone").hidden`)

	// The screens differ, but the place in the shared area is the same.
	at := get[[]float64](ann, `inArea(490, 485)`)
	bob.awaitWhile(func() {
		for i := range 20 {
			ann.point(300+float64(i)*10, 200+float64(i)*15)
		}
	}, fmt.Sprintf(`near(tip("Ann"), %v, %v)`, at[0], at[1]))
	bob.shot("cursor")
	ann.point(1200, 300) // the list of people is not in the shared area
	bob.await(`cursors("Ann").length === 0`)

	bob.awaitWhile(ann.types, `text("typing-text") === "Ann is typing" && rows("Ann")[0].classList.contains("typing")`)
	ann.run(chromedp.KeyEvent("\r"))
	bob.await(`text("typing-text") === "" && !rows("Ann")[0].classList.contains("typing")`)

	// A silent client clears nothing. Its states end when their time is over.
	cyd := newPerson(t, w.two, "")
	cyd.join("two", map[string]any{"name": "Cyd"})
	for _, tab := range []*tab{ann, bob} {
		tab.awaitWhile(func() {
			cyd.publish("two", map[string]any{"x": 0.25, "y": 0.75, "typing": true}, 3*time.Second)
		}, `near(tip("Cyd"), 0.25, 0.75) && text("typing-text") === "Cyd is typing"`)
	}
	for _, tab := range []*tab{ann, bob} {
		tab.await(`cursors("Cyd").length === 0 && text("typing-text") === "" && rows("Cyd").length === 1`)
	}

	bob.clean(false)
	bob.close()
	ann.await(`rows("Bob")[0]?.matches(".away") && toasts("leave", "Bob") === 0`) // his place is kept
	ann.shot("away")
	ann.await(`rows("Bob").length === 0 && toasts("leave", "Bob") === 1`)
	w.settle(t, "two", ann)
	if n := get[int](ann, `toasts("leave", "Bob") + toasts("join", "Bob")`); n != 2 {
		t.Errorf("%d toasts of Bob coming and going", n)
	}
	ann.clean(false)
}

// tabsOfOneUser checks that the tabs of one user are one row with one name and one typing
// indicator, without toasts.
func (w *world) tabsOfOneUser(t *testing.T) {
	ann, bob := w.meet(t, "tabs")
	second := w.ann.open(t, "Ann's second tab", w.one.url("room=tabs"), desktop)
	for _, tab := range []*tab{ann, second, bob} {
		tab.await(`rows("Ann").length === 1 && rows("Ann")[0].dataset.tabs === "2" && all("#people li").length === 2`)
	}
	bob.await(`text("summary") === "2 people in 3 tabs"`)

	bob.awaitWhile(func() { ann.types(); second.types() }, `text("typing-text") === "Ann is typing" && all("#people .typing").length === 1`)

	second.rename("Anna")
	for _, tab := range []*tab{ann, bob} {
		tab.await(`rows("Anna").length === 1 && rows("Anna")[0].dataset.tabs === "2" && all("#people li").length === 2`)
	}
	second.rename("Ann")
	bob.await(`rows("Ann").length === 1`)

	other := w.ann.open(t, "Ann as someone else", w.one.url("room=tabs&as=another"), desktop)
	bob.await(`all("#people li").length === 3 && rows("Ann")[0].dataset.tabs === "2"`)
	for _, tab := range []*tab{other, second} {
		tab.clean(false)
		tab.close()
	}
	bob.await(`all("#people li").length === 2 && rows("Ann")[0].dataset.tabs === "1"`)
	w.settle(t, "tabs", bob)
	if n := get[int](bob, `toasts("join", "Ann") + toasts("leave", "Ann")`); n != 0 {
		t.Errorf("%d toasts about a second tab", n)
	}

	before := get[string](ann, `rows("Ann")[0].dataset.user`)
	ann.run(chromedp.Reload())
	ann.await(`status() === "live" && rows("Ann").length === 1`)
	if after := get[string](ann, `rows("Ann")[0].dataset.user`); after != before {
		t.Errorf("after a reload Ann is %s, and was %s", after, before)
	}
	bob.await(`rows("Ann").length === 1 && rows("Ann")[0].dataset.tabs === "1" && !rows("Ann")[0].matches(".away")`)
	if n := get[int](bob, `toasts("join", "Ann") + toasts("leave", "Ann")`); n != 0 {
		t.Errorf("%d toasts about a reload", n)
	}
	ann.clean(false)
	bob.clean(false)
}

// rooms checks that a change of room does not reload the page.
func (w *world) rooms(t *testing.T) {
	ann, bob := w.meet(t, "lobby")
	get[bool](ann, `window.stays = true`)
	ann.run(chromedp.Click(chromedp.CSS(`#rooms a[data-room="design"]`)))
	ann.await(`status() === "live" && text("room-title") === "design" && all("#people li").length === 1`)
	bob.await(`rows("Ann").length === 0 && toasts("leave", "Ann") === 1`)
	bob.run(chromedp.Focus(chromedp.ID("room-name")), chromedp.KeyEvent("design\r"))
	for _, tab := range []*tab{ann, bob} {
		tab.await(`rows("Ann").length === 1 && rows("Bob").length === 1 && new URLSearchParams(location.search).get("room") === "design"`)
	}
	ann.run(chromedp.NavigateBack())
	ann.await(`text("room-title") === "lobby" && rows("Ann").length === 1 && rows("Bob").length === 0`)
	if !get[bool](ann, `window.stays`) {
		t.Error("the page was loaded again")
	}
	ann.clean(false)
	bob.clean(false)
}

// point moves the mouse to a point of the tab's screen.
func (p *tab) point(x, y float64) {
	p.t.Helper()
	p.run(chromedp.MouseEvent(chromedp.MouseMoved, x, y))
}

// types types into the draft field.
func (p *tab) types() {
	p.t.Helper()
	p.run(chromedp.Focus(chromedp.ID("draft")), chromedp.KeyEvent("hello"))
}

// touch taps with a finger.
func (p *tab) touch(x, y float64) {
	p.t.Helper()
	p.run(chromedp.TapXY(x, y))
}
