package wire

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"time"
)

// RoomRequest is the payload of the commands that only name a room: leave, subscribe,
// unsubscribe, clear state, get state and get room metadata.
type RoomRequest struct {
	RoomName Name `json:"roomName"`
}

// JoinRequest is the payload of CommandJoinRoom.
type JoinRequest struct {
	RoomName Name `json:"roomName"`
	// Replaces is the last connection of the client, whose place the new one takes.
	// Empty: none.
	Replaces Name `json:"replaces,omitempty"`
}

// PublishStateRequest is the payload of CommandPublishPresenceState.
type PublishStateRequest struct {
	RoomName    Name            `json:"roomName"`
	State       json.RawMessage `json:"state"`       // nil or null: refused
	ExpireAfter *float64        `json:"expireAfter"` // milliseconds, see Expiry
	Silent      bool            `json:"silent"`      // store it without an update
	// Patch says that State is merged into the present state: a value sets a key, and
	// null removes it.
	Patch bool `json:"patch,omitempty"`
}

// HasState reports whether the request brings a state. null brings none.
func (r *PublishStateRequest) HasState() bool { return !isNull(r.State) }

// Expiry returns the life of the state, rounded up to milliseconds. 0 means that the
// state ends with its entry, which null, zero and negative numbers ask for. If the time
// does not fit a time.Duration, the error wraps ErrPayload.
func (r *PublishStateRequest) Expiry() (time.Duration, error) {
	if r.ExpireAfter == nil || !(*r.ExpireAfter > 0) {
		return 0, nil
	}
	ms := math.Ceil(*r.ExpireAfter)
	if ms > float64(math.MaxInt64/int64(time.Millisecond)-1) {
		return 0, fmt.Errorf("%w: expireAfter is too large", ErrPayload)
	}
	return time.Duration(ms) * time.Millisecond, nil
}

// GetMetadataRequest is the payload of CommandGetConnectionMetadata.
type GetMetadataRequest struct {
	ConnectionID Name `json:"connectionId"`
}

// SetMetadataRequest is the payload of CommandSetMyConnectionMetadata.
type SetMetadataRequest struct {
	Metadata json.RawMessage `json:"metadata"` // nil: missing
	Options  struct {
		Strategy Strategy `json:"strategy"` // empty: StrategyReplace
	} `json:"options"`
}

// Success is the answer to commands without another result.
type Success struct {
	Success bool `json:"success"`
}

// AppendJSON appends the answer.
func (s Success) AppendJSON(dst []byte) []byte {
	return append(strconv.AppendBool(append(dst, `{"success":`...), s.Success), '}')
}

// Metadata is the answer to the commands that read metadata.
type Metadata struct {
	Metadata json.RawMessage `json:"metadata"` // nil: null
}

// AppendJSON appends the answer.
func (m Metadata) AppendJSON(dst []byte) []byte {
	return append(appendValue(append(dst, `{"metadata":`...), m.Metadata), '}')
}

// Ended is the payload of PushPresenceEnded, PushMembershipEnded and PushOccupancyEnded.
type Ended struct {
	RoomName string `json:"roomName"`
}

// AppendJSON appends the payload.
func (e Ended) AppendJSON(dst []byte) []byte { return append(appendRoom(dst, e.RoomName), '}') }

// RoomJoined is the payload of PushRoomJoined.
type RoomJoined struct {
	RoomName string `json:"roomName"`
}

// AppendJSON appends the payload.
func (r RoomJoined) AppendJSON(dst []byte) []byte { return append(appendRoom(dst, r.RoomName), '}') }

// RoomLeft is the payload of PushRoomLeft.
type RoomLeft struct {
	RoomName string `json:"roomName"`
	Reason   string `json:"reason"` // ReasonRemoved or ReasonFull
}

// AppendJSON appends the payload.
func (r RoomLeft) AppendJSON(dst []byte) []byte {
	dst = append(appendRoom(dst, r.RoomName), `,"reason":`...)
	return append(appendString(dst, r.Reason), '}')
}

// appendRoom appends the beginning of an object whose first field is the name of a room.
func appendRoom(dst []byte, name string) []byte {
	return appendString(append(dst, `{"roomName":`...), name)
}

// PresenceStale is the payload of PushPresenceStale.
type PresenceStale struct {
	Stale     bool     `json:"stale"`
	RoomNames []string `json:"roomNames,omitempty"` // empty: all rooms
}

// AppendJSON appends the payload.
func (p PresenceStale) AppendJSON(dst []byte) []byte {
	dst = strconv.AppendBool(append(dst, `{"stale":`...), p.Stale)
	if len(p.RoomNames) > 0 {
		dst = AppendIDs(append(dst, `,"roomNames":`...), p.RoomNames)
	}
	return append(dst, '}')
}

// ErrorPayload is the payload of the answer to a failed request.
type ErrorPayload struct {
	Message string `json:"error"`
	Code    string `json:"code"`
	Name    string `json:"name"`
}

// AppendJSON appends the payload.
func (e ErrorPayload) AppendJSON(dst []byte) []byte {
	dst = appendString(append(dst, `{"error":`...), e.Message)
	dst = appendString(append(dst, `,"code":`...), e.Code)
	return append(appendString(append(dst, `,"name":`...), e.Name), '}')
}
