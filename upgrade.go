package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"time"
)

// retryAfter is what a client that was turned away is told, in seconds.
const retryAfter = "2"

// arrivals limits how many connections are accepted per second, so that a
// thousand clients that come back at once do not take the server down.
type arrivals struct {
	perSecond float64 // negative: no limit

	mu   *sync.Mutex // guards the fields below
	left *float64
	last *time.Time
}

func newArrivals(perSecond int) arrivals {
	left, last := float64(perSecond), time.Now()
	return arrivals{perSecond: float64(perSecond), mu: new(sync.Mutex), left: &left, last: &last}
}

func (a *arrivals) allow() bool {
	if a.perSecond < 0 {
		return true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	*a.left = min(a.perSecond, *a.left+a.perSecond*now.Sub(*a.last).Seconds())
	*a.last = now
	if *a.left < 1 {
		return false
	}
	*a.left--
	return true
}

func refuseUpgrade(w http.ResponseWriter, status int) {
	w.Header().Set("Retry-After", retryAfter)
	http.Error(w, http.StatusText(status), status)
}

// authenticate asks the app's hook about a request and returns the connection's
// first metadata.
func (s *Server) authenticate(r *http.Request) (json.RawMessage, error) {
	hook := s.n.opts.Authenticate
	if hook == nil {
		return nil, nil
	}
	answer := make(chan json.RawMessage, 1) // the hook may outlive its time
	err := s.n.calls.run(r.Context(), "Authenticate", s.n.opts.HookTimeout, func(ctx context.Context) error {
		value, err := hook(ctx, r)
		if err != nil {
			return err
		}
		data, err := s.n.encodeMetadata(value)
		answer <- data
		return err
	})
	if err != nil {
		return nil, err
	}
	return <-answer, nil
}

// refusalOf returns what a client whose request was refused is told: what a
// *Refusal says, and of any other error nothing.
func refusalOf(err error) (status int, message string) {
	var r *Refusal
	if !errors.As(err, &r) {
		r = &Refusal{}
	}
	return r.response()
}
