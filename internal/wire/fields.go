package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
)

// fieldReader is a request that reads its fields by itself. encoding/json
// takes "ROOMNAME" for "roomName", names Go types in its errors, and costs more
// than the rest of a small command.
type fieldReader interface {
	// readFields reads an object, which is valid JSON.
	readFields(object []byte) error
}

// errNotAnObject is the error for a payload that is an array, a string, …
var errNotAnObject = errors.New("payload must be an object")

// Unmarshal decodes the payload of a decoded Request into dst, a pointer to one
// of the request structs. As in JavaScript, names count exactly as written, of
// equal names the last one counts, unknown fields are ignored, and null counts
// as missing. A payload that is missing or null is an empty object. dst may
// share memory with the payload.
//
// Errors are meant for the client: they name the field and the JSON type.
func Unmarshal(payload json.RawMessage, dst any) error {
	r, ok := dst.(fieldReader)
	switch {
	case !ok:
		return fmt.Errorf("mesh: %T is no request", dst)
	case IsNull(payload):
		return r.readFields([]byte("{}"))
	case !IsObject(payload):
		return errNotAnObject
	}
	return r.readFields(payload)
}

// Fields returns the values of an object's members of the given names, in their
// order; nil for a name that is missing or null. Names count exactly as
// written, and of equal names the last one counts. object must be valid JSON
// and an object.
func Fields(object []byte, names ...string) []json.RawMessage {
	values := make([]json.RawMessage, len(names))
	readMembers(object, names, values)
	return values
}

func readMembers(object []byte, names []string, values []json.RawMessage) {
	for key, value := range members(object) {
		name := unquoted(key)
		for i := range names {
			if string(name) != names[i] {
				continue
			}
			if values[i] = value; value[0] == 'n' {
				values[i] = nil
			}
		}
	}
}

// The names of the fields of requests.
var (
	roomFields       = []string{"roomName"}
	publishFields    = []string{"roomName", "state", "expireAfter", "silent"}
	connectionFields = []string{"connectionId"}
	strategyFields   = []string{"strategy"}
)

func (r *RoomRequest) readFields(object []byte) (err error) {
	var v [1]json.RawMessage
	readMembers(object, roomFields, v[:])
	r.RoomName, err = nameOf("roomName", v[0])
	return err
}

func (r *GetMetadataRequest) readFields(object []byte) (err error) {
	var v [1]json.RawMessage
	readMembers(object, connectionFields, v[:])
	r.ConnectionID, err = nameOf("connectionId", v[0])
	return err
}

func (r *PublishStateRequest) readFields(object []byte) (err error) {
	var v [4]json.RawMessage
	readMembers(object, publishFields, v[:])
	next := PublishStateRequest{State: v[1]}
	if next.RoomName, err = nameOf("roomName", v[0]); err != nil {
		return err
	}
	if next.ExpireAfter, err = numberOf("expireAfter", v[2]); err != nil {
		return err
	}
	if next.Silent, err = boolOf("silent", v[3]); err != nil {
		return err
	}
	*r = next
	return nil
}

func (r *SetMetadataRequest) readFields(object []byte) error {
	var next SetMetadataRequest
	var options json.RawMessage
	for key, value := range members(object) {
		switch string(unquoted(key)) {
		case "metadata":
			next.Metadata = value // null is not the same as missing
		case "options":
			options = value
		}
	}
	if !IsNull(options) {
		if !IsObject(options) {
			return errors.New("options must be an object")
		}
		strategy, err := nameOf("options.strategy", Fields(options, strategyFields...)[0])
		if err != nil {
			return err
		}
		next.Options.Strategy = Strategy(strategy)
	}
	*r = next
	return nil
}

// nameOf reads a string; nil is the empty one.
func nameOf(field string, value json.RawMessage) (Name, error) {
	if value == nil {
		return "", nil
	}
	if value[0] != '"' {
		return "", fmt.Errorf("%s must be a string", field)
	}
	if bytes.IndexByte(value, '\\') < 0 {
		return Name(value[1 : len(value)-1]), nil
	}
	if halfPair(value) {
		return "", fmt.Errorf("%s %w", field, errHalfPair)
	}
	return Name(unquoted(value)), nil
}

// numberOf reads a number; nil for nil.
func numberOf(field string, value json.RawMessage) (*float64, error) {
	if value == nil {
		return nil, nil
	}
	if value[0] != '-' && (value[0] < '0' || value[0] > '9') {
		return nil, fmt.Errorf("%s must be a number", field)
	}
	n, _ := strconv.ParseFloat(string(value), 64) // of valid JSON: infinite if it is out of range
	return &n, nil
}

// boolOf reads a boolean; false for nil.
func boolOf(field string, value json.RawMessage) (bool, error) {
	if value == nil {
		return false, nil
	}
	if value[0] != 't' && value[0] != 'f' {
		return false, fmt.Errorf("%s must be true or false", field)
	}
	return value[0] == 't', nil
}
