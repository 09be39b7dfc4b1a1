package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"
)

// ErrNotMesh means that a frame is not a request of the Mesh protocol: it is not JSON,
// not an object, or has no command. Such a frame gets no answer.
var ErrNotMesh = errors.New("mesh: not a Mesh frame")

// ErrPayload means that a request's payload lacks a field of its command, or that a
// field has the wrong type.
var ErrPayload = errors.New("mesh: invalid payload")

// The reasons for ErrNotMesh are built once, so that a hostile client cannot make the
// server allocate errors.
var (
	errNotObject = fmt.Errorf("%w: not a JSON object in UTF-8", ErrNotMesh)
	errNested    = fmt.Errorf("%w: nested too deeply", ErrNotMesh)
	errNoCommand = fmt.Errorf("%w: no command", ErrNotMesh)
)

// Request is one frame from a client.
type Request struct {
	// ID is the request's id as the client wrote it: the digits of a JSON number, which
	// the answer repeats. It is empty if HasID is false.
	ID string
	// HasID reports whether there is an id. A request without an id, or with one that
	// is not a number, is carried out but not answered.
	HasID bool
	// Command may be empty. No handler has that name.
	Command string
	// Payload is nil if the frame has none. It shares memory with the frame.
	Payload json.RawMessage
	// Size is the length of the whole frame, including white space. It is the maximum
	// memory that the request keeps.
	Size int
	// Also holds the ids of earlier requests that this one supersedes. They get the
	// same answer.
	Also []string
}

// Decode decodes one text frame. The frame must be a JSON object with a string as its
// "command", valid UTF-8, and nested at most MaxDepth deep. Otherwise the error wraps
// ErrNotMesh. As in JavaScript, names must match exactly, and the last one of equal
// names counts.
//
// Decode does not decode the payload, see Request.Bind. The request shares memory with
// frame, which must not be changed afterwards.
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

// Bind decodes the payload into dst. See Unmarshal. The error wraps ErrPayload.
func (r *Request) Bind(dst any) error {
	if err := Unmarshal(r.Payload, dst); err != nil {
		return fmt.Errorf("%w: %w", ErrPayload, err)
	}
	return nil
}

// intern returns name as a string, without allocating it for known commands.
func intern(name []byte) string {
	if s, ok := knownCommands[string(name)]; ok {
		return s
	}
	return string(name)
}
