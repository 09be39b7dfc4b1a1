package wire

import (
	"bytes"
	"errors"
	"strconv"
)

// Name is a name that a client sent. JSON can escape half of a surrogate pair, which
// UTF-8 cannot represent. encoding/json replaces it, so that two names of a client
// would become one name that the client does not know. Such a name is refused instead.
type Name string

var errHalfPair = errors.New("holds half of a surrogate pair")

// UnmarshalJSON accepts a JSON string. null changes nothing.
func (n *Name) UnmarshalJSON(raw []byte) error {
	if isNull(raw) {
		return nil
	}
	name, err := nameOf("a name", raw)
	if err == nil {
		*n = name
	}
	return err
}

// halfPair reports whether a JSON string escapes a surrogate without its other half.
func halfPair(quoted []byte) bool {
	for {
		i := bytes.IndexByte(quoted, '\\')
		if i < 0 {
			return false
		}
		quoted = quoted[i:]
		switch high := surrogate(quoted); {
		case high == 0:
			quoted = quoted[2:]
		case high >= 0xDC00 || surrogate(quoted[6:]) < 0xDC00:
			return true
		default:
			quoted = quoted[12:]
		}
	}
}

// surrogate returns the surrogate that is escaped at the beginning of b, or 0.
func surrogate(b []byte) uint64 {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return 0
	}
	code, err := strconv.ParseUint(string(b[2:6]), 16, 32)
	if err != nil || code < 0xD800 || code > 0xDFFF {
		return 0
	}
	return code
}
