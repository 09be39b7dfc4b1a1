package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/owner"
)

// StateOptions say how a presence state is published. The zero value: until
// it is replaced, cleared, or its connection leaves; and everybody is told.
type StateOptions struct {
	// ExpireAfter is how long the state lives, in steps of a millisecond; then
	// subscribers are told that it has ended. Defaults to 0: as long as the
	// entry.
	ExpireAfter time.Duration
	// Silent stores the state without telling anybody. Snapshots show it.
	Silent bool
}

// PublishState sets the presence state of a connection in a room that it is
// in: an ephemeral JSON object ({"typing": true}, a cursor). It replaces the
// one before, and ends with the entry, by ClearState, or after ExpireAfter; an
// older state's expiry never ends a newer one. It is a sign of life.
//
// [ErrNotTracked] where no rule matches, [ErrNotPresent] where the connection is
// not in, [ErrInvalidState] where state is not an object, [ErrTooLarge] past
// Limits.StateBytes. The app itself publishes: no guard is asked.
func (p *PresenceManager) PublishState(ctx context.Context, room, connID string, state any, opts StateOptions) error {
	c, err := p.n.in(ctx, room, connID)
	if err != nil {
		return err
	}
	data, err := p.n.encodeFor(ctx, state, ErrInvalidState, p.n.encodeState)
	if err != nil {
		return err
	}
	if opts.ExpireAfter < 0 {
		return fmt.Errorf("%w: ExpireAfter is %v, must not be negative", ErrInvalidState, opts.ExpireAfter)
	}
	if err := p.n.comeBack(ctx, c, room); err != nil {
		return err
	}
	w, err := p.n.setState(c, room, data, opts)
	if err != nil {
		return p.n.errorFor(ctx, err)
	}
	return p.n.errorFor(ctx, w.Await(ctx))
}

// ClearState ends the presence state of a connection in a room; subscribers
// are told state null. Without a state it does nothing. It is a sign of life.
// [ErrNotTracked] and [ErrNotPresent] as in [PresenceManager.PublishState].
func (p *PresenceManager) ClearState(ctx context.Context, room, connID string) error {
	c, err := p.n.in(ctx, room, connID)
	if err != nil {
		return err
	}
	if err := p.n.comeBack(ctx, c, room); err != nil {
		return err
	}
	if !p.n.rules.match(room).tracked {
		return notTracked(room)
	}
	return p.n.errorFor(ctx, c.ClearState(ctx, room))
}

// setState sets a state; what it returns waits until Redis has it.
func (n *node) setState(c *owner.Conn, room string, data json.RawMessage, opts StateOptions) (owner.Write, error) {
	if !n.rules.match(room).tracked {
		return owner.Write{}, notTracked(room)
	}
	after := opts.ExpireAfter
	if after > 0 {
		after = max(after, time.Millisecond)
	}
	return c.SetState(room, data, after, opts.Silent)
}

// encodeState checks and encodes a presence state.
func (n *node) encodeState(state any) (json.RawMessage, error) {
	data, err := encodeJSON(state)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidState, err)
	}
	if len(data) == 0 || data[0] != '{' {
		return nil, fmt.Errorf("%w: not a JSON object", ErrInvalidState)
	}
	if over(len(data), n.opts.Limits.StateBytes) {
		return nil, fmt.Errorf("%w: presence state of %d bytes, limit %d", ErrTooLarge, len(data), n.opts.Limits.StateBytes)
	}
	return data, nil
}
