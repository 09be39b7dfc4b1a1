package browsertest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

// crowd fills a room with people with short and long names.
func (w *world) crowd(t *testing.T, room string) {
	t.Helper()
	for i, name := range []string{"Mira Okafor", "Jonas", "Wolfeschlegelsteinhausenbergerdorff, Jr.", "ß", "日本 太郎", "Tom Reyes"} {
		p := newPerson(t, w.one, strings.Repeat(fmt.Sprint(i), 24))
		p.join(room, map[string]any{"name": name})
		p.publish(room, map[string]any{"x": float64(i) / 5, "y": .3 + float64(i)/10, "typing": i == 1}, time.Minute)
	}
}

// phone checks that everything fits on the screen of a phone.
func (w *world) phone(t *testing.T) {
	const room = "a room with a name that is rather long for a phone"
	w.crowd(t, room)
	query := "room=" + strings.ReplaceAll(room, " ", "+")
	bob := w.bob.open(t, "Bob", w.two.url(query), desktop)
	ann := w.ann.open(t, "Ann on her phone", w.one.url(query), phone)
	ann.await(`all("#people li").length === 8 && all(".cursor").length === 6 && text("typing-text") !== ""`)
	ann.shot("phone")
	if width := get[int](ann, `Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)`); width > int(phone.width) {
		t.Errorf("the page is %d px wide on a screen of %d", width, phone.width)
	}
	for _, id := range []string{"draft", "edit-me", "status", "rooms", "room-name", "people", "stage"} {
		box := get[[]float64](ann, fmt.Sprintf(`(({left, top, right, bottom}) => [left, top, right, bottom])(document.getElementById(%q).getBoundingClientRect())`, id))
		if box[0] < 0 || box[1] < 0 || box[2] > float64(phone.width) || box[3] > float64(phone.height) || box[2]-box[0] < 20 || box[3]-box[1] < 20 {
			t.Errorf("#%s is at %v", id, box)
		}
	}
	ann.run(chromedp.EmulateViewport(phone.height, phone.width, chromedp.EmulateMobile, chromedp.EmulateTouch))
	ann.await(fmt.Sprintf("innerWidth === %d", phone.height))
	ann.shot("phone-on-its-side")
	if width := get[int](ann, `document.documentElement.scrollWidth`); width > int(phone.height) {
		t.Errorf("on its side the page is %d px wide on a screen of %d", width, phone.height)
	}
	ann.run(chromedp.EmulateViewport(phone.width, phone.height, chromedp.EmulateMobile, chromedp.EmulateTouch))
	ann.await(fmt.Sprintf("innerWidth === %d", phone.width))

	if size := get[float64](ann, `parseFloat(getComputedStyle(document.getElementById("draft")).fontSize)`); size < 16 {
		t.Errorf("an input of %v px makes a phone zoom in", size)
	}

	at := get[[]float64](ann, `inArea(200, 500)`)
	bob.awaitWhile(func() { ann.touch(200, 500) }, fmt.Sprintf(`near(tip("Ann"), %v, %v)`, at[0], at[1]))
	ann.clean(false)
	bob.clean(false)
}

// dark checks that all text is readable in the dark and the light scheme.
func (w *world) dark(t *testing.T) {
	w.crowd(t, "looks")
	v := desktop
	v.dark = true
	ann := w.ann.open(t, "Ann at night", w.one.url("room=looks"), v)
	ann.await(`all("#people li").length === 7 && text("typing-text") !== ""`)
	for _, scheme := range []string{"dark", "light"} {
		ann.run(call(emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: "reduce"},
		}}))
		ann.await(fmt.Sprintf(`matchMedia("(prefers-color-scheme: %s)").matches`, scheme))
		ann.shot(scheme)
		light := get[float64](ann, luminance+`luminance("--bg")`)
		if (scheme == "light") != (light > 0.5) {
			t.Errorf("%s: the background's luminance is %v", scheme, light)
		}
		for _, pair := range [][2]string{
			{"--text", "--bg"}, {"--text", "--surface"}, {"--quiet", "--bg"}, {"--quiet", "--surface"}, {"--quiet", "--raised"},
			{"--accent", "--surface"}, {"--on-accent", "--accent"}, {"--notice-text", "--notice"},
		} {
			a, b := get[float64](ann, luminance+`luminance("`+pair[0]+`")`), get[float64](ann, luminance+`luminance("`+pair[1]+`")`)
			if contrast := (max(a, b) + .05) / (min(a, b) + .05); contrast < 4.5 {
				t.Errorf("%s: %s on %s has a contrast of %.2f", scheme, pair[0], pair[1], contrast)
			}
		}
		if moving := get[string](ann, `getComputedStyle(all(".dots i")[0]).animationName + getComputedStyle(all(".cursor")[0]).transitionDuration`); moving != "none0s" {
			t.Errorf("%s: with reduced motion: %s", scheme, moving)
		}
	}
	ann.clean(false)
}

// luminance is the WCAG luminance of a colour of the theme.
const luminance = `var luminance = (name) => {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
`
