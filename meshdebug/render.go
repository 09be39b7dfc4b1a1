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

// contentSecurityPolicy allows the page's own style and nothing else.
var contentSecurityPolicy = "default-src 'none'; style-src '" + styleHash() + "'; img-src data:; " +
	"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

// styleHash returns the hash of the style element's content. The content has no template
// actions and no comments, so the template writes it unchanged.
func styleHash() string {
	_, rest, _ := strings.Cut(pageHTML, "<style>")
	style, _, _ := strings.Cut(rest, "</style>")
	sum := sha256.Sum256([]byte(style))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// rendered is a complete page as HTML or JSON. It is complete before anything is sent,
// because an error in the middle could not change the status 200 any more.
type rendered struct {
	status int
	kind   string // Content-Type
	body   bytes.Buffer
	err    error // why it could not be made
}

func render(p *page, status int) *rendered {
	out := &rendered{status: status}
	if p.query.json {
		out.kind = "application/json"
		encode := json.NewEncoder(&out.body) // it escapes the special characters of HTML
		encode.SetIndent("", "  ")
		out.err = encode.Encode(p)
	} else {
		out.kind = "text/html; charset=utf-8"
		out.err = pageTemplate.Execute(&out.body, p)
	}
	return out
}

// write sends the page, at the speed of the client.
func (out *rendered) write(w http.ResponseWriter) {
	if out.err != nil {
		http.Error(w, "the page could not be made: "+out.err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", out.kind)
	w.Header().Set("Content-Length", strconv.Itoa(out.body.Len()))
	w.WriteHeader(out.status)
	_, _ = w.Write(out.body.Bytes()) // an error means that the client is gone
}

// Refresh returns the seconds until the page reloads itself, or 0 if it does not.
func (p *page) Refresh() int { return p.query.refresh }

// Limit returns the limit in the query, or 0 for the view's own.
func (p *page) Limit() int { return p.query.limit }

// Title returns the title of the page.
func (p *page) Title() string {
	switch {
	case p.Room != nil:
		return p.Room.Name
	case p.Conn != nil:
		return p.Conn.ID
	case p.View == viewRooms:
		return "Rooms"
	case p.View == viewWatched:
		return "Watched here"
	}
	return "Overview"
}

// Overview reports whether this is the overview.
func (p *page) Overview() bool { return p.View == viewOverview }

// trouble describes why the page may be wrong or incomplete.
type trouble struct {
	Title   string
	Details []string
}

// Trouble returns the problems of the page, or nil if there are none.
func (p *page) Trouble() *trouble {
	t := new(trouble)
	for _, err := range p.errors() {
		switch {
		case err == nil:
			continue
		case errors.Is(err, mesh.ErrInvalidRoom):
			t.Title = "No room has such a name"
		case errors.Is(err, mesh.ErrInvalidConnectionID):
			t.Title = "No connection has such an id"
		case errors.Is(err, mesh.ErrUnknownConnection):
			t.Title = "No server has this connection"
		case errors.Is(err, mesh.ErrInvalidOptions):
			t.Title = "The cursor is invalid"
		case errors.Is(err, mesh.ErrNotStarted):
			t.Title = "This server has not been started. The page shows only its own data"
		case errors.Is(err, mesh.ErrClosed):
			t.Title = "This server has been shut down. The page shows its last data"
		case p.Conn.Unanswered() && p.Servers.err == nil:
			t.Title = "The server of this connection does not answer. The page shows the data in Redis"
		default:
			t.Title = "Redis does not answer. The page shows the data of this server"
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

// Link returns a relative link with these keys and values in its query. It keeps the
// refresh.
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

// Same returns a link to the current page with one key changed. An empty value removes
// the key.
func (p *page) Same(key, value string) string {
	values := url.Values{}
	q := p.query
	for k, v := range map[string]string{"prefix": q.prefix, "user": q.user, "cursor": q.cursor, "after": q.after} {
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
	case viewConnection:
		values.Set("conn", q.conn)
	case viewRooms, viewWatched:
		values.Set("view", q.view)
	}
	if values.Set(key, value); value == "" {
		values.Del(key)
	}
	return "?" + values.Encode()
}

// Mark returns the status of a watched room's copy, which is also its CSS class.
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

// Lag returns the number of events that the copy is behind, as text.
func (w watched) Lag() string {
	if w.Behind == nil {
		return "?"
	}
	return grouped(*w.Behind)
}

// SelfName returns the name of this server, if Redis answered.
func (p *page) SelfName() string {
	if p.Servers == nil {
		return ""
	}
	for _, s := range p.Servers.List {
		if s.Self {
			return s.Name
		}
	}
	return ""
}

// Left returns the remaining share of a lease in per cent.
func (s server) Left() int {
	whole := s.LeaseLeft + s.LeaseAge
	if s.LeaseLeft <= 0 || whole <= 0 {
		return 0
	}
	return int(100 * s.LeaseLeft / whole)
}

// LapsedFor returns the time since the end of a lease.
func (s server) LapsedFor() seconds { return max(-s.LeaseLeft, 0) }

// short returns the first characters of a random id, enough to distinguish it.
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

// shown is JSON on the page: one line, and the whole text if the line is not all of it.
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
