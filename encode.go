package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"
)

var (
	errNotUTF8 = errors.New("not valid UTF-8")
	// errNotEncoded marks the result of a command that does not encode to JSON.
	errNotEncoded = errors.New("mesh: the result does not encode to JSON")
)

// marshal returns v as JSON in valid UTF-8, as json.Marshal does without
// escapes for HTML. It may call the app's own methods, see encodeFor.
func marshal(v any) (json.RawMessage, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false) // it goes into a WebSocket frame, not into HTML
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	data := bytes.TrimSuffix(buf.Bytes(), []byte{'\n'})
	if !utf8.Valid(data) { // of a json.RawMessage or a method: a browser would close the connection
		return nil, errNotUTF8
	}
	return data, nil
}

// encodeJSON returns v as JSON without insignificant space, in memory of its
// own. A json.RawMessage or []byte is JSON already: it is checked, and keeps
// its digits and key order. Any other value is marshalled, which may call the
// app's own methods, see encodeFor. The result is nil for nil, an empty
// json.RawMessage and everything that encodes to null.
func encodeJSON(v any) (json.RawMessage, error) {
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
		if raw, err = marshal(v); err != nil {
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

// encodeFor encodes a value that the app gave to a method. If the encoding may
// call methods of the app's (MarshalJSON and the like), it runs as a callback:
// recovered, counted, and limited by ctx and Options.HookTimeout. A panic and
// the end of that time are errors that wrap invalid, if that is not nil. An
// error of the app's method is wrapped, as encoding/json does.
func (n *node) encodeFor(ctx context.Context, v any, invalid error, encode func(any) (json.RawMessage, error)) (json.RawMessage, error) {
	if isPlain(v) {
		return encode(v)
	}
	type result struct {
		data json.RawMessage
		err  error
	}
	encoded := make(chan result, 1) // it may be left behind
	err := n.calls.run(ctx, callbackEncode, n.opts.HookTimeout, func(context.Context) error {
		data, err := encode(v)
		encoded <- result{data, err}
		return err
	})
	if err == nil {
		return (<-encoded).data, nil
	}
	if ctx.Err() != nil {
		return nil, contextError(ctx)
	}
	if invalid != nil && (holds[*panicError](err) || holds[*timeoutError](err)) {
		err = fmt.Errorf("%w: %w", invalid, err)
	}
	if known, ok := err.(*appError); ok { // so encode has returned
		err = &encodeError{known, (<-encoded).err}
	}
	return nil, err
}

// encodeError is why a value that the app gave to a method does not encode. The
// app may look for an error of its own in it, with errors.Is and errors.As. This
// package must not: that calls methods of the app's.
type encodeError struct {
	known *appError
	err   error
}

// Error returns the text that err had.
func (e *encodeError) Error() string { return e.known.Error() }

// Unwrap returns both errors.
func (e *encodeError) Unwrap() []error { return []error{e.known, e.err} }
