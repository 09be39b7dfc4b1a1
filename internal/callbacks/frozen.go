package callbacks

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"slices"

	"github.com/meshpresence/mesh/internal/errs"
)

// Frozen is a copy of an error that a callback returned. The methods of an error (Error,
// Is, As, Unwrap) are code of the app as well: they may panic, block or end the goroutine.
// So they are called once, on the goroutine of the callback, and never again.
type Frozen struct {
	text   string
	public string  // the text that a client may read
	known  []error // the known and the typed errors that it wraps
}

func (e *Frozen) Error() string { return e.text }

// Unwrap returns only errors whose methods are not the app's.
func (e *Frozen) Unwrap() []error { return e.known }

// knownErrors are looked for in the errors of callbacks.
var knownErrors = []error{
	errs.InvalidRoom, errs.InvalidConnectionID, errs.InvalidOptions, errs.InvalidPattern, errs.InvalidState, errs.InvalidMetadata,
	errs.NotTracked, errs.NotPresent, errs.UnknownConnection, errs.ConnectionExists, errs.Refused, errs.Unavailable, errs.TooLarge,
	errs.Limit, errs.Busy, errs.Closed, errs.NotStarted, errs.Incompatible, errs.Conflict, errs.SlowConsumer, errs.InvalidCommand,
	errs.InvalidMessage, errs.CommandExists,
	ErrNotEncoded, context.Canceled, context.DeadlineExceeded, ErrCanceled,
}

// plainError is the type of errors.New.
var plainError = reflect.TypeOf(errPrivate)

// freezer makes Frozen errors.
type freezer struct {
	known []error
	typed func(error) []error // see Config
}

// freeze returns a copy of an error of the app. cause is the reason why the context of the
// callback ended, or nil if it has not.
func (f freezer) freeze(err, cause error) error {
	// These compare by identity and by type, and so call no methods.
	if err == nil || slices.Contains(f.known, err) || reflect.TypeOf(err) == plainError {
		return err
	}
	switch err.(type) {
	case *Frozen, *PanicError, *TimeoutError:
		return err
	}
	if WrapsTooMany(err) { // errors.Is might not end
		text := err.Error()
		return &Frozen{text: text, public: text, known: []error{errPrivate}}
	}
	e := &Frozen{text: err.Error(), public: ClientText(err)}
	for _, s := range f.known {
		if errors.Is(err, s) {
			e.known = append(e.known, s)
		}
	}
	if cause != nil && errors.Is(err, cause) {
		e.known = append(e.known, errContextEnded)
	}
	if IsPrivate(err) {
		e.known = append(e.known, errPrivate)
	}
	if f.typed != nil {
		e.known = append(e.known, f.typed(err)...)
	}
	if u, ok := errors.AsType[*json.UnsupportedTypeError](err); ok {
		e.known = append(e.known, u)
	}
	if p, ok := errors.AsType[*PanicError](err); ok {
		e.known = append(e.known, p)
	}
	return e
}

// mostWrapped limits how many errors one error may wrap. An error that wraps itself, by
// mistake, wraps any number.
const mostWrapped = 1000

// WrapsTooMany reports whether err wraps so many errors that it may wrap itself. If it
// does, errors.Is may not end.
func WrapsTooMany(err error) bool {
	left := mostWrapped
	return AnyWrapped(err, func(error) bool {
		left--
		return left < 0
	})
}

// AnyWrapped reports whether is returns true for err or an error that it wraps.
func AnyWrapped(err error, is func(error) bool) bool {
	for err != nil {
		if is(err) {
			return true
		}
		switch w := err.(type) {
		case interface{ Unwrap() error }:
			err = w.Unwrap()
		case interface{ Unwrap() []error }:
			return slices.ContainsFunc(w.Unwrap(), func(one error) bool { return AnyWrapped(one, is) })
		default:
			return false
		}
	}
	return false
}
