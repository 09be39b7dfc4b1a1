package hub

import (
	"context"
	"sync"
	"time"
)

// askTimeout bounds one question about the generation.
const askTimeout = 2 * time.Second

// generation knows which Redis process answers, and asks again only where the
// last answer is too old for the question.
type generation struct {
	store Store
	turn  chan struct{} // holds one token; who has it may ask

	mu        sync.Mutex // guards the following
	asked     bool
	at        time.Time // when the last answer was asked for
	current   era
	learnable bool // an answer came at least once
}

// era is one answer to the question which Redis process this is.
type era struct {
	id string // empty: not known
	// trusted says that not knowing means nothing: it never could be known.
	trusted bool
}

// since reports whether the Redis process may be another one than it was at
// the earlier era.
func (e era) since(earlier era) bool {
	if e.id == "" {
		return !e.trusted
	}
	return e.id != earlier.id
}

func newGeneration(s Store) *generation {
	g := &generation{store: s, turn: make(chan struct{}, 1)}
	g.turn <- struct{}{}
	return g
}

// learn returns an answer that was asked for at the given time or later; the
// zero time takes any. Callers that want it together ask together. Who is
// content with the last answer does not wait for the next: while a node of a
// cluster is out of reach that takes long, and fails.
func (g *generation) learn(ctx context.Context, notBefore time.Time) era {
	if e, ok := g.known(notBefore); ok {
		return e
	}
	select {
	case <-g.turn:
	case <-ctx.Done():
		return era{}
	}
	defer func() { g.turn <- struct{}{} }()
	if e, ok := g.known(notBefore); ok {
		return e
	}
	now := time.Now()
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	id, ok := g.store.Generation(ctx)
	if !ok {
		id = ""
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.learnable = g.learnable || id != ""
	g.asked, g.at, g.current = true, now, era{id: id, trusted: !g.learnable}
	return g.current
}

// known returns the last answer, if it is recent enough.
func (g *generation) known(notBefore time.Time) (era, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.current, g.asked && !g.at.Before(notBefore)
}
