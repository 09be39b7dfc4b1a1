package browsertest

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// hostile checks names, colours, states and rooms that try to get markup or scripts into
// the page, or to imitate another user.
func (w *world) hostile(t *testing.T) {
	const (
		image = `<img src=x onerror=hacked=1>`
		room  = `"><img src=x onerror=hacked=1>'&lt;`
	)
	ann := w.ann.open(t, "Ann", w.one.url("room="+url.QueryEscape(room)), desktop)

	eve := newPerson(t, w.one, "")
	eve.refused(map[string]any{"name": "Eve\u202e", "color": "#000000"})
	eve.refused(map[string]any{"name": "Eve", "color": "red;background:url(//evil.example)"})
	eve.refused(map[string]any{"name": map[string]any{"toString": image}})
	eve.join(room, map[string]any{"name": image, "userId": image, "avatar": image})
	eve.publish(room, map[string]any{"typing": true, "x": 0.5, "y": 0.5, "name": image, "rev": 1e300}, time.Minute)

	// Ann's public id is not a secret. A client that claims to have it gains nothing.
	annID := strings.TrimPrefix(get[string](ann, `rows("Ann")[0].dataset.user`), "user ")
	twin := newPerson(t, w.two, annID)
	twin.join(room, map[string]any{"name": "Twin", "userId": annID})
	twin.publish(room, map[string]any{"typing": image, "x": "0.5", "y": map[string]any{}, "rev": image}, time.Minute)

	ann.await(fmt.Sprintf(`rows(%[1]q).length === 1 && cursors(%[1]q).length === 1 && text("typing-text") === %[1]q + " is typing"`, image))

	ever(ann, eve, room, image)
	w.lawless(t, room, image)
	ann.await(`rows("Twin").length === 1 && rows("Ann").length === 1 && rows("Ann")[0].dataset.tabs === "1"`)
	ann.await(`all("#people li").length === 8`)
	w.settle(t, room, ann)
	ann.shot("hostile")
	for what, want := range map[string]string{
		`text("room-title")`: room,
		`document.title`:     "(8) " + room + " – Who’s here",
		`all("#rooms a[aria-current]").map((el) => el.textContent).join()`: room,
		`String(window.hacked)`: "undefined",
		`all("img, script, iframe, object, embed, base").map((el) => el.outerHTML).join("\n")`: `<script type="module" src="app.js"></script>` + "\n" +
			`<img src="icon.svg" alt="" width="26" height="26">`,
		// No attribute came in either, and no style but the two colours and a position.
		`all("*").flatMap((el) => el.getAttributeNames()).filter((name) => name.startsWith("on")).join()`:                                            "",
		`all("[style]").flatMap((el) => [...el.style]).filter((name) => !["--person", "--on-person", "transform"].includes(name)).join()`:            "",
		`all("[style]").map((el) => el.style.getPropertyValue("--person")).filter((color) => color !== "" && !/^#[0-9a-f]{6}$/i.test(color)).join()`: "",
	} {
		if got := get[string](ann, what); got != want {
			t.Errorf("%s is %s, not %s", what, got, want)
		}
	}
	ann.clean(false)
}

// ever makes Eve publish many states. The page draws the last one, and asks for nothing.
func ever(ann *tab, eve *person, room, name string) {
	before := get[int](ann, `seen.asked`)
	for i := range 60 {
		eve.publish(room, map[string]any{"x": 0.5, "y": 0.5, "rev": i + 2}, time.Minute)
	}
	eve.publish(room, map[string]any{"x": 0.25, "y": 0.25, "typing": true, "rev": 99}, time.Minute)
	ann.await(fmt.Sprintf(`near(tip(%q), 0.25, 0.25)`, name))
	if asked := get[int](ann, `seen.asked`) - before; asked != 0 {
		ann.t.Errorf("the page asked %d times for a name", asked)
	}
}

// refused proposes metadata that the server must refuse.
func (p *person) refused(metadata any) {
	p.t.Helper()
	if _, err := p.Call("mesh/set-my-connection-metadata", map[string]any{"metadata": metadata}); meshtest.CodeOf(err) != "EINVALID" {
		p.t.Errorf("metadata %v: %v", metadata, err)
	}
}

// lawless adds people whose server accepts any metadata, like another program on the same
// Redis.
func (w *world) lawless(t *testing.T, room, image string) {
	t.Helper()
	m, err := mesh.NewPresenceManager(mesh.Options{Redis: w.redis.Client(t), LeaseTTL: leaseTTL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), timeLimit)
		defer cancel()
		if err := m.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := m.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for id, metadata := range map[string]any{
		"nothing":                 nil,
		"text":                    image,
		"<svg/onload=hacked=1>":   []any{image},
		"__proto__":               map[string]any{"name": []any{image}, "userId": map[string]any{"toString": 1}, "color": 7},
		"'\"><script>alert(1)</s": map[string]any{"name": strings.Repeat("W", 5000), "userId": "__proto__", "color": "url(javascript:hacked=1)"},
	} {
		if err := m.Connect(t.Context(), id, metadata); err != nil {
			t.Fatal(err)
		}
		if err := m.Join(t.Context(), room, id); err != nil {
			t.Fatal(err)
		}
		state := map[string]any{"x": 0.9, "y": 0.9, "typing": true, "__proto__": map[string]any{"x": 1}}
		if err := m.PublishState(t.Context(), room, id, state, mesh.StateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}
