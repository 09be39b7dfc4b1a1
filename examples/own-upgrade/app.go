package main

import (
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
)

// bodyWithin is how long a client may take to say its name.
const bodyWithin = 10 * time.Second

// app is the HTTP side: a way to get a pass, and the socket.
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
		a.upgrader.CheckOrigin = a.ownPage // nil is gorilla's own: the page's host must be the server's
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /login", a.login)
	mux.HandleFunc("GET /ws", a.connect)
	// Keeps other sites' pages from posting. It lets every GET pass, upgrades
	// too: those are up to the Upgrader.
	return http.NewCrossOriginProtection().Handler(mux)
}

// ownPage reports whether the page that connects is one of ours. A browser
// sends the cookie along whatever page the script is on, so without this any
// site could act as whoever visits it. What is no browser sends no Origin.
func (a *app) ownPage(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	return origin == "" || slices.Contains(a.cfg.origins, origin)
}

// login gives a pass to whoever gives a name. Here a real app checks a password.
func (a *app) login(w http.ResponseWriter, r *http.Request) {
	// Of limited size, and in limited time: http.Server's own limit, which is for
	// headers, is over.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyWithin)) // net/http's can
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

// connect serves one socket, from the request to its end.
func (a *app) connect(w http.ResponseWriter, r *http.Request) {
	// Before the upgrade: who gets no socket learns it as an HTTP status.
	name, err := a.passes.holder(r, time.Now())
	if err != nil {
		http.Error(w, http.StatusText(http.StatusUnauthorized), http.StatusUnauthorized)
		return
	}
	ws, err := a.upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // the upgrader has answered: 403 for the origin, 400 for what is no upgrade
	}
	// From here on ws is Mesh's. Whatever the app has to say goes by the
	// Connection, which its function is given with every frame.
	t := &talk{name: name}
	err = a.srv.ServeConn(r.Context(), ws, mesh.ConnOptions{
		Metadata: map[string]string{"name": name},
		Foreign:  t.hear,
	})
	if errors.Is(err, mesh.ErrLimit) { // not served at all: there are too many
		a.cfg.log.Debug("turned away", "error", err)
	}
}
