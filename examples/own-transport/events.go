package main

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"github.com/meshpresence/mesh"
)

// told is an event of presence as the page gets it.
type told struct {
	Type     mesh.EventType  `json:"type"`
	ID       string          `json:"id,omitempty"`
	Metadata json.RawMessage `json:"metadata,omitempty"`
	State    json.RawMessage `json:"state"`             // null: it has ended, or there is none
	Members  []mesh.Member   `json:"members,omitempty"` // of a snapshot
	Total    int             `json:"total,omitempty"`   // how many there are: members may be fewer
	Stale    bool            `json:"stale,omitempty"`   // Redis is away: this is what was known last
}

func toldOf(e mesh.Event) told {
	t := told{Type: e.Type, ID: e.ConnectionID, Metadata: e.Metadata, State: e.State}
	if e.Snapshot != nil {
		t.Members, t.Total, t.Stale = e.Snapshot.Members, e.Snapshot.Total, e.Snapshot.Stale
	}
	return t
}

// hello is the first event of a stream.
type hello struct {
	ID    string `json:"id"`
	Token string `json:"token"`
}

// events is a connection, from the request to its end.
func (a *app) events(w http.ResponseWriter, r *http.Request) {
	// Another site's page could not read the stream, but with a session's cookie
	// it would have whoever visits it be present.
	if site := r.Header.Get("Sec-Fetch-Site"); site == "cross-site" || site == "same-site" {
		http.Error(w, http.StatusText(http.StatusForbidden), http.StatusForbidden)
		return
	}
	s := newStream(w, a.cfg.write)
	defer s.last()
	c, err := a.open(r.Context(), r.FormValue("name"), r.FormValue("room"))
	if err != nil {
		refuse(w, err)
		return
	}
	defer a.close(r.Context(), c)

	// The request's context ends when the client goes. It ends here, too, when
	// the instance is to, and when a heartbeat could not be written.
	ctx, cancel := context.WithCancelCause(r.Context())
	defer context.AfterFunc(a.life, func() { cancel(errEnding) })()
	var beats sync.WaitGroup
	defer beats.Wait()
	defer cancel(nil) // before the waiting

	begun := false
	// On behalf of the connection: rules that have guards decide about it, also
	// later, when its metadata changes.
	for event, err := range a.presence.Subscribe(ctx, c.room, mesh.SubscribeOptions{Viewer: c.id}) {
		switch {
		case err != nil && !begun:
			refuse(w, err)
			return
		case err != nil: // why is for the log: the page comes back, and is told then if it may not
			a.cfg.log.Debug("stream ended", "conn", c.id, "error", err)
			_ = s.send("bye", struct{}{}) // fails where that is why
			return
		case !begun:
			begun = true
			if s.begin(hello{ID: c.id, Token: c.token}) != nil {
				return
			}
			beats.Go(func() { a.beat(ctx, s, cancel) })
		}
		if s.send("presence", toldOf(event)) != nil {
			return
		}
	}
}

// beat asks for a sign of life again and again, until ctx ends or one could not
// be written.
func (a *app) beat(ctx context.Context, s *stream, cancel context.CancelCauseFunc) {
	t := time.NewTicker(a.cfg.beat)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		if err := s.send("beat", struct{}{}); err != nil {
			cancel(err)
			return
		}
	}
}
