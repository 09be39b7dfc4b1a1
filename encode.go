package mesh

import (
	"bytes"
	"encoding/json"
	"errors"
	"unicode/utf8"
)

// encodeJSON returns v as JSON without insignificant space, in memory of its
// own. A json.RawMessage or []byte is JSON already: it is checked, and keeps
// its digits and key order. Any other value is marshalled, which may call the
// app's own methods. No value is nil: that is what nil, an empty
// json.RawMessage and everything that encodes to null give.
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
		var buf bytes.Buffer
		enc := json.NewEncoder(&buf)
		enc.SetEscapeHTML(false) // it goes into a WebSocket frame, not into HTML
		if err := enc.Encode(v); err != nil {
			return nil, err
		}
		raw = buf.Bytes()
	}
	if len(raw) == 0 {
		return nil, nil
	}
	if !utf8.Valid(raw) {
		return nil, errors.New("not valid UTF-8")
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
