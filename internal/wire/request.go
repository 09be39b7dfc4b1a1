package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"
)

// ErrNotMesh says that a frame is not a request of the Mesh protocol: not
// JSON, not an object, or without a command. Such text gets no answer.
var ErrNotMesh = errors.New("mesh: not a Mesh frame")

// ErrPayload says that a request's payload does not have the fields, or not
// the types, that its command asks for.
var ErrPayload = errors.New("mesh: invalid payload")

// The reasons for ErrNotMesh, built once: a hostile client must not make the
// server allocate errors.
var (
	errNotObject = fmt.Errorf("%w: not a JSON object in UTF-8", ErrNotMesh)
	errNested    = fmt.Errorf("%w: nested too deeply", ErrNotMesh)
	errNoCommand = fmt.Errorf("%w: no command", ErrNotMesh)
)

// Request is one frame from a client.
type Request struct {
	// ID is the request's id as the client wrote it: the digits of a JSON
	// number, to be echoed in the answer. Empty if HasID is false.
	ID string
	// HasID tells whether there is an id. Requests without one, or with one
	// that is not a number, are carried out but not answered.
	HasID bool
	// Command may be empty: then no handler has it.
	Command string
	// Payload is nil if the frame has none. It shares memory with the frame.
	Payload json.RawMessage
	// Size is the length of the whole frame: what the request keeps in memory
	// at most, whatever it was padded with.
	Size int
}

// Decode reads one text frame. It returns an error that wraps ErrNotMesh
// unless the frame is a JSON object, in valid UTF-8 and nested at most
// MaxDepth deep, with a string as its "command". As in JavaScript,
// names count exactly as written and of equal names the last one counts.
//
// Decode does not look into the payload, see Request.Bind. The request shares
// memory with frame, which must not be changed afterwards.
func Decode(frame []byte) (Request, error) {
	body := trimSpace(frame)
	if len(body) == 0 || body[0] != '{' || !utf8.Valid(body) || !json.Valid(body) {
		return Request{}, errNotObject
	}
	if deeperThan(body, MaxDepth) {
		return Request{}, errNested
	}
	var id, command, payload []byte
	for key, value := range members(body) {
		switch string(unquoted(key)) {
		case "id":
			id = value
		case "command":
			command = value
		case "payload":
			payload = value
		}
	}
	if len(command) == 0 || command[0] != '"' {
		return Request{}, errNoCommand
	}
	req := Request{Command: intern(unquoted(command)), Payload: payload, Size: len(frame)}
	if len(id) > 0 && (id[0] == '-' || '0' <= id[0] && id[0] <= '9') {
		req.ID, req.HasID = string(id), true
	}
	return req, nil
}

// Bind decodes the payload into dst, see Unmarshal. The error wraps ErrPayload.
func (r *Request) Bind(dst any) error {
	if err := Unmarshal(r.Payload, dst); err != nil {
		return fmt.Errorf("%w: %w", ErrPayload, err)
	}
	return nil
}

// intern returns name as a string, without allocating for known commands.
func intern(name []byte) string {
	if s, ok := known[string(name)]; ok {
		return s
	}
	return string(name)
}
