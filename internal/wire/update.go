package wire

import (
	"encoding/json"
	"strconv"
	"sync"
)

// The types of updates.
const (
	UpdateJoin       = "join"
	UpdateLeave      = "leave"
	UpdateState      = "state"
	UpdateMetadata   = "metadata"
	UpdateDisconnect = "disconnect"
	UpdateReconnect  = "reconnect"
)

// The reasons of a leave and of a disconnect.
const (
	ReasonLeft       = "left"        // it asked to leave
	ReasonRemoved    = "removed"     // the app removed it
	ReasonClosed     = "closed"      // its socket was closed
	ReasonLost       = "lost"        // its socket broke or hung
	ReasonSilent     = "silent"      // no frame for TTL
	ReasonServerLost = "server_lost" // its server died
	ReasonReplaced   = "replaced"    // another connection of its user took its place
	ReasonFull       = "full"        // only of PushRoomLeft: the room was full when Redis was back
)

// Update is the message to subscribers about one change in a room. Its fields are set
// before it is shared and not changed after that. Then its methods are safe for
// concurrent use. An Update must not be copied.
//
// UserID, EntryID and JoinedAt are those of the connection in every update. Most types
// do not send them.
type Update struct {
	Type         string // one of the constants above
	ConnectionID string
	RoomName     string
	Timestamp    int64           // unix ms
	UserID       string          // empty: none
	EntryID      string          // not sent
	JoinedAt     int64           // unix ms; 0: unknown
	Metadata     json.RawMessage // valid JSON; nil: none. Sent in a join and a metadata update, set in a leave, too
	State        json.RawMessage // state only, valid JSON; nil: null
	Reason       string          // leave and disconnect only
	Replaces     string          // join only: the connection whose place it took; empty: none

	UserConnections int // of the user, after the update; not sent if there is no user
	Numbers             // of the room, after the update
	Seq             uint64
	Epoch           string // in which Seq never decreases
	Repair          bool   // corrects for missed updates; false: left out
	// NewUser says, in a metadata update, that it gives the connection its user. Then
	// the user and the numbers are sent, too.
	NewUser bool

	once  sync.Once // makes frame
	frame Frame
}

// Level returns the level of the protocol from which on clients know the type of the
// update. A client of a lower level must not get it.
func (u *Update) Level() int {
	switch u.Type {
	case UpdateMetadata, UpdateDisconnect, UpdateReconnect:
		return 2
	}
	return 1
}

// Frame returns the push with the update. It is encoded at the first call, and all
// subscribers of the room get the same Frame.
func (u *Update) Frame() *Frame {
	u.once.Do(func() {
		const envelope = `{"command":"` + PushPresenceUpdate + `","payload":`
		size := len(envelope) + 240 + len(u.ConnectionID) + len(u.RoomName) + len(u.State) + len(u.Epoch)
		if u.Type != UpdateLeave {
			size += len(u.Metadata)
		}
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
	dst = u.appendChange(dst)
	dst = append(dst, `,"seq":`...)
	dst = strconv.AppendUint(dst, u.Seq, 10)
	dst = append(dst, `,"epoch":`...)
	dst = appendString(dst, u.Epoch)
	if u.Repair {
		dst = append(dst, `,"repair":true`...)
	}
	return append(dst, '}')
}

// appendChange appends the fields that depend on the type of the update.
func (u *Update) appendChange(dst []byte) []byte {
	switch u.Type {
	case UpdateJoin:
		if len(u.Metadata) > 0 {
			dst = append(append(dst, `,"metadata":`...), u.Metadata...)
		}
		dst = u.appendJoinedAt(u.appendUser(dst))
		if u.Replaces != "" {
			dst = appendString(append(dst, `,"replaces":`...), u.Replaces)
		}
		dst = u.Numbers.append(dst)
	case UpdateLeave:
		dst = u.appendReason(u.appendUser(dst))
		dst = u.Numbers.append(u.appendJoinedAt(dst))
	case UpdateState:
		dst = appendOrNull(append(dst, `,"state":`...), u.State)
	case UpdateMetadata:
		dst = appendOrNull(append(dst, `,"metadata":`...), u.Metadata)
		if u.NewUser {
			dst = u.Numbers.append(u.appendUser(dst))
		}
	case UpdateDisconnect:
		dst = u.appendReason(dst)
	}
	return dst
}

// appendUser appends the user and the number of its connections, if there is a user.
func (u *Update) appendUser(dst []byte) []byte {
	if u.UserID == "" {
		return dst
	}
	dst = appendString(append(dst, `,"userId":`...), u.UserID)
	return strconv.AppendInt(append(dst, `,"userConnections":`...), int64(u.UserConnections), 10)
}

func (u *Update) appendJoinedAt(dst []byte) []byte {
	if u.JoinedAt == 0 {
		return dst
	}
	return strconv.AppendInt(append(dst, `,"joinedAt":`...), u.JoinedAt, 10)
}

func (u *Update) appendReason(dst []byte) []byte {
	return appendString(append(dst, `,"reason":`...), u.Reason)
}

// appendOrNull appends valid JSON, or null if it is empty.
func appendOrNull(dst, valid []byte) []byte {
	if len(valid) == 0 {
		return append(dst, "null"...)
	}
	return append(dst, valid...)
}

// MarshalJSON returns the text of AppendJSON. It never fails.
func (u *Update) MarshalJSON() ([]byte, error) { return u.AppendJSON(nil), nil }
