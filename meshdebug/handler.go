package meshdebug

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/meshpresence/mesh"
)

// Source is the server that the page shows: a *mesh.Server or a *mesh.PresenceManager.
type Source interface {
	Ready(ctx context.Context) error
	Servers(ctx context.Context) ([]mesh.ServerInfo, error)
	Rooms() *mesh.RoomManager
	Connections() *mesh.ConnectionManager
	Stats() mesh.Stats
}

var (
	_ Source = (*mesh.Server)(nil)
	_ Source = (*mesh.PresenceManager)(nil)
)

// Options configure a handler. The zero value is fine.
type Options struct {
	// HideData leaves out the metadata and states of connections, on the page and in
	// JSON. The members of every room are still shown.
	HideData bool
}

// maxPages limits how many pages are made at a time, so that fifty tabs with a refresh
// of one second do not keep Redis busy. A page no longer counts while it is being sent,
// so that a slow reader does not block other requests.
const maxPages = 8

// NewHandler returns a handler that serves the page about a server. It may be mounted at
// any path. It may be made before the server is started or after it has been shut down.
// It has no authentication of its own and shows data that guards hide, so read the
// package's documentation before you mount it. It is safe for concurrent use.
func NewHandler(source Source, opts Options) http.Handler {
	if source == nil {
		panic("meshdebug: nil Source")
	}
	return &handler{source: source, opts: opts, slots: make(chan struct{}, maxPages)}
}

type handler struct {
	source Source
	opts   Options
	slots  chan struct{}
}

// The views.
const (
	viewOverview = "overview"
	viewRooms    = "rooms"
	viewWatched  = "watched"
	viewRoom     = "room"

	viewConnection = "connection"
)

// query holds the parsed parameters of a request.
type query struct {
	view    string
	json    bool
	refresh int // seconds; 0: off
	room    string
	conn    string
	user    string // in a room; empty: all
	prefix  string
	cursor  string
	after   string
	stale   bool
	limit   int // 0: the view's own
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	setHeaders(w.Header())
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD are allowed", http.StatusMethodNotAllowed)
		return
	}
	q, err := parse(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	select {
	case h.slots <- struct{}{}:
	default:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many requests at once", http.StatusServiceUnavailable)
		return
	}
	made := h.make(r.Context(), q)
	if made == nil {
		http.Error(w, "the server could not be read", http.StatusInternalServerError)
		return
	}
	made.write(w)
}

// makeLimit limits the time that a page takes. A mesh.Server answers within gatherLimit,
// but a Source of the app's own may ignore its context.
const makeLimit = gatherLimit + time.Second

// make makes a page and frees its slot afterwards. It returns nil if the Source panicked
// or does not answer.
func (h *handler) make(ctx context.Context, q query) *rendered {
	made := make(chan *rendered, 1)
	go func() { // ends with the calls of the Source, and holds a slot until then
		var page *rendered
		defer func() {
			_ = recover() // after a panic of the Source, page is nil
			<-h.slots
			made <- page
		}()
		page = render(h.gather(ctx, q))
	}()
	t := time.NewTimer(makeLimit)
	defer t.Stop()
	select {
	case page := <-made:
		return page
	case <-t.C:
		return nil
	}
}

// setHeaders sets the headers of every answer. The page has no scripts, loads nothing,
// and must not be framed by other pages.
func setHeaders(h http.Header) {
	h.Set("Content-Security-Policy", contentSecurityPolicy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cache-Control", "no-store")
	h.Set("Vary", "Accept")
}

func parse(r *http.Request) (query, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return query{}, errors.New("the query cannot be read")
	}
	q := query{
		view: values.Get("view"), room: values.Get("room"), prefix: values.Get("prefix"),
		cursor: values.Get("cursor"), after: values.Get("after"), stale: values.Get("stale") == "1",
	}
	q.user = strings.TrimSpace(values.Get("user"))
	q.conn = strings.TrimSpace(values.Get("conn")) // users paste ids with spaces around them
	switch {
	case values.Has("room") && values.Has("conn"):
		return query{}, errors.New("room or conn, not both")
	case q.user != "" && !values.Has("room"):
		return query{}, errors.New("user needs a room")
	case values.Has("room"):
		q.view = viewRoom
	case values.Has("conn"):
		q.view = viewConnection
	case q.view == "":
		q.view = viewOverview
	case q.view != viewOverview && q.view != viewRooms && q.view != viewWatched:
		return query{}, errors.New("view must be rooms or watched, or left out")
	}
	switch values.Get("format") {
	case "json":
		q.json = true
	case "html":
	case "":
		q.json = prefersJSON(r.Header.Values("Accept"))
	default:
		return query{}, errors.New("format must be html or json")
	}
	if q.refresh, err = number(values, "refresh", 3600); err != nil {
		return query{}, err
	}
	q.limit, err = number(values, "limit", 1000)
	return q, err
}

// number reads a whole number from 1 to most. It returns 0 if there is none.
func number(values url.Values, key string, most int) (int, error) {
	text := values.Get(key)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > most {
		return 0, fmt.Errorf("%s must be a whole number from 1 to %d", key, most)
	}
	return n, nil
}

// prefersJSON reports whether an Accept header names JSON and not HTML. Browsers name
// HTML, and a client that accepts anything gets the page.
func prefersJSON(accept []string) bool {
	var asJSON bool
	for part := range strings.SplitSeq(strings.Join(accept, ","), ",") {
		media, _, _ := strings.Cut(part, ";")
		switch strings.ToLower(strings.TrimSpace(media)) {
		case "application/json":
			asJSON = true
		case "text/html", "application/xhtml+xml":
			return false
		}
	}
	return asJSON
}
