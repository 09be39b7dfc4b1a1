package browsertest

import (
	"strings"
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/redistest"
)

// TestPicture takes the picture of the README: a lively room.
func TestPicture(t *testing.T) {
	if *pictureFlag == "" {
		t.Skip("no -picture")
	}
	path := chromium(t)
	s := newServer(t, redistest.Start(t))
	const room = "design"
	people := []struct {
		name  string
		color string
		tabs  int
		state map[string]any
	}{
		{"Mira Okafor", "#7c3aed", 1, map[string]any{"x": .23, "y": .40}},
		{"Jonas", "#c2410c", 2, map[string]any{"x": .62, "y": .30}},
		{"Priya Nair", "#0f766e", 1, map[string]any{"x": .44, "y": .60, "typing": true}},
		{"Tom Reyes", "#be185d", 1, map[string]any{"x": .79, "y": .66}},
	}
	b := newBrowser(t, path)
	p := b.open(t, "picture", s.url("room="+room), desktop)
	get[any](p, `document.getElementById("edit-me").click();
		document.getElementById("my-name").value = "Ada";
		document.querySelector('#swatches [value="#2563eb"]').checked = true;
		document.querySelector("#me-form").requestSubmit()`)
	p.await(`document.querySelector("#people .mine .name").textContent === "Ada"`)
	var all []*person
	for _, who := range people {
		for range who.tabs {
			q := newPerson(t, s, strings.Repeat("k", 20)+strings.ReplaceAll(who.name, " ", "-"))
			q.join(room, map[string]any{"name": who.name, "color": who.color})
			all = append(all, q)
			q.publish(room, who.state, time.Minute)
			if who.tabs > 1 {
				who.state = map[string]any{"rev": 1}
			}
		}
	}
	p.await(`document.querySelectorAll(".cursor").length === 4 && document.querySelectorAll("#people li").length === 5`)
	time.Sleep(time.Second)
	p.shot("picture")
	_ = all
}
