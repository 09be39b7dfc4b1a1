package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
)

// fieldReader is a request that decodes its own fields. encoding/json accepts
// "ROOMNAME" for "roomName", names Go types in its errors, and costs more than the rest
// of a small command.
type fieldReader interface {
	// readFields decodes an object, which must be valid JSON.
	readFields(object []byte) error
}

// errNotAnObject is the error for a payload that is not an object.
var errNotAnObject = errors.New("payload must be an object")

// Unmarshal decodes the payload of a Request into dst, a pointer to one of the request
// structs. As in JavaScript, names must match exactly, the last one of equal names
// counts, unknown fields are ignored, and null counts as missing. A payload that is
// missing or null is an empty object. dst may share memory with the payload.
//
// Errors are written for the client: they name the field and the JSON type.
func Unmarshal(payload json.RawMessage, dst any) error {
	r, ok := dst.(fieldReader)
	switch {
	case !ok:
		return fmt.Errorf("mesh: %T is no request", dst)
	case isNull(payload):
		return r.readFields([]byte("{}"))
	case !IsObject(payload):
		return errNotAnObject
	}
	return r.readFields(payload)
}

// Fields returns the values of an object's fields with the given names, in that order.
// The value is nil if the field is missing or null. Names must match exactly, and the
// last one of equal names counts. object must be valid JSON and an object.
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
	joinFields       = []string{"roomName", "replaces"}
	publishFields    = []string{"roomName", "state", "expireAfter", "silent", "patch"}
	occupancyFields  = []string{"roomNames"}
	listFields       = []string{"roomName", "cursor", "limit"}
	connectionFields = []string{"connectionId"}
	strategyFields   = []string{"strategy"}
)

func (r *RoomRequest) readFields(object []byte) (err error) {
	var v [1]json.RawMessage
	readMembers(object, roomFields, v[:])
	r.RoomName, err = nameOf("roomName", v[0])
	return err
}

func (r *JoinRequest) readFields(object []byte) (err error) {
	var v [2]json.RawMessage
	readMembers(object, joinFields, v[:])
	var next JoinRequest
	if next.RoomName, err = nameOf("roomName", v[0]); err != nil {
		return err
	}
	if next.Replaces, err = nameOf("replaces", v[1]); err != nil {
		return err
	}
	*r = next
	return nil
}

func (r *OccupancyRequest) readFields(object []byte) (err error) {
	var v [1]json.RawMessage
	readMembers(object, occupancyFields, v[:])
	r.RoomNames, err = namesOf("roomNames", v[0])
	return err
}

func (r *ListPresenceRequest) readFields(object []byte) (err error) {
	var v [3]json.RawMessage
	readMembers(object, listFields, v[:])
	var next ListPresenceRequest
	if next.RoomName, err = nameOf("roomName", v[0]); err != nil {
		return err
	}
	if next.Cursor, err = nameOf("cursor", v[1]); err != nil {
		return err
	}
	if next.Limit, err = numberOf("limit", v[2]); err != nil {
		return err
	}
	*r = next
	return nil
}

func (r *GetMetadataRequest) readFields(object []byte) (err error) {
	var v [1]json.RawMessage
	readMembers(object, connectionFields, v[:])
	r.ConnectionID, err = nameOf("connectionId", v[0])
	return err
}

func (r *PublishStateRequest) readFields(object []byte) (err error) {
	var v [5]json.RawMessage
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
	if next.Patch, err = boolOf("patch", v[4]); err != nil {
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
			next.Metadata = value // null differs from missing
		case "options":
			options = value
		}
	}
	if !isNull(options) {
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

// nameOf decodes a string; nil becomes the empty string.
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

// namesOf decodes an array of strings; nil becomes nil.
func namesOf(field string, value json.RawMessage) ([]Name, error) {
	if value == nil {
		return nil, nil
	}
	if value[0] != '[' {
		return nil, fmt.Errorf("%s must be an array of strings", field)
	}
	var names []Name
	for item := range elements(value) {
		if item[0] != '"' {
			return nil, fmt.Errorf("%s must be an array of strings", field)
		}
		name, err := nameOf(field, item)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// numberOf decodes a number; nil becomes nil.
func numberOf(field string, value json.RawMessage) (*float64, error) {
	if value == nil {
		return nil, nil
	}
	if value[0] != '-' && (value[0] < '0' || value[0] > '9') {
		return nil, fmt.Errorf("%s must be a number", field)
	}
	n, _ := strconv.ParseFloat(string(value), 64) // value is valid JSON; a number out of range becomes infinite
	return &n, nil
}

// boolOf decodes a boolean; nil becomes false.
func boolOf(field string, value json.RawMessage) (bool, error) {
	if value == nil {
		return false, nil
	}
	if value[0] != 't' && value[0] != 'f' {
		return false, fmt.Errorf("%s must be true or false", field)
	}
	return value[0] == 't', nil
}
