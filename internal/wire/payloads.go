package wire

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"
)

// RoomRequest is the payload of the commands that only name a room: join, leave,
// subscribe, unsubscribe, clear state, get state and get room metadata.
type RoomRequest struct {
	RoomName Name `json:"roomName"`
}

// PublishStateRequest is the payload of CommandPublishPresenceState.
type PublishStateRequest struct {
	RoomName    Name            `json:"roomName"`
	State       json.RawMessage `json:"state"`       // nil or null: refused
	ExpireAfter *float64        `json:"expireAfter"` // milliseconds, see Expiry
	Silent      bool            `json:"silent"`      // store it without an update
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

// Ended is the payload of PushPresenceEnded.
type Ended struct {
	RoomName string `json:"roomName"`
}

// AppendJSON appends the payload.
func (e Ended) AppendJSON(dst []byte) []byte {
	return append(appendString(append(dst, `{"roomName":`...), e.RoomName), '}')
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

// Extent holds the fields of a view of a room that this project adds to the protocol.
// Zero fields are left out.
type Extent struct {
	Total int    // members of the room, if the list is shorter
	Stale bool   // Redis does not answer, and this is the last known state
	Epoch string // with Seq the position of the room; if empty, Seq is left out too
	Seq   uint64
}

// Text is JSON in consecutive pieces.
type Text [][]byte

// Size returns the length in bytes.
func (t Text) Size() (size int) {
	for _, piece := range t {
		size += len(piece)
	}
	return size
}

// Append appends the text.
func (t Text) Append(dst []byte) []byte {
	for _, piece := range t {
		dst = append(dst, piece...)
	}
	return dst
}

// EncodedView is the answer to a subscribe, join or get-state command with lists that
// are encoded already. See AppendMembers, AppendIDs and AppendStates. The lists must
// not be changed afterwards, because frames may share them.
type EncodedView struct {
	Success bool
	Level   int    // 0: left out
	Present Text   // empty: []
	States  []byte // empty: left out
	Extent
}

// AppendJSON appends the answer.
func (v EncodedView) AppendJSON(dst []byte) []byte {
	dst = slices.Grow(dst, v.Present.Size()+len(v.States)+len(v.Epoch)+128)
	dst = v.Present.Append(v.appendHead(dst))
	dst = append(v.appendBetween(dst), v.States...)
	return v.appendTail(dst)
}

// appendHead appends the text before the members.
func (v EncodedView) appendHead(dst []byte) []byte {
	dst = strconv.AppendBool(append(dst, `{"success":`...), v.Success)
	if v.Level > 0 {
		dst = strconv.AppendInt(append(dst, `,"level":`...), int64(v.Level), 10)
	}
	dst = append(dst, `,"present":`...)
	if len(v.Present) == 0 {
		dst = append(dst, "[]"...)
	}
	return dst
}

// appendBetween appends the text between the members and the states.
func (v EncodedView) appendBetween(dst []byte) []byte {
	if len(v.States) > 0 {
		dst = append(dst, `,"states":`...)
	}
	return dst
}

// appendTail appends the text after the states.
func (v EncodedView) appendTail(dst []byte) []byte {
	if v.Total > 0 {
		dst = strconv.AppendInt(append(dst, `,"total":`...), int64(v.Total), 10)
	}
	if v.Stale {
		dst = append(dst, `,"stale":true`...)
	}
	if v.Epoch != "" {
		dst = strconv.AppendUint(append(dst, `,"seq":`...), v.Seq, 10)
		dst = appendString(append(dst, `,"epoch":`...), v.Epoch)
	}
	return append(dst, '}')
}

// sharedFrom is the size from which lists are shared between frames.
const sharedFrom = 4 << 10

// shared reports whether frames share the lists.
func (v EncodedView) shared() bool { return v.Present.Size()+len(v.States) >= sharedFrom }

// frame returns a frame that begins with dst, ends after the answer, and shares the
// lists.
func (v EncodedView) frame(dst []byte) *Frame {
	dst = v.appendHead(dst)
	head := len(dst)
	dst = v.appendBetween(dst)
	between := len(dst)
	dst = append(v.appendTail(dst), '}')
	rest := append(make(Text, 0, len(v.Present)+3), v.Present...)
	return &Frame{data: dst[:head:head], rest: append(rest, dst[head:between:between], v.States, dst[between:])}
}

// Snapshot is the answer to CommandSubscribePresence and CommandJoinRoom. The zero
// Snapshot is the refusal {"success":false,"present":[]}.
type Snapshot struct {
	Success bool
	Present []Member                   // nil: []
	States  map[string]json.RawMessage // nil: left out (a join has none); empty: {}
	Extent
}

// AppendJSON appends the answer. States are sorted by connection id.
func (s Snapshot) AppendJSON(dst []byte) []byte {
	return EncodedView{
		Success: s.Success,
		Present: Text{AppendMembers(nil, s.Present)},
		States:  encodeStates(s.States),
		Extent:  s.Extent,
	}.AppendJSON(dst)
}

// MarshalJSON returns the text of AppendJSON. It never fails.
func (s Snapshot) MarshalJSON() ([]byte, error) { return s.AppendJSON(nil), nil }

// StateSnapshot is the answer to CommandGetPresenceState. It is a Snapshot with only
// the ids of the members.
type StateSnapshot struct {
	Success bool
	Present []string                   // nil: []
	States  map[string]json.RawMessage // nil: left out; empty: {}
	Extent
}

// AppendJSON appends the answer. States are sorted by connection id.
func (s StateSnapshot) AppendJSON(dst []byte) []byte {
	return EncodedView{
		Success: s.Success,
		Present: Text{AppendIDs(nil, s.Present)},
		States:  encodeStates(s.States),
		Extent:  s.Extent,
	}.AppendJSON(dst)
}

// MarshalJSON returns the text of AppendJSON. It never fails.
func (s StateSnapshot) MarshalJSON() ([]byte, error) { return s.AppendJSON(nil), nil }

// encodeStates encodes a map of states; nil becomes nil.
func encodeStates(states map[string]json.RawMessage) []byte {
	if states == nil {
		return nil
	}
	list := make([]StateOf, 0, len(states))
	for _, id := range slices.Sorted(maps.Keys(states)) {
		list = append(list, StateOf{ID: id, State: states[id]})
	}
	return AppendStates(nil, list)
}
