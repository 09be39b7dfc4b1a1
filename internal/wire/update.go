package wire

import (
	"encoding/json"
	"strconv"
	"sync"
)

// The types of updates.
const (
	UpdateJoin  = "join"
	UpdateLeave = "leave"
	UpdateState = "state"
)

// Update is the message to subscribers about one change in a room. Its fields are set
// before it is shared and not changed after that. Then its methods are safe for
// concurrent use. An Update must not be copied.
type Update struct {
	Type         string // UpdateJoin, UpdateLeave or UpdateState
	ConnectionID string
	RoomName     string
	Timestamp    int64           // unix ms
	Metadata     json.RawMessage // join only, valid JSON; nil: left out
	State        json.RawMessage // state only, valid JSON; nil: null
	Seq          uint64          // never decreases within an epoch
	Epoch        string
	Repair       bool // corrects for missed updates; false: left out

	once  sync.Once // makes frame
	frame Frame
}

// Frame returns the push with the update. It is encoded at the first call, and all
// subscribers of the room get the same Frame.
func (u *Update) Frame() *Frame {
	u.once.Do(func() {
		const envelope = `{"command":"` + PushPresenceUpdate + `","payload":`
		size := len(envelope) + 160 + len(u.ConnectionID) + len(u.RoomName) + len(u.Metadata) + len(u.State) + len(u.Epoch)
		dst := append(make([]byte, 0, size), envelope...)
		u.frame.data = append(u.AppendJSON(dst), '}')
	})
	return &u.frame
}

// AppendJSON appends the update as a JSON object, without the envelope of the push.
func (u *Update) AppendJSON(dst []byte) []byte {
	dst = append(dst, `{"type":`...)
	dst = appendString(dst, u.Type)
	dst = append(dst, `,"connectionId":`...)
	dst = appendString(dst, u.ConnectionID)
	dst = append(dst, `,"roomName":`...)
	dst = appendString(dst, u.RoomName)
	dst = append(dst, `,"timestamp":`...)
	dst = strconv.AppendInt(dst, u.Timestamp, 10)
	if u.Type == UpdateJoin && len(u.Metadata) > 0 {
		dst = append(append(dst, `,"metadata":`...), u.Metadata...)
	}
	if u.Type == UpdateState && len(u.State) > 0 {
		dst = append(append(dst, `,"state":`...), u.State...)
	} else if u.Type == UpdateState {
		dst = append(dst, `,"state":null`...)
	}
	dst = append(dst, `,"seq":`...)
	dst = strconv.AppendUint(dst, u.Seq, 10)
	dst = append(dst, `,"epoch":`...)
	dst = appendString(dst, u.Epoch)
	if u.Repair {
		dst = append(dst, `,"repair":true`...)
	}
	return append(dst, '}')
}

// MarshalJSON returns the text of AppendJSON. It never fails.
func (u *Update) MarshalJSON() ([]byte, error) { return u.AppendJSON(nil), nil }
