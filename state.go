package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/encode"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/wire"
)

// StateOptions are the options of a presence state. With the zero value the state lasts
// until it is replaced or cleared or its entry ends, and it is delivered to
// subscribers.
type StateOptions struct {
	// ExpireAfter is the lifetime of the state, in steps of a millisecond. At its end
	// subscribers get an update. Defaults to 0: the state lasts as long as the entry.
	ExpireAfter time.Duration
	// Silent stores the state without delivering it. Snapshots show it.
	Silent bool
	// Patch merges the top-level keys into the present state. null removes a key, and
	// other keys stay as they are. ExpireAfter applies to these keys only: at its end
	// subscribers get the state without them. Limits.StateBytes applies to the merged
	// state. If no key is left, the state ends. A state that is published without Patch
	// replaces all keys and their ends.
	Patch bool
}

// PublishState sets the presence state of a connection in a room that it is in. A state
// is an ephemeral JSON object ({"typing": true}, a cursor). It replaces the previous
// state, and ends with the entry, by ClearState, or after ExpireAfter. The expiry of an
// older state never ends a newer one. PublishState is a sign of life.
//
// It returns [ErrNotTracked] if no rule matches the room, [ErrNotPresent] if the
// connection is not in the room, [ErrInvalidState] if state is not an object, and
// [ErrTooLarge] beyond Limits.StateBytes. No guard is asked, because the app itself
// publishes.
func (p *PresenceManager) PublishState(ctx context.Context, room, connID string, state any, opts StateOptions) error {
	c, err := p.n.connIn(ctx, room, connID)
	if err != nil {
		return err
	}
	data, err := p.n.encoder().Encode(ctx, state, ErrInvalidState, p.n.stateEncoder(opts.Patch))
	if err != nil {
		return err
	}
	if opts.ExpireAfter < 0 {
		return fmt.Errorf("%w: ExpireAfter is %v, must not be negative", ErrInvalidState, opts.ExpireAfter)
	}
	if err := p.n.access.joins.Touch(ctx, c, room); err != nil {
		return err
	}
	w, err := p.n.setState(c, room, data, opts)
	if err != nil {
		return errorFor(ctx, err)
	}
	return errorFor(ctx, w.Await(ctx))
}

// ClearState ends the presence state of a connection in a room. Subscribers get an
// update with a nil state. Without a state it does nothing. It is a sign of life. It
// returns [ErrNotTracked] and [ErrNotPresent] as [PresenceManager.PublishState] does.
func (p *PresenceManager) ClearState(ctx context.Context, room, connID string) error {
	c, err := p.n.connIn(ctx, room, connID)
	if err != nil {
		return err
	}
	if err := p.n.access.joins.Touch(ctx, c, room); err != nil {
		return err
	}
	if !p.n.access.rules.Match(room).Tracked {
		return guards.NotTracked(room)
	}
	return errorFor(ctx, c.ClearState(ctx, room))
}

// setState sets a state. The returned Write waits until Redis has stored it.
func (n *core) setState(c *local.Conn, room string, data json.RawMessage, opts StateOptions) (local.Write, error) {
	if !n.access.rules.Match(room).Tracked {
		return local.Write{}, guards.NotTracked(room)
	}
	after := opts.ExpireAfter
	if after > 0 {
		after = max(after, time.Millisecond)
	}
	if opts.Patch {
		return c.PatchState(room, data, after, opts.Silent, n.opts.Limits.StateBytes)
	}
	return c.SetState(room, data, after, opts.Silent)
}

// stateEncoder returns the function that checks and encodes a state or a patch. The size of
// a patch has no limit of its own, because the merged state has one.
func (n *core) stateEncoder(patch bool) func(any) (json.RawMessage, error) {
	if patch {
		return encodeStateObject
	}
	return n.encodeState
}

// encodeState checks and encodes a presence state.
func (n *core) encodeState(state any) (json.RawMessage, error) {
	data, err := encodeStateObject(state)
	if err == nil && over(len(data), n.opts.Limits.StateBytes) {
		return nil, fmt.Errorf("%w: presence state of %d bytes, limit %d", ErrTooLarge, len(data), n.opts.Limits.StateBytes)
	}
	return data, err
}

// encodeStateObject is encodeState without a limit.
func encodeStateObject(state any) (json.RawMessage, error) {
	data, err := encode.JSON(state)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidState, err)
	}
	if len(data) == 0 || data[0] != '{' {
		return nil, fmt.Errorf("%w: not a JSON object", ErrInvalidState)
	}
	return data, nil
}

// errNoState is the answer to a publish command without a state.
var errNoState = errPayload(fmt.Errorf("%w: state is missing", wire.ErrPayload))

func publishPresenceState(ctx context.Context, c *Connection, req wire.Request) (reply, error) {
	n := c.core()
	var p wire.PublishStateRequest
	if err := req.Bind(&p); err != nil {
		return reply{}, errPayload(err)
	}
	room := string(p.RoomName)
	if err := n.checkRoom(room); err != nil {
		return reply{}, err
	}
	if !p.HasState() {
		return reply{}, errNoState
	}
	after, err := p.Expiry()
	if err != nil {
		return reply{}, errPayload(err)
	}
	data, err := n.stateEncoder(p.Patch)(p.State)
	if err != nil {
		return reply{}, err
	}
	return c.change(ctx, room, func() (local.Write, error) {
		return n.setState(c.local, room, data, StateOptions{ExpireAfter: after, Silent: p.Silent, Patch: p.Patch})
	})
}

func clearPresenceState(ctx context.Context, c *Connection, _ wire.Request, room string) (reply, error) {
	return c.change(ctx, room, func() (local.Write, error) { return c.local.SetState(room, nil, 0, false) })
}

// change changes the connection's state in a room, if it is a member and may see the
// room.
func (c *Connection) change(ctx context.Context, room string, do func() (local.Write, error)) (reply, error) {
	// After a silence, join guards may still decide whether it returns to the room.
	if err := c.core().access.joins.AwaitReturn(ctx, c.local, room); err != nil {
		return reply{}, err
	}
	if !c.local.In(room) {
		return reply{}, ErrNotPresent
	}
	if err := c.core().access.Check(ctx, c.id, room); err != nil {
		return reply{}, err
	}
	w, err := do()
	if err != nil {
		return reply{}, errorFor(ctx, err)
	}
	return pendingReply(true, w.Superseded(), func(ctx context.Context) error { return errorFor(ctx, w.Await(ctx)) }), nil
}

func getPresenceState(ctx context.Context, c *Connection, _ wire.Request, room string) (reply, error) {
	n := c.core()
	states, err := n.access.Read(ctx, c.id, room, wire.StateSnapshot{}, func() (any, error) { return n.stateAnswer(ctx, room) })
	return valueReply(states), err
}

// stateAnswer lists the members and states of a room: a wire.StateSnapshot or a
// wire.EncodedView.
func (n *core) stateAnswer(ctx context.Context, room string) (any, error) {
	if err := socket.AwaitAnswerSlot(ctx); err != nil {
		return nil, err
	}
	if v, ok := n.hub.View(room); ok {
		return wire.EncodedView{Success: true, Present: wire.Text{v.IDs()}, States: v.States(), Extent: extentOf(v.Listing)}, nil
	}
	if n.isAway(room) {
		limited, cancel := context.WithTimeout(ctx, awayLimit)
		defer cancel()
		ctx = limited
	}
	s, err := n.readPresent(ctx, room)
	if err != nil {
		return nil, err
	}
	answer := wire.StateSnapshot{Success: true, States: make(map[string]json.RawMessage)}
	answer.Extent = wire.Extent{Stale: s.Stale, Epoch: s.Epoch, Seq: s.Seq}
	for _, m := range s.Members {
		answer.Present = append(answer.Present, m.ID)
		if m.State != nil {
			answer.States[m.ID] = m.State
		}
	}
	if s.Total > len(s.Members) {
		answer.Total = wire.CountOf(s.Total)
	}
	return answer, nil
}
