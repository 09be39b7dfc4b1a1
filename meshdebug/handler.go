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

// Source is what the page tells about: a *mesh.Server or a
// *mesh.PresenceManager.
type Source interface {
	Ready(ctx context.Context) error
	Servers(ctx context.Context) ([]mesh.ServerInfo, error)
	Rooms() *mesh.RoomManager
	Stats() mesh.Stats
}

var (
	_ Source = (*mesh.Server)(nil)
	_ Source = (*mesh.PresenceManager)(nil)
)

// Options configure a handler; the zero value is fine.
type Options struct {
	// HideData leaves out what connections have as metadata and state, on the
	// page and in JSON. Who is in which room is shown all the same.
	HideData bool
}

// maxAtOnce bounds how many pages are made at a time: a page left open with a
// refresh of a second in fifty tabs is no reason to keep Redis busy. Sending one
// is not making it: who reads slowly holds up nobody else who looks.
const maxAtOnce = 8

// NewHandler returns a handler that serves the page about a server. It may be
// mounted at any path, and made before the server is started or after it has
// been shut down. It has no authentication of its own and shows what guards
// hide: see the package's documentation before you mount it. It is safe for
// concurrent use.
func NewHandler(source Source, opts Options) http.Handler {
	if source == nil {
		panic("meshdebug: nil Source")
	}
	return &handler{source: source, opts: opts, places: make(chan struct{}, maxAtOnce)}
}

type handler struct {
	source Source
	opts   Options
	places chan struct{}
}

// The views.
const (
	viewOverview = "overview"
	viewRooms    = "rooms"
	viewWatched  = "watched"
	viewRoom     = "room"
)

// query is what is asked for.
type query struct {
	view    string
	json    bool
	refresh int // seconds; 0: not
	room    string
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
		http.Error(w, "this only reads: GET or HEAD", http.StatusMethodNotAllowed)
		return
	}
	q, err := parse(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	select {
	case h.places <- struct{}{}:
	default:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many look at once", http.StatusServiceUnavailable)
		return
	}
	made := h.make(r.Context(), q)
	if made == nil {
		http.Error(w, "the server could not be read", http.StatusInternalServerError)
		return
	}
	made.write(w)
}

// makeLimit limits the time that a page takes. A mesh.Server answers within
// gatherLimit; a Source of the app's may ignore its context.
const makeLimit = gatherLimit + time.Second

// make makes a page, and gives a place back when it has been made; nil: the
// Source panicked, or does not answer.
func (h *handler) make(ctx context.Context, q query) *rendered {
	made := make(chan *rendered, 1)
	go func() { // ends with the calls of the Source, and has a place until then
		var page *rendered
		defer func() {
			_ = recover() // of a panic of the Source: page is nil
			<-h.places
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

// setHeaders sets what goes with every answer. The page consists of itself:
// no scripts, nothing from elsewhere, and nobody may put it into theirs.
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
	switch {
	case values.Has("room"):
		q.view = viewRoom
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

// number reads a whole number from 1 to most; 0: there is none.
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

// prefersJSON reports whether an Accept names JSON and not HTML. Browsers name
// HTML, and who accepts anything gets the page.
func prefersJSON(accept []string) bool {
	var asJSON bool
	for _, part := range strings.Split(strings.Join(accept, ","), ",") {
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
