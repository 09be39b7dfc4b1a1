package meshdebug_test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// hostile lists names that a page without escaping would misinterpret.
var hostile = []string{
	`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='alert(1)`, `javascript:alert(1)`,
	`</style><b>`, `</title><b>`, `</bdi></a><b>`, `<!--`, `-->`, `]]>`, `{{.}}`, `{{template "page"}}`,
	`a/b`, `a?b=c&d`, `a&amp;b`, `100%`, `%3Cb%3E`, `a:b`, `a#b`, `a;b`, `a+b c`, `//evil.example/`, `..`, `.`, `\`,
	"`", `=`, "\u202eright\u202c", "é\u0301", "𝕏", "\ufeffx", "a\u2028b", strings.Repeat("<", 40), "<<b>b>", "&lt;b&gt;", "<b\u00a0",
}

var (
	tags  = regexp.MustCompile(`<[^>]*>`)
	quote = regexp.MustCompile(`="[^"]*"`)
)

// elements returns the elements of a page with the names of their attributes, in order.
func elements(body string) []string {
	list := tags.FindAllString(body, -1)
	for i, tag := range list {
		list[i] = quote.ReplaceAllString(tag, "")
	}
	return list
}

// checkHostile checks that a page with a hostile name has the same elements as one with a
// harmless name, that it shows the name, and that its links lead to it.
func (r *rig) checkHostile(name string) {
	r.t.Helper()
	ctx, p := r.t.Context(), r.srv.Presence()
	data := map[string]any{name: name}
	query := "room=" + url.QueryEscape(name)
	require.NoError(r.t, p.Connect(ctx, "c", data), "%q", name)
	require.NoError(r.t, p.Join(ctx, name, "c"), "%q", name)
	require.NoError(r.t, p.PublishState(ctx, name, "c", data, stateOptions))
	harmless := strings.Repeat("x", len([]rune(name)))
	if harmless == name {
		harmless = strings.Repeat("y", len(name))
	}
	require.NoError(r.t, p.Connect(ctx, "harmless", map[string]any{harmless: harmless}))
	require.NoError(r.t, p.Join(ctx, harmless, "harmless"))
	require.NoError(r.t, p.PublishState(ctx, harmless, "harmless", map[string]any{harmless: harmless}, stateOptions))

	room := r.data(query, http.StatusOK).Room
	assert.Equal(r.t, name, room.Name)
	require.Len(r.t, room.Entries, 1)
	want, err := json.Marshal(data)
	require.NoError(r.t, err)
	assert.JSONEq(r.t, string(want), string(room.Entries[0].Metadata))
	assert.JSONEq(r.t, string(want), string(room.Entries[0].State))

	bad, good := r.get("/?"+query), r.get("/?room="+harmless)
	require.Equal(r.t, http.StatusOK, bad.Code)
	assert.Equal(r.t, elementsWithout(good.Body.String()), elementsWithout(bad.Body.String()), "%q", name)
	found := false
	list := r.get("/?view=rooms&prefix=" + url.QueryEscape(name))
	for _, body := range []string{bad.Body.String(), list.Body.String(), r.get("/").Body.String()} {
		r.escaped(body, name)
		for _, link := range links(body) {
			if link != "data:," && queryOf(r.t, link).Get("room") == name {
				found = true
			}
		}
	}
	assert.True(r.t, found, "a link leads to %q", name)
	raw := r.get("/?format=json&" + query).Body.String()
	assert.NotContains(r.t, raw, "<", "the JSON has nothing that a browser could take for an element")

	for _, conn := range []string{"c", "harmless"} {
		require.NoError(r.t, p.Disconnect(ctx, conn))
	}
}

// elementsWithout leaves out elements that only long data have.
func elementsWithout(body string) []string {
	list := elements(body)
	out := list[:0]
	for _, e := range list {
		if !strings.Contains(e, "details") && !strings.Contains(e, "summary") && !strings.Contains(e, "pre") {
			out = append(out, e)
		}
	}
	return out
}

// escaped asserts that a name with special characters of HTML never occurs unescaped on
// the page.
func (r *rig) escaped(body, name string) {
	r.t.Helper()
	if _, rest, ok := strings.Cut(body, "</style>"); ok {
		body = rest
	}
	if strings.ContainsAny(name, `<>"'`) && len(name) > 1 {
		assert.NotContains(r.t, body, name)
	}
}

func TestHostileNames(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.trackAll()
		r.start()
		for _, name := range hostile {
			r.checkHostile(name)
		}
	})
}

// Prefixes, cursors and the errors that quote them also come from outside.
func TestHostileQueries(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		for _, text := range hostile {
			at := url.QueryEscape(text)
			for _, query := range []string{
				"view=rooms&prefix=" + at, "view=watched&prefix=" + at + "&after=" + at, "prefix=" + at, "room=" + at, "conn=" + at,
				"view=rooms&cursor=" + at, "room=lobby&cursor=" + at, "room=lobby&cursor=0.0." + at, "view=" + at, "format=" + at, "refresh=" + at,
			} {
				w := r.get("/?" + query)
				assert.Contains(r.t, []int{http.StatusOK, http.StatusBadRequest, http.StatusNotFound}, w.Code, query)
				if strings.HasPrefix(w.Header().Get("Content-Type"), "text/html") {
					r.escaped(w.Body.String(), text)
				}
			}
		}
	})
}

func FuzzNames(f *testing.F) {
	for _, name := range hostile {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		name = "q" + name + "q" // so that it differs from every text of the page
		if !usable(name) {
			t.Skip()
		}
		inVirtualTime(t, func(r *rig) {
			r.trackAll()
			r.start()
			r.checkHostile(name)
		})
	})
}
