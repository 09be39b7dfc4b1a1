package hub

import (
	"context"
	"sync"
	"time"
)

// askTimeout bounds one question about the generation.
const askTimeout = 2 * time.Second

// generationCache keeps the generation of Redis. It asks again only if the last
// answer is too old for the caller.
type generationCache struct {
	ask  func(context.Context) (id string, ok bool)
	lock chan struct{} // holds one token; its holder may ask

	mu        sync.Mutex // guards the following
	asked     bool
	askedAt   time.Time // of the last answer
	current   generation
	learnable bool // at least one answer had an id
}

// generation is one answer of Redis about its generation.
type generation struct {
	id string // empty: unknown
	// neverKnown says that no answer has ever had an id. An unknown generation then
	// does not mean that anything has changed.
	neverKnown bool
}

// mayDifferFrom reports whether Redis may have lost acknowledged writes since the
// earlier answer.
func (g generation) mayDifferFrom(earlier generation) bool {
	if g.id == "" {
		return !g.neverKnown
	}
	return g.id != earlier.id
}

func newGenerationCache(ask func(context.Context) (id string, ok bool)) *generationCache {
	c := &generationCache{ask: ask, lock: make(chan struct{}, 1)}
	c.lock <- struct{}{}
	return c
}

// learn returns the generation as of notBefore or later; the zero time accepts any
// answer. Concurrent callers share one question. A caller that accepts the last
// answer does not wait for the next one: while a node of a cluster is unreachable,
// a question takes long and fails.
func (c *generationCache) learn(ctx context.Context, notBefore time.Time) generation {
	if g, ok := c.known(notBefore); ok {
		return g
	}
	select {
	case <-c.lock:
	case <-ctx.Done():
		return generation{}
	}
	defer func() { c.lock <- struct{}{} }()
	if g, ok := c.known(notBefore); ok {
		return g
	}
	now := time.Now()
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	id, ok := c.ask(ctx)
	if !ok {
		id = ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.learnable = c.learnable || id != ""
	c.asked, c.askedAt, c.current = true, now, generation{id: id, neverKnown: !c.learnable}
	return c.current
}

// known returns the last answer and whether it is recent enough.
func (c *generationCache) known(notBefore time.Time) (generation, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current, c.asked && !c.askedAt.Before(notBefore)
}
