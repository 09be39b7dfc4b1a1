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
	perSecond  = 20 // POSTs of one connection
)

// act is a POST on behalf of the connection whose token it carries. A page of
// another site cannot make one: it has no token, and no cookie stands in for it.
func (a *app) act(do func(ctx context.Context, c *conn, body []byte) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c := a.bearer(r)
		switch {
		case c == nil: // not here, or not any more: the page opens a new stream
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
			refuse(w, err) // it has gone, or took too long: it may not get this
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

// readBody reads what a request carries, in limited time and of limited size.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	ctl := http.NewResponseController(w)
	if err := ctl.SetReadDeadline(time.Now().Add(bodyWithin)); err != nil {
		return nil, err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return nil, err
	}
	return body, ctl.SetReadDeadline(time.Time{}) // or the request's context would end then
}

// tooMany counts a POST.
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

// state publishes the body, a JSON object; null ends what was published.
func (a *app) state(ctx context.Context, c *conn, body []byte) error {
	if bytes.Equal(bytes.TrimSpace(body), []byte("null")) {
		return a.presence.ClearState(ctx, c.room, c.id)
	}
	return a.presence.PublishState(ctx, c.room, c.id, json.RawMessage(body), mesh.StateOptions{})
}

// alive answers a heartbeat. Whoever had been silent for too long is joined
// again by it.
func (a *app) alive(_ context.Context, c *conn, _ []byte) error { return a.presence.Touch(c.id) }
