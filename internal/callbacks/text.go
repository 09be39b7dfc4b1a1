package callbacks

import (
	"encoding/json"
	"errors"
	"net"
	"reflect"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/errs"
)

// IsPrivate reports whether the text of err must not reach a client. It may hold key
// names, addresses, names of Go types, or a value that a callback panicked with.
func IsPrivate(err error) bool {
	if errors.Is(err, errPrivate) || errors.Is(err, ErrNotEncoded) || errors.Is(err, redis.ErrClosed) || errors.Is(err, redis.ErrPoolTimeout) {
		return true
	}
	return errs.Has[redis.Error](err) || errs.Has[net.Error](err) || errs.Has[*PanicError](err) ||
		errs.Has[*json.UnsupportedTypeError](err) || errs.Has[*json.UnsupportedValueError](err) ||
		errs.Has[*json.MarshalerError](err) || errs.Has[*json.InvalidUnmarshalError](err)
}

// ClientText returns the text of an error for a client. It describes types in the words of
// JSON, not of Go.
func ClientText(err error) string {
	if e, ok := err.(*Frozen); ok {
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

// wrongType describes the type that a value should have.
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

// jsonKind returns the name that JSON has for a Go type.
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
