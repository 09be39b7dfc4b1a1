package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"iter"
	"unicode/utf8"
)

// MaxDepth limits the nesting of arrays and objects in a frame. It is far below the
// 10,000 at which encoding/json fails, so that a value from one client can always be
// wrapped into an answer for another.
const MaxDepth = 512

// The errors of CheckValue.
var (
	// ErrNotJSON means that the text is not one JSON value in valid UTF-8.
	ErrNotJSON = errors.New("mesh: not valid JSON")
	// ErrTooDeep means that arrays and objects are nested too deeply.
	ErrTooDeep = errors.New("mesh: JSON nested too deeply")
)

// CheckValue returns ErrNotJSON unless raw is exactly one JSON value in valid UTF-8,
// and ErrTooDeep if it is nested deeper than MaxDepth. Invalid UTF-8 is dangerous: a
// browser closes the connection on such a text frame, so the bytes of one client could
// disconnect all subscribers of its room.
func CheckValue(raw []byte) error {
	if !utf8.Valid(raw) || !json.Valid(raw) {
		return ErrNotJSON
	}
	if deeperThan(raw, MaxDepth) {
		return ErrTooDeep
	}
	return nil
}

// isNull reports whether raw is missing (empty) or the JSON value null.
func isNull(raw json.RawMessage) bool {
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

// trimSpace removes JSON's white space from both ends. bytes.TrimSpace would remove
// more.
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
	// The text has at least as many opening brackets as levels. Counting them is much
	// faster than the loop below.
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

// skipNested returns the index after the array or object that begins at b[i]. It does
// not recurse.
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

// members yields the keys (with their quotes) and values of an object in order, as
// slices of obj. obj must be valid JSON and an object.
func members(obj []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(key, value []byte) bool) {
		i := skipSpace(obj, skipSpace(obj, 0)+1)
		for i < len(obj) && obj[i] == '"' {
			end := skipString(obj, i)
			key := obj[i:end]
			i = skipSpace(obj, skipSpace(obj, end)+1) // skip the colon
			if i >= len(obj) {
				return
			}
			end = skipValue(obj, i)
			if !yield(key, obj[i:end]) {
				return
			}
			i = skipSpace(obj, skipSpace(obj, end)+1) // skip the comma
		}
	}
}

// elements yields the elements of an array in order, as slices of arr. arr must be valid
// JSON and an array.
func elements(arr []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		i := skipSpace(arr, skipSpace(arr, 0)+1)
		for i < len(arr) && arr[i] != ']' {
			end := skipValue(arr, i)
			if !yield(arr[i:end]) {
				return
			}
			i = skipSpace(arr, skipSpace(arr, end)+1) // skip the comma
		}
	}
}

// skipSpace returns the index of the first byte at or after i that is not space.
func skipSpace(b []byte, i int) int {
	for i < len(b) && isSpace(b[i]) {
		i++
	}
	return i
}

// unquoted returns the text of a JSON string: a slice of it, or a decoded copy if it
// has escapes.
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
