package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"iter"
	"unicode/utf8"
)

// MaxDepth is how deeply arrays and objects may be nested in a frame. It lies
// far below the 10,000 at which encoding/json gives up, so that what one
// client sent can always be wrapped into an answer for another.
const MaxDepth = 512

// What CheckValue finds wrong with a JSON value.
var (
	// ErrNotJSON says that text is not one JSON value in valid UTF-8.
	ErrNotJSON = errors.New("mesh: not valid JSON")
	// ErrTooDeep says that arrays and objects are nested too deeply.
	ErrTooDeep = errors.New("mesh: JSON nested too deeply")
)

// CheckValue returns nil if raw is exactly one JSON value, in valid UTF-8 and
// nested at most MaxDepth deep; otherwise ErrNotJSON or ErrTooDeep. UTF-8
// matters: a browser closes the connection on a text frame that is not, so
// one client's bytes could disconnect every watcher of its room.
func CheckValue(raw []byte) error {
	if !utf8.Valid(raw) || !json.Valid(raw) {
		return ErrNotJSON
	}
	if deeperThan(raw, MaxDepth) {
		return ErrTooDeep
	}
	return nil
}

// IsNull reports whether raw is missing (empty) or the JSON value null.
func IsNull(raw json.RawMessage) bool {
	b := trimSpace(raw)
	return len(b) == 0 || b[0] == 'n'
}

// IsObject reports whether raw, which must be valid JSON, is an object.
func IsObject(raw json.RawMessage) bool {
	b := trimSpace(raw)
	return len(b) > 0 && b[0] == '{'
}

// isSpace reports whether c is white space between JSON tokens.
func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

// trimSpace cuts JSON's white space (less than what bytes.TrimSpace takes for
// such) off both ends.
func trimSpace(b []byte) []byte {
	for len(b) > 0 && isSpace(b[0]) {
		b = b[1:]
	}
	for len(b) > 0 && isSpace(b[len(b)-1]) {
		b = b[:len(b)-1]
	}
	return b
}

// deeperThan reports whether valid JSON is nested deeper than limit.
func deeperThan(b []byte, limit int) bool {
	// Nothing can be nested deeper than it has opening brackets, and counting
	// those is much faster than looking at every byte.
	if bytes.Count(b, []byte{'{'})+bytes.Count(b, []byte{'['}) <= limit {
		return false
	}
	depth := 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			i = skipString(b, i) - 1
		case '{', '[':
			if depth++; depth > limit {
				return true
			}
		case '}', ']':
			depth--
		}
	}
	return false
}

// skipString returns the index after the JSON string that begins at b[i].
func skipString(b []byte, i int) int {
	for i++; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return len(b)
}

// skipValue returns the index after the JSON value that begins at b[i].
func skipValue(b []byte, i int) int {
	switch b[i] {
	case '"':
		return skipString(b, i)
	case '{', '[':
		return skipNested(b, i)
	}
	for i < len(b) && b[i] != ',' && b[i] != '}' && b[i] != ']' && !isSpace(b[i]) {
		i++
	}
	return i
}

// skipNested returns the index after the array or object that begins at b[i].
// It does not recurse, whatever the depth.
func skipNested(b []byte, i int) int {
	depth := 0
	for ; i < len(b); i++ {
		switch b[i] {
		case '"':
			i = skipString(b, i) - 1
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1
			}
		}
	}
	return len(b)
}

// members yields the keys (with their quotes) and values of an object in
// order, as slices of obj. obj must be valid JSON and an object.
func members(obj []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(key, value []byte) bool) {
		i := skipSpace(obj, skipSpace(obj, 0)+1)
		for i < len(obj) && obj[i] == '"' {
			end := skipString(obj, i)
			key := obj[i:end]
			i = skipSpace(obj, skipSpace(obj, end)+1) // over the colon
			if i >= len(obj) {
				return
			}
			end = skipValue(obj, i)
			if !yield(key, obj[i:end]) {
				return
			}
			i = skipSpace(obj, skipSpace(obj, end)+1) // over the comma
		}
	}
}

// skipSpace returns the index of the first byte from i on that is not space.
func skipSpace(b []byte, i int) int {
	for i < len(b) && isSpace(b[i]) {
		i++
	}
	return i
}

// unquoted returns the text of a JSON string: a slice of it where that
// suffices, a decoded copy where it has escapes.
func unquoted(quoted []byte) []byte {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return quoted[1 : len(quoted)-1]
	}
	var s string
	if err := json.Unmarshal(quoted, &s); err != nil {
		return nil // unreachable: quoted is part of valid JSON
	}
	return []byte(s)
}
