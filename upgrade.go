package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
)

// retryAfter is what a client that was turned away is told, in seconds.
const retryAfter = "2"

// arrivals limits how many connections are accepted per second, so that a
// thousand clients that come back at once do not take the server down.
type arrivals struct {
	mu     sync.Mutex // guards bucket
	bucket limit.Bucket
}

func (a *arrivals) allow() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bucket.Take(time.Now())
}

// refuseUpgrade closes the connection with its answer: a client that is told to
// come back later must not keep a file descriptor until then.
func refuseUpgrade(w http.ResponseWriter, status int) {
	w.Header().Set("Retry-After", retryAfter)
	w.Header().Set("Connection", "close")
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
	err := s.n.calls.run(r.Context(), callbackAuthenticate, s.n.opts.HookTimeout, func(ctx context.Context) error {
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

// reserve counts a connection in, if one more may be.
func (s *Server) reserve() error {
	if err := s.n.usable(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving.begun {
		return ErrClosed
	}
	if over(s.open+1, s.most) {
		return fmt.Errorf("%w: %d connections", ErrLimit, s.most)
	}
	s.open++
	return nil
}

func (s *Server) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
	if s.leaving.begun && s.open == 0 {
		close(s.gone) // once: it does not rise again
	}
}
