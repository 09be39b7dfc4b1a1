package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"time"

	"github.com/meshpresence/mesh"
)

const (
	maxBody    = 16 << 10
	bodyWithin = 10 * time.Second
	perSecond  = 20 // POST requests of one connection
)

// post handles a POST for the connection whose token it carries. A page of another site
// cannot send one, because it has no token, and no cookie replaces the token.
func (a *app) post(do func(ctx context.Context, c *conn, body []byte) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c := a.bearer(r)
		switch {
		case c == nil: // not on this instance, or ended: the page opens a new stream
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, http.StatusText(http.StatusUnauthorized), http.StatusUnauthorized)
			return
		case c.tooMany(time.Now()):
			http.Error(w, http.StatusText(http.StatusTooManyRequests), http.StatusTooManyRequests)
			return
		}
		body, err := readBody(w, r)
		if _, large := errors.AsType[*http.MaxBytesError](err); large {
			err = mesh.ErrTooLarge
		} else if err != nil {
			refuse(w, err) // the client is gone or too slow, and may not receive this
			return
		}
		if err == nil {
			err = do(r.Context(), c, body)
		}
		if err != nil {
			refuse(w, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}
}

// readBody reads the body of a request, limited in size and time.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	ctl := http.NewResponseController(w)
	if err := ctl.SetReadDeadline(time.Now().Add(bodyWithin)); err != nil {
		return nil, err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return nil, err
	}
	return body, ctl.SetReadDeadline(time.Time{}) // otherwise the request's context would end at the deadline
}

// tooMany counts a POST and reports whether the connection has sent too many.
func (c *conn) tooMany(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.second) >= time.Second {
		c.second, c.count = now, 0
	}
	c.count++
	return c.count > perSecond
}

func (a *app) join(ctx context.Context, c *conn, _ []byte) error {
	return a.presence.Join(ctx, c.room, c.id)
}

func (a *app) leave(ctx context.Context, c *conn, _ []byte) error {
	_, err := a.presence.Leave(ctx, c.room, c.id)
	return err
}

// state publishes the body, a JSON object. null clears the state.
func (a *app) state(ctx context.Context, c *conn, body []byte) error {
	if bytes.Equal(bytes.TrimSpace(body), []byte("null")) {
		return a.presence.ClearState(ctx, c.room, c.id)
	}
	return a.presence.PublishState(ctx, c.room, c.id, json.RawMessage(body), mesh.StateOptions{})
}

// alive answers a ping. If the entry has ended because of silence, this makes it join
// again.
func (a *app) alive(_ context.Context, c *conn, _ []byte) error { return a.presence.Touch(c.id) }
