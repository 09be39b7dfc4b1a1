package main

import (
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
)

// bodyWithin limits the time for reading the name.
const bodyWithin = 10 * time.Second

// app is the HTTP side: the login that issues a pass, and the socket.
type app struct {
	cfg      config
	srv      *mesh.Server
	passes   passes
	upgrader websocket.Upgrader
}

func newApp(cfg config, srv *mesh.Server) http.Handler {
	a := &app{cfg: cfg, srv: srv, passes: passes{key: cfg.key}}
	a.upgrader = websocket.Upgrader{HandshakeTimeout: 10 * time.Second}
	if len(cfg.origins) > 0 {
		a.upgrader.CheckOrigin = a.ownPage // nil is gorilla's default: the page's host must be the server's
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /login", a.login)
	mux.HandleFunc("GET /ws", a.connect)
	// This refuses POST requests from pages of other sites. It allows every GET,
	// including upgrades, whose origin the Upgrader checks.
	return http.NewCrossOriginProtection().Handler(mux)
}

// ownPage reports whether the request comes from a page of ours. A browser sends the
// cookie with requests of scripts on any page. Without this check, any site could act for
// its visitors. Clients that are not browsers send no Origin.
func (a *app) ownPage(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	return origin == "" || slices.Contains(a.cfg.origins, origin)
}

// login issues a pass for a name. A real app checks a password here.
func (a *app) login(w http.ResponseWriter, r *http.Request) {
	// Limit the size of the body and the time for it. The ReadHeaderTimeout of
	// http.Server is for headers only.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyWithin)) // net/http supports it
	r.Body = http.MaxBytesReader(w, r.Body, 1<<10)
	name := r.PostFormValue("name")
	if !validName(name) {
		http.Error(w, "a name of 1 to 40 bytes is needed", http.StatusBadRequest)
		return
	}
	http.SetCookie(w, &http.Cookie{
		Name: passCookie, Value: a.passes.issue(name, time.Now()), Path: "/", MaxAge: int(passLife.Seconds()),
		HttpOnly: true, SameSite: http.SameSiteLaxMode, Secure: r.TLS != nil,
	})
}

// connect serves one socket from the request to its end.
func (a *app) connect(w http.ResponseWriter, r *http.Request) {
	// Check the pass before the upgrade, so that a refused client gets an HTTP status.
	name, err := a.passes.holder(r, time.Now())
	if err != nil {
		http.Error(w, http.StatusText(http.StatusUnauthorized), http.StatusUnauthorized)
		return
	}
	ws, err := a.upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // the upgrader has answered: 403 for the origin, 400 if it is not an upgrade
	}
	// From here on ws belongs to Mesh. The app sends its messages through the Connection
	// that its function receives with every frame.
	t := &talk{name: name}
	err = a.srv.ServeConn(r.Context(), ws, mesh.ConnOptions{
		Metadata: map[string]string{"name": name},
		Foreign:  t.handle,
	})
	if errors.Is(err, mesh.ErrLimit) { // not served, because there are too many connections
		a.cfg.log.Debug("refused", "error", err)
	}
}
