// Package errs holds the sentinel errors of package mesh, so that the packages under
// internal return the same values. Package mesh documents them.
package errs

//lint:file-ignore ST1012 errs.Refused says as much as errs.ErrRefused

import (
	"context"
	"errors"
	"fmt"
)

var (
	InvalidRoom         = errors.New("mesh: invalid room name")
	InvalidConnectionID = errors.New("mesh: invalid connection id")
	InvalidOptions      = errors.New("mesh: invalid options")
	InvalidPattern      = errors.New("mesh: invalid pattern")
	InvalidState        = errors.New("mesh: invalid presence state")
	InvalidMetadata     = errors.New("mesh: invalid metadata")
	NotTracked          = errors.New("mesh: room is not tracked")
	NotPresent          = errors.New("mesh: connection is not in the room")
	UnknownConnection   = errors.New("mesh: unknown connection")
	ConnectionExists    = errors.New("mesh: connection exists already")
	Refused             = errors.New("mesh: refused")
	Unavailable         = errors.New("mesh: redis is unavailable")
	TooLarge            = errors.New("mesh: too large")
	Limit               = errors.New("mesh: limit reached")
	Busy                = errors.New("mesh: busy")
	Closed              = errors.New("mesh: closed")
	NotStarted          = errors.New("mesh: not started")
	Incompatible        = errors.New("mesh: incompatible data in redis")
	Conflict            = errors.New("mesh: conflicting changes")
	SlowConsumer        = errors.New("mesh: slow consumer")
	InvalidCommand      = errors.New("mesh: invalid command name")
	InvalidMessage      = errors.New("mesh: invalid message")
	Full                = errors.New("mesh: room is full")
	InvalidUser         = errors.New("mesh: invalid user id")
	UsersOff            = errors.New("mesh: users are not tracked")
	CommandExists       = errors.New("mesh: command exists already")
)

// Has reports whether err wraps an error of type T.
func Has[T error](err error) bool {
	_, ok := errors.AsType[T](err)
	return ok
}

// Ended returns the error of a context that has ended, with its cause.
func Ended(ctx context.Context) error {
	if err, cause := ctx.Err(), context.Cause(ctx); !errors.Is(cause, err) {
		return fmt.Errorf("%w: %w", err, cause)
	}
	return context.Cause(ctx)
}
