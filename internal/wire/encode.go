package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// Appender is a payload that encodes itself. Answer and Push use AppendJSON if a
// payload has it, and encoding/json otherwise.
type Appender interface {
	// AppendJSON appends exactly one JSON value to dst and returns it.
	AppendJSON(dst []byte) []byte
}

// Raw is a payload that is JSON already. It is written without a check. Use
// json.RawMessage for JSON of doubtful origin.
type Raw []byte

// AppendJSON appends r as it is, or null if it is empty.
func (r Raw) AppendJSON(dst []byte) []byte {
	if len(r) == 0 {
		return append(dst, "null"...)
	}
	return append(dst, r...)
}

// Member is one member of a room.
type Member struct {
	ID           string          `json:"id"`
	UserID       string          `json:"userId,omitempty"`
	Metadata     json.RawMessage `json:"metadata"`               // nil: null
	JoinedAt     int64           `json:"joinedAt,omitempty"`     // unix ms; 0: unknown
	Disconnected bool            `json:"disconnected,omitempty"` // its place is kept
}

// StateOf is the state of one member.
type StateOf struct {
	ID    string
	State json.RawMessage // nil: none
}

// AppendMembers appends members as a JSON array. See AppendMember.
func AppendMembers(dst []byte, members []Member) []byte {
	dst = append(dst, '[')
	for i, m := range members {
		if i > 0 {
			dst = append(dst, ',')
		}
		m.Metadata = validOrNil(m.Metadata)
		dst, _ = AppendMember(dst, &m)
	}
	return append(dst, ']')
}

// AppendMember appends one member as an object {id, userId?, metadata, joinedAt?,
// disconnected?}. Its metadata must be valid JSON, or empty for none. rest is the number
// of bytes after the metadata.
func AppendMember(dst []byte, m *Member) (text []byte, rest int) {
	dst = appendString(append(dst, `{"id":`...), m.ID)
	if m.UserID != "" {
		dst = appendString(append(dst, `,"userId":`...), m.UserID)
	}
	dst = appendOrNull(append(dst, `,"metadata":`...), m.Metadata)
	end := len(dst)
	if m.JoinedAt != 0 {
		dst = strconv.AppendInt(append(dst, `,"joinedAt":`...), m.JoinedAt, 10)
	}
	if m.Disconnected {
		dst = append(dst, `,"disconnected":true`...)
	}
	dst = append(dst, '}')
	return dst, len(dst) - end
}

// AppendState appends a member's state as a field of an object, with its id as the
// name. state must be valid JSON.
func AppendState(dst []byte, id string, state []byte) []byte {
	return append(append(appendString(dst, id), ':'), state...)
}

// AppendIDs appends ids as a JSON array of strings.
func AppendIDs(dst []byte, ids []string) []byte {
	dst = append(dst, '[')
	for i, id := range ids {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendString(dst, id)
	}
	return append(dst, ']')
}

// AppendStates appends states as a JSON object from connection id to state, in the
// given order. Members without a state (nil) are left out.
func AppendStates(dst []byte, states []StateOf) []byte {
	dst = append(dst, '{')
	first := true
	for i := range states {
		if len(states[i].State) == 0 {
			continue
		}
		if !first {
			dst = append(dst, ',')
		}
		first = false
		dst = appendString(dst, states[i].ID)
		dst = append(dst, ':')
		dst = appendValue(dst, states[i].State)
	}
	return append(dst, '}')
}

// appendValue appends a user's JSON. Missing or invalid JSON (written to Redis by other
// software) becomes null: one broken record must not make the frame of a whole room
// unreadable.
func appendValue(dst []byte, raw []byte) []byte {
	if raw = validOrNil(raw); raw == nil {
		return append(dst, "null"...)
	}
	return append(dst, raw...)
}

// validOrNil returns raw, or nil if it is not valid JSON.
func validOrNil(raw []byte) []byte {
	if !Valid(raw) {
		return nil
	}
	return raw
}

// Valid reports whether raw is one JSON value in valid UTF-8.
func Valid(raw []byte) bool { return len(raw) > 0 && utf8.Valid(raw) && json.Valid(raw) }

// appendPayload appends the payload of a frame.
func appendPayload(dst []byte, payload any) ([]byte, error) {
	switch p := payload.(type) {
	case nil:
		return append(dst, "null"...), nil
	case Appender:
		return p.AppendJSON(dst), nil
	case bool:
		return strconv.AppendBool(dst, p), nil
	case string:
		return appendString(dst, p), nil
	}
	buf := bytes.NewBuffer(dst)
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false) // this is not HTML, and an escaped "<" has six bytes
	if err := enc.Encode(payload); err != nil {
		return dst, fmt.Errorf("mesh: cannot encode a payload: %w", err)
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte{'\n'}), nil
}

// maxQuoted limits the bytes of text that Quote includes.
const maxQuoted = 32

// Quote returns the beginning of a client's text as a JSON string, for messages to
// clients.
func Quote(s string) string {
	if len(s) <= maxQuoted {
		return string(appendString(nil, s))
	}
	end := maxQuoted
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return string(appendString(nil, s[:end])) + "…"
}

const hexDigits = "0123456789abcdef"

// appendString appends s as a JSON string. Bytes that are not UTF-8 become the
// replacement character.
func appendString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && size == 1 {
				dst = append(append(dst, s[start:i]...), "\uFFFD"...)
				start = i + 1
			}
			i += size
			continue
		}
		if c < ' ' || c == '"' || c == '\\' {
			dst = appendEscape(append(dst, s[start:i]...), c)
			start = i + 1
		}
		i++
	}
	return append(append(dst, s[start:]...), '"')
}

// appendEscape appends the escape sequence of a quote, a backslash or a control
// character.
func appendEscape(dst []byte, c byte) []byte {
	switch c {
	case '"', '\\':
		return append(dst, '\\', c)
	case '\n':
		return append(dst, '\\', 'n')
	case '\r':
		return append(dst, '\\', 'r')
	case '\t':
		return append(dst, '\\', 't')
	}
	return append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
}
