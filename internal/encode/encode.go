// Package encode encodes values of the app to JSON. The methods of such a value
// (MarshalJSON and the like) are code of the app, so they run as callbacks.
package encode

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/errs"
)

var errNotUTF8 = errors.New("not valid UTF-8")

// Marshal returns v as JSON in valid UTF-8, as json.Marshal does, but without the escapes
// for HTML. It may call methods of the app, see Encoder.
func Marshal(v any) (json.RawMessage, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false) // a WebSocket frame is not HTML
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	data := bytes.TrimSuffix(buf.Bytes(), []byte{'\n'})
	if !utf8.Valid(data) { // a browser would close the connection
		return nil, errNotUTF8
	}
	return data, nil
}

// JSON returns v as JSON without insignificant space, in its own memory. A json.RawMessage
// or []byte is JSON already: it is checked, and keeps its digits and key order. Any other
// value is marshalled, which may call methods of the app, see Encoder. The result is nil
// for nil, for an empty json.RawMessage, and for a value that encodes to null.
func JSON(v any) (json.RawMessage, error) {
	var raw []byte
	switch v := v.(type) {
	case nil:
		return nil, nil
	case json.RawMessage:
		raw = v
	case []byte:
		raw = v
	default:
		var err error
		if raw, err = Marshal(v); err != nil {
			return nil, err
		}
	}
	if len(raw) == 0 {
		return nil, nil
	}
	if !utf8.Valid(raw) {
		return nil, errNotUTF8
	}
	var out bytes.Buffer
	out.Grow(len(raw))
	if err := json.Compact(&out, raw); err != nil {
		return nil, err
	}
	if bytes.Equal(out.Bytes(), []byte("null")) {
		return nil, nil
	}
	return out.Bytes(), nil
}

// Encoder encodes values that the app gives to methods.
type Encoder struct {
	Calls   *callbacks.Runner
	Timeout time.Duration // of a value whose methods are called
}

// Encode calls encode with v. If the encoding may call methods of the app, it runs as a
// callback, limited by ctx and Timeout. The error for a panic or a timeout wraps invalid,
// if that is not nil. The error of a method of the app is wrapped, as encoding/json does.
func (e Encoder) Encode(ctx context.Context, v any, invalid error, encode func(any) (json.RawMessage, error)) (json.RawMessage, error) {
	if isPlain(v) {
		return encode(v)
	}
	type result struct {
		data json.RawMessage
		err  error
	}
	encoded := make(chan result, 1) // the callback may outlive its time
	err := e.Calls.Run(ctx, callbacks.Encode, e.Timeout, func(context.Context) error {
		data, err := encode(v)
		encoded <- result{data, err}
		return err
	})
	if err == nil {
		return (<-encoded).data, nil
	}
	if ctx.Err() != nil {
		return nil, errs.Ended(ctx)
	}
	if invalid != nil && (errs.Has[*callbacks.PanicError](err) || errs.Has[*callbacks.TimeoutError](err)) {
		err = fmt.Errorf("%w: %w", invalid, err)
	}
	if frozen, ok := err.(*callbacks.Frozen); ok { // so encode has returned
		err = &Error{frozen, (<-encoded).err}
	}
	return nil, err
}

// Error says why a value of the app does not encode. The app may look for its own error
// in it, with errors.Is and errors.As. This library must not, because that calls methods
// of the app.
type Error struct {
	frozen *callbacks.Frozen
	err    error
}

// Error returns the text of the app's error.
func (e *Error) Error() string { return e.frozen.Error() }

// Unwrap returns the frozen error and the app's own.
func (e *Error) Unwrap() []error { return []error{e.frozen, e.err} }
