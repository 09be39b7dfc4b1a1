package mesh

import (
	"context"
	"errors"
	"time"

	"github.com/meshpresence/mesh/internal/owner"
	"github.com/meshpresence/mesh/internal/store"
)

// connect registers a connection. If one is closing under the same id, connect
// waits for its end.
func (n *node) connect(ctx context.Context, id string, metadata []byte, link owner.Link) (*owner.Conn, error) {
	if err := n.usable(); err != nil {
		return nil, err
	}
	if err := validateConnectionID(id); err != nil {
		return nil, err
	}
	for {
		c, err := n.owner.Connect(id, metadata, link, func() { n.verdicts.remember(id) })
		if err == nil {
			return c, nil
		}
		gone := n.owner.Closing(id)
		if _, open := n.owner.Conn(id); open || !errors.Is(err, owner.ErrExists) || gone == nil {
			return nil, n.errorFor(ctx, err)
		}
		if err := n.awaitGone(ctx, gone); err != nil {
			return nil, err
		}
	}
}

// close ends a connection, and its socket if it has one.
func (n *node) close(c *owner.Conn) {
	if n.control.closer != nil {
		n.control.closer(c.ID())
	}
	n.disconnect(c)
}

// disconnect ends a connection: its subscriptions, its entries, its metadata.
func (n *node) disconnect(c *owner.Conn) {
	if !c.Claim() {
		return // another caller does, or has done
	}
	// The id is free for another connection as soon as this one is closed, so
	// everything kept under it is removed first.
	n.joins.takeOutAll(c)
	n.watchers.forget(c.ID())
	n.verdicts.forget(c.ID())
	c.Close(store.CauseClosed)
}

func (n *node) awaitGone(ctx context.Context, gone <-chan struct{}) error {
	t := time.NewTimer(callLimit)
	defer t.Stop()
	select {
	case <-gone:
		return nil
	case <-t.C:
		return ErrUnavailable
	case <-ctx.Done():
		return contextError(ctx)
	}
}
