package main

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"github.com/meshpresence/mesh"
)

// update is an event of presence in the form that the page gets.
type update struct {
	Type     mesh.EventType  `json:"type"`
	ID       string          `json:"id,omitempty"`
	Metadata json.RawMessage `json:"metadata,omitempty"`
	State    json.RawMessage `json:"state"`             // null: it has ended, or there is none
	Members  []mesh.Member   `json:"members,omitempty"` // of a snapshot
	Total    int             `json:"total,omitempty"`   // number of members, of which Members may list only some
	Stale    bool            `json:"stale,omitempty"`   // Redis does not answer: this is the last known state
}

func updateOf(e mesh.Event) update {
	t := update{Type: e.Type, ID: e.ConnectionID, Metadata: e.Metadata, State: e.State}
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

// events serves a connection from the request to its end.
func (a *app) events(w http.ResponseWriter, r *http.Request) {
	// A page of another site could not read the stream. But with a session's cookie it
	// could make its visitors appear in the room.
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

	// The request's context ends when the client disconnects. This one also ends when the
	// instance shuts down, and when a ping could not be written.
	ctx, cancel := context.WithCancelCause(r.Context())
	defer context.AfterFunc(a.life, func() { cancel(errEnding) })()
	var pings sync.WaitGroup
	defer pings.Wait()
	defer cancel(nil) // runs before the wait

	begun := false
	// The viewer is the connection. The guards of the room's rule decide about it, now
	// and after each change of its metadata.
	for event, err := range a.presence.Subscribe(ctx, c.room, mesh.SubscribeOptions{Viewer: c.id}) {
		switch {
		case err != nil && !begun:
			refuse(w, err)
			return
		case err != nil: // the reason is only logged; the page reconnects, and then learns if it is refused
			a.cfg.log.Debug("stream ended", "conn", c.id, "error", err)
			_ = s.send("bye", struct{}{}) // fails if the client is gone
			return
		case !begun:
			begun = true
			if s.begin(hello{ID: c.id, Token: c.token}) != nil {
				return
			}
			pings.Go(func() { a.ping(ctx, s, cancel) })
		}
		if s.send("presence", updateOf(event)) != nil {
			return
		}
	}
}

// ping asks the page for a sign of life at regular intervals, until ctx ends or a ping
// could not be written.
func (a *app) ping(ctx context.Context, s *stream, cancel context.CancelCauseFunc) {
	t := time.NewTicker(a.cfg.ping)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		if err := s.send("ping", struct{}{}); err != nil {
			cancel(err)
			return
		}
	}
}
