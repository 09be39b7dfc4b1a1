package peers

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
)

const (
	// callRetry is the time without an answer after which a call is repeated.
	callRetry = 600 * time.Millisecond
	// CallLimit is the time without an answer after which a call fails.
	CallLimit = 1900 * time.Millisecond
)

// At returns a function for Call that always names the same incarnation.
func At(incarnation string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return incarnation, nil }
}

// Call asks a server to do something, and waits for the answer, for CallLimit at most. If
// it is this server, it executes the call itself. locate returns the incarnation of the
// server. It is called before each attempt, because a server may reregister.
func (p *Peers) Call(ctx context.Context, locate func(context.Context) (string, error), call Call) (Result, error) {
	if ctx == nil {
		return Result{}, fmt.Errorf("%w: nil context", errs.InvalidOptions)
	}
	ctx, cancel := context.WithTimeout(ctx, CallLimit)
	defer cancel()
	call.ID, call.From = rand.Text(), p.cfg.Incarnation()
	body, err := json.Marshal(call)
	if err != nil {
		return Result{}, fmt.Errorf("mesh: call: %w", err)
	}
	answered := make(chan answer, 1)
	p.mu.Lock()
	p.waiting[call.ID] = answered
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.waiting, call.ID)
		p.mu.Unlock()
	}()
	for {
		incarnation, err := locate(ctx)
		if err != nil {
			return Result{}, err
		}
		if incarnation == p.cfg.Incarnation() {
			return p.cfg.Execute(ctx, call)
		}
		if _, err := p.cfg.Publish(ctx, p.cfg.Channel(incarnation), wordCall+" "+string(body)); err != nil {
			return Result{}, p.cfg.ToError(ctx, err)
		}
		t := time.NewTimer(callRetry)
		select {
		case a := <-answered:
			t.Stop()
			return a.Result, a.err()
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			if errors.Is(ctx.Err(), context.Canceled) { // by the caller
				return Result{}, errs.Ended(ctx)
			}
			return Result{}, fmt.Errorf("%w: the connection's server does not answer", errs.Unavailable)
		}
	}
}
