// Package userid reads the id of a user from the metadata of a connection.
package userid

import (
	"bytes"
	"encoding/json"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxBytes is the most bytes of a user id.
const MaxBytes = 128

// Valid reports whether id can be the id of a user: 1 to MaxBytes bytes of UTF-8 without
// control characters and without U+FFFD. A decoder of JSON puts U+FFFD in the place of a
// broken character, so that two ids with it may be those of two people.
func Valid(id string) bool {
	return id != "" && len(id) <= MaxBytes && utf8.ValidString(id) &&
		!strings.ContainsFunc(id, func(r rune) bool { return r == utf8.RuneError || unicode.IsControl(r) })
}

// Field returns the user id in a top-level field of metadata. The value must be a string,
// or an integer, whose digits are taken as they are written. The name of the field counts
// exactly. found reports whether metadata has the field with a value other than null. The
// id is "" if there is none, if the field occurs twice, or if the value is not a valid id.
func Field(metadata json.RawMessage, name string) (id string, found bool) {
	dec := json.NewDecoder(bytes.NewReader(metadata))
	dec.UseNumber() // a float has no room for the digits of a large integer
	if start, err := dec.Token(); err != nil || start != json.Delim('{') {
		return "", false
	}
	var value json.RawMessage
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return "", true
		}
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return "", true
		}
		if key != name {
			continue
		}
		if value != nil {
			return "", true
		}
		value = v
	}
	if _, err := dec.Token(); err != nil {
		return "", true
	}
	switch {
	case value == nil || string(value) == "null":
		return "", false
	case value[0] == '"':
		if json.Unmarshal(value, &id) != nil || !utf8.Valid(value) {
			return "", true
		}
	case isInteger(value):
		id = string(value)
	}
	if !Valid(id) {
		return "", true
	}
	return id, true
}

// isInteger reports whether a JSON value is a number without fraction and exponent.
func isInteger(value []byte) bool {
	digits := bytes.TrimPrefix(value, []byte("-"))
	return len(digits) > 0 && !bytes.ContainsFunc(digits, func(r rune) bool { return r < '0' || r > '9' })
}
