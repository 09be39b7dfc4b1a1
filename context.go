package mesh

import (
	"context"
	"errors"
	"fmt"
)

// checkContext refuses a nil context: what would come of it is a panic deep
// inside, and half of the work done.
func checkContext(ctx context.Context) error {
	if ctx == nil {
		return fmt.Errorf("%w: nil context", ErrInvalidOptions)
	}
	return nil
}

// contextError says that ctx has ended, and why.
func contextError(ctx context.Context) error {
	if err, cause := ctx.Err(), context.Cause(ctx); !errors.Is(cause, err) {
		return fmt.Errorf("%w: %w", err, cause)
	}
	return context.Cause(ctx)
}

// errorFor is storeError for a caller that waited with ctx. If the caller has
// cancelled ctx, the error says so, because Redis has not failed.
func (n *node) errorFor(ctx context.Context, err error) error {
	out := n.storeError(err)
	if errors.Is(ctx.Err(), context.Canceled) && (errors.Is(err, context.Canceled) || errors.Is(out, ErrUnavailable)) {
		return contextError(ctx)
	}
	return out
}

// usableFor is usable for a method that takes a context from the app.
func (n *node) usableFor(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	return n.usable()
}
