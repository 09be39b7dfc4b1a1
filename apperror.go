package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"runtime/debug"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
)

// appError is an error of the app's code as it was when that code returned.
// The methods of an error (Error, Is, As, Unwrap) are the app's code as well:
// they may panic, block or end the goroutine. So they are called once, where
// the app's code runs recovered and limited in time, and never again.
type appError struct {
	text   string
	public string  // the part that a client may read
	known  []error // errors of this package, of contexts and of encoding/json that it wraps
}

func (e *appError) Error() string { return e.text }

// Unwrap returns only values whose methods are not the app's.
func (e *appError) Unwrap() []error { return e.known }

// sentinels are the errors that are looked for in an app's error.
var sentinels = []error{
	ErrInvalidRoom, ErrInvalidConnectionID, ErrInvalidOptions, ErrInvalidPattern, ErrInvalidState, ErrInvalidMetadata,
	ErrNotTracked, ErrNotPresent, ErrUnknownConnection, ErrConnectionExists, ErrRefused, ErrUnavailable, ErrTooLarge,
	ErrLimit, ErrBusy, ErrClosed, ErrNotStarted, ErrIncompatible, ErrConflict, ErrSlowConsumer, ErrInvalidCommand,
	ErrInvalidMessage, ErrCommandExists,
	store.ErrFull, errNotEncoded, context.Canceled, context.DeadlineExceeded, errCalledOff,
}

// plainError is the type of errors.New.
var plainError = reflect.TypeOf(errPrivate)

// frozen returns a copy of an error that the app's code returned, made without
// calling its methods. cause is the reason why its context ended, nil if it has not.
func frozen(err, cause error) error {
	// By identity and by type: no method is called.
	if err == nil || slices.Contains(sentinels, err) || reflect.TypeOf(err) == plainError {
		return err
	}
	switch err.(type) {
	case *appError, *panicError, *timeoutError:
		return err
	}
	if wrapsTooMany(err) { // errors.Is might not end
		text := err.Error()
		return &appError{text: text, public: text, known: []error{errPrivate}}
	}
	e := &appError{text: err.Error(), public: clientText(err)}
	for _, s := range sentinels {
		if errors.Is(err, s) {
			e.known = append(e.known, s)
		}
	}
	if cause != nil && errors.Is(err, cause) {
		e.known = append(e.known, errGaveUp)
	}
	if private(err) {
		e.known = append(e.known, errPrivate)
	}
	e.known = append(e.known, typed(err)...)
	return e
}

// mostWrapped is how many errors one may wrap. One that wraps itself, by mistake,
// wraps any number.
const mostWrapped = 1000

// wrapsTooMany reports whether err wraps more than mostWrapped errors.
func wrapsTooMany(err error) bool {
	left := mostWrapped
	var visit func(err error) bool
	visit = func(err error) bool {
		for err != nil {
			if left--; left < 0 {
				return true
			}
			switch w := err.(type) {
			case interface{ Unwrap() error }:
				err = w.Unwrap()
			case interface{ Unwrap() []error }:
				return slices.ContainsFunc(w.Unwrap(), visit)
			default:
				return false
			}
		}
		return false
	}
	return visit(err)
}

// typed returns the errors that err wraps and that carry data, as copies.
func typed(err error) (all []error) {
	if c, ok := errors.AsType[*CommandError](err); ok {
		if c != nil {
			c = &CommandError{Code: c.Code, Name: c.Name, Message: c.Message}
		}
		all = append(all, c)
	}
	if r, ok := errors.AsType[*Refusal](err); ok {
		if r != nil {
			r = &Refusal{Status: r.Status, Message: r.Message}
		}
		all = append(all, r)
	}
	if u, ok := errors.AsType[*json.UnsupportedTypeError](err); ok {
		all = append(all, u)
	}
	if p, ok := errors.AsType[*panicError](err); ok {
		all = append(all, p)
	}
	return all
}

// panicError says that a callback of the app panicked, or ended its goroutine
// with runtime.Goexit. Its text never goes to a client.
type panicError struct {
	name  string // of the callback
	value any
	stack []byte
}

// newPanicError must be called where the app's code is recovered: the value
// may have methods of the app's, which it reads here, once.
func newPanicError(name string, value any) *panicError {
	return &panicError{name: name, value: limit.Shorten(fmt.Sprint(value)), stack: debug.Stack()}
}

func (e *panicError) Error() string { return fmt.Sprintf("mesh: %s panicked: %v", e.name, e.value) }

// timeoutError says that a callback of the app did not return in time. It is a
// context.DeadlineExceeded.
type timeoutError struct {
	name  string
	after time.Duration
}

func (e *timeoutError) Error() string {
	return fmt.Sprintf("mesh: %s did not return within %v", e.name, e.after)
}

func (e *timeoutError) Unwrap() error { return context.DeadlineExceeded }

// errGoexit is the value of a panicError whose callback called runtime.Goexit.
var errGoexit = errors.New("runtime.Goexit was called")
