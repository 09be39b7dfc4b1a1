package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"reflect"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/store"
)

// wireErrors lists the code and text that a client gets for an error. The first
// match wins, so that an error which also wraps one of Redis is reported as
// unavailable. If the text is empty the error's own text is sent: it is about the
// client's own request.
var wireErrors = []struct {
	is   error
	code string
	text string
}{
	{store.ErrFull, codeUnavailable, "Temporarily unavailable: storage is full"},
	{ErrUnavailable, codeUnavailable, "Temporarily unavailable"},
	{store.ErrUnavailable, codeUnavailable, "Temporarily unavailable"},
	{store.ErrFenced, codeUnavailable, "Temporarily unavailable"},
	{store.ErrLate, codeUnavailable, "Temporarily unavailable"},
	{store.ErrClock, codeUnavailable, "Temporarily unavailable"},
	{ErrIncompatible, codeUnavailable, "Temporarily unavailable"},
	{ErrNotStarted, codeUnavailable, "Temporarily unavailable"},
	{ErrClosed, codeClosed, "Closed"},
	{ErrBusy, codeBusy, "Busy"},
	{ErrSlowConsumer, codeBusy, "Too slow"},
	{ErrRefused, codeRefused, "Refused"},
	{ErrConflict, codeConflict, "Conflicting changes"},
	{ErrConnectionExists, codeExists, "Connection exists already"},
	{ErrNotTracked, codeNotFound, "Room is not tracked"},
	{ErrNotPresent, codeNotFound, "Not in the room"},
	{ErrUnknownConnection, codeNotFound, "Unknown connection"},
	{ErrTooLarge, codeTooLarge, ""},
	{ErrLimit, codeLimit, ""},
	{ErrInvalidRoom, codeInvalid, ""},
	{ErrInvalidConnectionID, codeInvalid, ""},
	{ErrInvalidState, codeInvalid, ""},
	{ErrInvalidMetadata, codeInvalid, ""},
}

// wireError returns the fields error, code and name of the error answer that a
// client gets for err. Text of Redis, of the network, of a
// panic and of Go's type system never gets there; the text of an app's own
// plain error does.
func wireError(err error) (message, code, name string) {
	if err == nil {
		return textInternal, codeServer, nameError
	}
	if ce, ok := errors.AsType[*CommandError](err); ok {
		return ce.wire()
	}
	if r, ok := errors.AsType[*Refusal](err); ok {
		_, message = r.response()
		return message, codeRefused, nameCommandError
	}
	for _, w := range wireErrors {
		if !errors.Is(err, w.is) {
			continue
		}
		if message = w.text; message == "" {
			message = publicText(err, w.is)
		}
		return message, w.code, nameCommandError
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "Timed out", codeTimeout, nameCommandError
	}
	if errors.Is(err, context.Canceled) {
		return "Closed", codeClosed, nameCommandError
	}
	if private(err) {
		return textInternal, codeServer, nameError
	}
	return clientText(err), codeServer, nameError
}

// publicText is err's own text, or the sentinel's if err's is private.
func publicText(err, sentinel error) string {
	text := sentinel.Error()
	if !private(err) {
		text = clientText(err)
	}
	return strings.ReplaceAll(strings.TrimPrefix(text, "mesh: "), ": mesh: ", ": ")
}

// clientText is the text of an error without Go's words for the types of JSON.
func clientText(err error) string {
	if e, ok := err.(*appError); ok {
		return e.public
	}
	text := err.Error()
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		text = strings.ReplaceAll(text, e.Error(), wrongType(e))
	}
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		text = strings.ReplaceAll(text, e.Error(), "not valid JSON")
	}
	return text
}

// wrongType describes, in the words of JSON, the type that a value should have.
func wrongType(e *json.UnmarshalTypeError) string {
	field := e.Field
	if field == "" {
		field = "it"
	}
	if strings.HasPrefix(e.Value, "number ") {
		return field + " is out of range"
	}
	return field + " must be " + jsonKind(e.Type)
}

// jsonKind names what JSON has for a Go type.
func jsonKind(t reflect.Type) string {
	if t == nil {
		return "of another type"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return jsonKind(t.Elem())
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a string"
	case reflect.Slice, reflect.Array:
		return "an array"
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Float32, reflect.Float64:
		return "a number"
	}
	return "of another type"
}

// errPrivate marks an appError whose text must not reach a client.
var errPrivate = errors.New("mesh: private")

// private reports whether err's text must not reach a client: it may hold key
// names, addresses, names of Go types, or a value that a callback panicked with.
func private(err error) bool {
	if errors.Is(err, errPrivate) || errors.Is(err, errNotEncoded) || errors.Is(err, redis.ErrClosed) || errors.Is(err, redis.ErrPoolTimeout) {
		return true
	}
	return holds[redis.Error](err) || holds[net.Error](err) || holds[*panicError](err) ||
		holds[*json.UnsupportedTypeError](err) || holds[*json.UnsupportedValueError](err) ||
		holds[*json.MarshalerError](err) || holds[*json.InvalidUnmarshalError](err)
}

// holds reports whether err wraps an error of type T.
func holds[T error](err error) bool {
	_, ok := errors.AsType[T](err)
	return ok
}
