package wire

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"
)

// Extent holds the fields of a list of members that this project adds to the protocol.
// Zero fields are left out.
type Extent struct {
	Next    string // cursor of the next page
	Restart bool   // the cursor was of another Redis process, so that this is a first page
	Total   Count  // members of the room
	Numbers        // the same in the answer to a join, and users
	Stale   bool   // Redis does not answer, and this is the last known state
	Epoch   string // with Seq the position of the room; if empty, Seq is left out too
	Seq     uint64
}

// append appends the fields to an object.
func (e *Extent) append(dst []byte) []byte {
	if e.Next != "" {
		dst = appendString(append(dst, `,"next":`...), e.Next)
	}
	if e.Restart {
		dst = append(dst, `,"restart":true`...)
	}
	dst = e.Numbers.append(e.Total.append(dst, `,"total":`))
	if e.Stale {
		dst = append(dst, `,"stale":true`...)
	}
	return appendPosition(dst, e.Epoch, e.Seq)
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

// EncodedView is the answer to a subscribe, join, get-state or list command with lists
// that are encoded already. See AppendMembers, AppendIDs and AppendStates. The lists must
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
	dst = slices.Grow(dst, v.Present.Size()+len(v.States)+len(v.Next)+len(v.Epoch)+192)
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
	return append(v.append(dst), '}')
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

// Snapshot is the answer to CommandSubscribePresence, CommandJoinRoom and
// CommandListPresence. The zero Snapshot is the refusal {"success":false,"present":[]}.
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

// The values of Refusal.Of.
const (
	OfUsers       = "users"
	OfConnections = "connections"
)

// Refusal is the answer to a join that a guard or a full room refuses.
type Refusal struct {
	Code string // CodeRefused or CodeFull
	Of   string // with CodeFull: the number that is bounded, OfUsers or OfConnections
	Max  int    // with CodeFull: its bound
}

// AppendJSON appends the answer.
func (r Refusal) AppendJSON(dst []byte) []byte {
	dst = appendString(append(dst, `{"success":false,"present":[],"code":`...), r.Code)
	if r.Of != "" {
		dst = appendString(append(dst, `,"of":`...), r.Of)
		dst = strconv.AppendInt(append(dst, `,"max":`...), int64(r.Max), 10)
	}
	return append(dst, '}')
}

// MarshalJSON returns the text of AppendJSON. It never fails.
func (r Refusal) MarshalJSON() ([]byte, error) { return r.AppendJSON(nil), nil }
