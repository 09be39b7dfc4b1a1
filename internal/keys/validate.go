package keys

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/wire"
)

const (
	maxConnectionID = 128 // bytes
	maxPrefix       = 128 // bytes
)

// layoutWords come before the parts that users choose, in the names of keys and channels.
// A prefix must not contain them. Otherwise the prefix "a:room-meta:" would share names
// with the prefix "a:".
var layoutWords = []string{
	"presence:members:", "presence:conn:", "presence:state:", "presence:seq:", "presence:users:", "presence:recount:", "presence:events:",
	"room-meta:", "connection-meta:",
}

// ValidatePrefix returns an error that wraps ErrInvalidOptions for a prefix that hash
// tags, logs or people could misread, or whose names could be those of another prefix.
func ValidatePrefix(prefix string) error {
	switch {
	case !utf8.ValidString(prefix):
		return fmt.Errorf("%w: Prefix %q is not valid UTF-8", errs.InvalidOptions, prefix)
	case len(prefix) > maxPrefix:
		return fmt.Errorf("%w: Prefix is longer than %d bytes", errs.InvalidOptions, maxPrefix)
	case strings.ContainsAny(prefix, "{}"):
		return fmt.Errorf("%w: Prefix %q contains a brace", errs.InvalidOptions, prefix)
	case strings.ContainsFunc(prefix, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }):
		return fmt.Errorf("%w: Prefix %q holds whitespace or a control character", errs.InvalidOptions, prefix)
	}
	for _, word := range layoutWords {
		if strings.Contains(prefix, word) {
			return fmt.Errorf("%w: Prefix %q holds %q, which keys of the prefix before it have as well", errs.InvalidOptions, prefix, word)
		}
	}
	return nil
}

// ValidateConnectionID returns an error that wraps ErrInvalidConnectionID unless id is 1
// to 128 bytes of UTF-8 without colons, white space and control characters.
func ValidateConnectionID(id string) error {
	if validConnectionID(id) {
		return nil
	}
	return fmt.Errorf("%w: %s must be 1 to %d bytes of UTF-8 without colons, white space or control characters",
		errs.InvalidConnectionID, wire.Quote(id), maxConnectionID)
}

func validConnectionID(id string) bool {
	return id != "" && len(id) <= maxConnectionID && utf8.ValidString(id) &&
		!strings.ContainsFunc(id, func(r rune) bool {
			return r == ':' || unicode.IsSpace(r) || unicode.IsControl(r)
		})
}

// ValidateRoomName returns an error that wraps ErrInvalidRoom unless name is 1 to maxBytes
// bytes of UTF-8 without control characters. A maxBytes of zero or less is no limit.
func ValidateRoomName(name string, maxBytes int) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: it is empty", errs.InvalidRoom)
	case maxBytes > 0 && len(name) > maxBytes:
		return fmt.Errorf("%w: %s has %d bytes, more than %d", errs.InvalidRoom, wire.Quote(name), len(name), maxBytes)
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: %s is not UTF-8", errs.InvalidRoom, wire.Quote(name))
	case strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("%w: %s holds a control character", errs.InvalidRoom, wire.Quote(name))
	}
	return nil
}

// maxNameBytes is the maximum length of a server's name.
const maxNameBytes = 128

// ValidateServerName returns an error that wraps ErrInvalidOptions if a server may not have that name.
func ValidateServerName(name string) error {
	switch {
	case len(name) > maxNameBytes:
		return fmt.Errorf("%w: Name has %d bytes, must have at most %d", errs.InvalidOptions, len(name), maxNameBytes)
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: Name %q is not valid UTF-8", errs.InvalidOptions, name)
	case strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("%w: Name %q holds a control character", errs.InvalidOptions, name)
	}
	return nil
}
