package meshdebug

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/meshpresence/mesh"
)

//go:embed page.html
var pageHTML string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"num":   grouped,
	"dur":   func(s seconds) string { return duration(time.Duration(s)) },
	"since": func(now, then time.Time) string { return duration(max(now.Sub(then), 0)) },
	"until": func(now, then time.Time) string { return duration(max(then.Sub(now), 0)) },
	"utc":   func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") },
	"short": short,
	"data":  dataOf,
}).Parse(pageHTML))

// contentSecurityPolicy lets the page have its own style and nothing else.
var contentSecurityPolicy = "default-src 'none'; style-src '" + styleHash() + "'; img-src data:; " +
	"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// styleHash names the style element's content, which holds no actions and no
// comments, so that the template puts it out as it is.
func styleHash() string {
	_, rest, _ := strings.Cut(pageHTML, "<style>")
	style, _, _ := strings.Cut(rest, "</style>")
	sum := sha256.Sum256([]byte(style))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// rendered is a page in the form that was asked for. It is made whole before
// anything is sent: half a page with a 200 would be a lie.
type rendered struct {
	status int
	kind   string // Content-Type
	body   bytes.Buffer
	err    error // it could not be made
}

func render(p *page, status int) *rendered {
	out := &rendered{status: status}
	if p.query.json {
		out.kind = "application/json"
		encode := json.NewEncoder(&out.body) // it escapes what HTML would mind
		encode.SetIndent("", "  ")
		out.err = encode.Encode(p)
	} else {
		out.kind = "text/html; charset=utf-8"
		out.err = pageTemplate.Execute(&out.body, p)
	}
	return out
}

// write answers with the page, at the pace of whoever asked.
func (out *rendered) write(w http.ResponseWriter) {
	if out.err != nil {
		http.Error(w, "the page could not be made: "+out.err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", out.kind)
	w.Header().Set("Content-Length", strconv.Itoa(out.body.Len()))
	w.WriteHeader(out.status)
	_, _ = w.Write(out.body.Bytes()) // whoever asked has gone
}

// Refresh is how many seconds the page stays; 0: for ever.
func (p *page) Refresh() int { return p.query.refresh }

// Limit is how many were asked for; 0: the view's own number.
func (p *page) Limit() int { return p.query.limit }

// Title names the page.
func (p *page) Title() string {
	switch {
	case p.Room != nil:
		return p.Room.Name
	case p.View == viewRooms:
		return "Rooms"
	case p.View == viewWatched:
		return "Watched here"
	}
	return "Overview"
}

// Overview reports whether parts are shown at a glance.
func (p *page) Overview() bool { return p.View == viewOverview }

// trouble is what stands against the whole page being right.
type trouble struct {
	Title   string
	Details []string
}

// Trouble returns what is wrong, nil if nothing is.
func (p *page) Trouble() *trouble {
	t := new(trouble)
	for _, err := range p.errors() {
		switch {
		case err == nil:
			continue
		case errors.Is(err, mesh.ErrInvalidRoom):
			t.Title = "No room has such a name"
		case errors.Is(err, mesh.ErrInvalidOptions):
			t.Title = "This is no place to read on from"
		case errors.Is(err, mesh.ErrNotStarted):
			t.Title = "This server has not been started: what follows is all that it knows"
		case errors.Is(err, mesh.ErrClosed):
			t.Title = "This server has been shut down: what follows is what it knew last"
		default:
			t.Title = "Redis does not answer: what follows is what this server knows by itself"
		}
		if text := err.Error(); !slices.Contains(t.Details, text) {
			t.Details = append(t.Details, text)
		}
	}
	if t.Title == "" {
		return nil
	}
	return t
}

// Link returns a relative link with these keys and values in its query. The
// refresh goes on.
func (p *page) Link(pairs ...string) string {
	values := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			values.Set(pairs[i], pairs[i+1])
		}
	}
	if p.query.refresh > 0 {
		values.Set("refresh", strconv.Itoa(p.query.refresh))
	}
	return "?" + values.Encode()
}

// Same returns a link to what is shown now, with one key set otherwise; an
// empty value takes it away.
func (p *page) Same(key, value string) string {
	values := url.Values{}
	q := p.query
	for k, v := range map[string]string{"prefix": q.prefix, "cursor": q.cursor, "after": q.after} {
		if v != "" {
			values.Set(k, v)
		}
	}
	for k, n := range map[string]int{"refresh": q.refresh, "limit": q.limit} {
		if n > 0 {
			values.Set(k, strconv.Itoa(n))
		}
	}
	if q.stale {
		values.Set("stale", "1")
	}
	switch q.view {
	case viewRoom:
		values.Set("room", q.room)
	case viewRooms, viewWatched:
		values.Set("view", q.view)
	}
	if values.Set(key, value); value == "" {
		values.Del(key)
	}
	return "?" + values.Encode()
}

// Mark is a word that says how a watched room's copy is, and its class.
func (w watched) Mark() string {
	switch {
	case w.Stale:
		return "stale"
	case w.Behind == nil:
		return "unknown"
	case *w.Behind > 0:
		return "behind"
	}
	return "in step"
}

// Lag is by how much the copy is behind, as text.
func (w watched) Lag() string {
	if w.Behind == nil {
		return "?"
	}
	return grouped(*w.Behind)
}

// Left is the share of a lease that still runs, in per cent.
func (s server) Left() int {
	whole := s.LeaseLeft + s.LeaseAge
	if s.LeaseLeft <= 0 || whole <= 0 {
		return 0
	}
	return int(100 * s.LeaseLeft / whole)
}

// LapsedFor is for how long a lease has been over.
func (s server) LapsedFor() seconds { return max(-s.LeaseLeft, 0) }

// short is enough of a random id to tell it from others.
func short(id string) string {
	const enough = 8
	if len(id) <= enough+2 || !utf8.ValidString(id) {
		return id
	}
	cut := enough
	for !utf8.RuneStart(id[cut]) {
		cut--
	}
	return id[:cut] + "…"
}

// shown is JSON on the page: a line of it and, where that is not all, the whole.
type shown struct{ Line, Whole string }

func dataOf(raw json.RawMessage) shown {
	const line = 72
	var compact, whole bytes.Buffer
	if json.Compact(&compact, raw) != nil || json.Indent(&whole, raw, "", "  ") != nil {
		return shown{Line: string(raw)}
	}
	text := compact.String()
	if len(text) <= line {
		return shown{Line: text}
	}
	cut := line - 8
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return shown{Line: text[:cut] + "…", Whole: whole.String()}
}
