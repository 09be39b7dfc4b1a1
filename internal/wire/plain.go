package wire

import (
	"bytes"
	"encoding/json"
	"strconv"
)

// Unmarshal decodes the payload of a decoded Request into dst, as
// json.Unmarshal does; what dst holds may share memory with it. Requests as
// clients write them, without escapes and fields that nobody asked for, are read
// in place: encoding/json costs more than the rest of a small command.
func Unmarshal(payload json.RawMessage, dst any) error {
	if p, ok := dst.(plainReader); ok && p.readPlain(payload) {
		return nil
	}
	return json.Unmarshal(payload, dst)
}

// plainReader is a request that can be read in place.
type plainReader interface {
	// readPlain reads a payload, which is valid JSON, and reports whether it could:
	// if not, the request is as it was.
	readPlain(payload []byte) bool
}

func (r *RoomRequest) readPlain(payload []byte) bool {
	name, ok := Name(""), IsObject(payload)
	if !ok {
		return false
	}
	for key, value := range members(payload) {
		if string(key) != `"roomName"` || !plainString(value) {
			return false
		}
		name = Name(value[1 : len(value)-1])
	}
	r.RoomName = name
	return true
}

func (r *PublishStateRequest) readPlain(payload []byte) bool {
	next := *r
	if !IsObject(payload) {
		return false
	}
	for key, value := range members(payload) {
		switch string(key) {
		case `"roomName"`:
			if !plainString(value) {
				return false
			}
			next.RoomName = Name(value[1 : len(value)-1])
		case `"state"`:
			next.State = value
		case `"silent"`:
			if value[0] != 't' && value[0] != 'f' {
				return false
			}
			next.Silent = value[0] == 't'
		case `"expireAfter"`:
			ms, err := strconv.ParseFloat(string(value), 64)
			if err != nil {
				return false
			}
			next.ExpireAfter = &ms
		default:
			return false
		}
	}
	*r = next
	return true
}

// plainString reports whether a JSON value is a string that stands for itself.
func plainString(value []byte) bool {
	return value[0] == '"' && bytes.IndexByte(value, '\\') < 0
}
