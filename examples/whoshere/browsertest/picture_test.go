package browsertest

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/meshpresence/mesh/internal/redistest"
)

// pictureLimit is in bytes. A README is also read on phones.
const pictureLimit = 200_000

// TestPicture takes the pictures of the README: a lively room, light and dark. It looks
// best if the font Inter is installed.
func TestPicture(t *testing.T) {
	if *pictureFlag == "" {
		t.Skip("no -picture")
	}
	path := chromium(t)
	s := newServer(t, redistest.Start(t), "-grace", "5m")
	b := newBrowser(t, path)
	p := b.open(t, "picture", s.url("room=lobby"), view{width: 1200, height: 700})
	p.rename("Ada")
	p.run(chromedp.Click(chromedp.CSS("#edit-me")), chromedp.Click(chromedp.CSS(`#swatches [value="#2563eb"]`)), chromedp.KeyEvent("\r"))
	p.await(`!document.getElementById("me-dialog").open`)

	enter := func(name, color string, state map[string]any) *person {
		q := newPerson(t, s, strings.ReplaceAll(fmt.Sprintf("%024s", name), " ", "-"))
		q.join("design", map[string]any{"name": name, "color": color})
		q.publish("design", state, time.Hour)
		return q
	}
	enter("Priya Nair", "#0f766e", map[string]any{"x": .47, "y": .55, "typing": true})
	enter("Mira Okafor", "#7c3aed", map[string]any{"x": .17, "y": .40})
	enter("Jonas", "#c2410c", map[string]any{"x": .62, "y": .29})
	enter("Jonas", "#c2410c", map[string]any{"at": "rest"}) // another tab
	enter("Yuki Tanaka", "#15803d", map[string]any{"at": "rest"}).Kill()
	p.run(chromedp.Click(chromedp.CSS(`#rooms a[data-room="design"]`)))
	p.await(`all("#people li").length === 5 && all("#people .away").length === 1 && status() === "live" && text("latency") !== ""`)
	enter("Tom Reyes", "#be185d", map[string]any{"x": .80, "y": .62})
	p.await(`toasts("join", "Tom") === 1 && all(".cursor").length === 4`)

	for scheme, file := range map[string]string{
		"light": *pictureFlag,
		"dark":  strings.TrimSuffix(*pictureFlag, ".png") + "-dark.png",
	} {
		p.run(call(emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
		}))
		p.await(`all(".cursor, .toast, #people li").every((el) => el.getAnimations().every((each) => each.playState === "finished"))`)
		png := evaluate(p, chromedp.CaptureScreenshot())
		if len(png) > pictureLimit {
			t.Errorf("%s: %d bytes", file, len(png))
		}
		if err := os.WriteFile(file, png, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if get[int](p, `all(".toast").length`) == 0 {
		t.Error("the toast had gone before the picture was taken: take it again")
	}
}
