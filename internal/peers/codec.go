package peers

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/wire"
)

// Call asks another server to do something.
type Call struct {
	ID   string `json:"id"`
	From string `json:"from"` // the incarnation that gets the answer
	Op   string `json:"op"`
	Room string `json:"room,omitempty"`
	Conn string `json:"conn,omitempty"`
	// Conns are the connections of OpGone.
	Conns []string `json:"conns,omitempty"`
	// Paged says that OpClear may do a part. After is the id of a connection: the next part
	// begins behind it.
	Paged bool   `json:"paged,omitempty"`
	After string `json:"after,omitempty"`
	// OverCap says that OpAdd passes the caps of the room.
	OverCap bool `json:"overCap,omitempty"`
	// Position is that of the join in OpReplaced: its epoch, seq and tag.
	Position string `json:"position,omitempty"`
}

// The operations of a Call. "Your" means: of the server that gets the call.
const (
	OpAdd     = "add"     // bring Conn into Room
	OpRemove  = "remove"  // take Conn out of Room
	OpClear   = "clear"   // take all your connections out of Room
	OpRecheck = "recheck" // ask the guards about Conn again
	OpClose   = "close"   // close Conn
	OpRooms   = "rooms"   // return the rooms of Conn
	OpGone    = "gone"    // return those of Conns that are not in Room any more

	// OpReplaced says that another connection took the place of Conn in Room by the join
	// at Position.
	OpReplaced = "replaced"

	OpRecheckRoom = "recheck-room" // ask the guards of Room again about all your connections
)

// Result is the result of a Call.
type Result struct {
	OK    bool     `json:"ok"`              // the server found something to do
	Rooms []string `json:"rooms,omitempty"` // of OpRooms
	Gone  []string `json:"gone,omitempty"`  // of OpGone
	Count int      `json:"count,omitempty"` // of OpClear: connections that left
	After string   `json:"after,omitempty"` // of OpClear: After of the next part; "": all parts are done
	Full  string   `json:"full,omitempty"`  // of OpAdd: the bound that the room has reached, for people
}

// answer is the message that answers a Call.
type answer struct {
	ID string `json:"id"`
	Result
	Error string `json:"error,omitempty"` // a name of remoteErrors
}

// Frame is a frame for the sockets of another server: that of Conn, or those of all
// members of Room.
type Frame struct {
	Conn    string          `json:"conn,omitempty"`
	Room    string          `json:"room,omitempty"`
	Command string          `json:"command"`
	Payload json.RawMessage `json:"payload"`
}

// remoteErrors are the errors that an answer can carry. An error that wraps several of
// them gets the first name.
var remoteErrors = []struct {
	name string
	err  error
}{
	{"unknown", errs.UnknownConnection},
	{"limit", errs.Limit},
	{"closed", errs.Closed},
	{"conflict", errs.Conflict},
	{"invalid", errs.InvalidConnectionID},
	{"full", errs.Full},
	{"unavailable", errs.Unavailable},
}

func nameOfError(err error) string {
	for _, e := range remoteErrors {
		if errors.Is(err, e.err) {
			return e.name
		}
	}
	return "unavailable"
}

// err returns the error that the answer carries.
func (a answer) err() error {
	if a.Error == "" {
		return nil
	}
	for _, e := range remoteErrors {
		if e.name == a.Error && a.Full != "" {
			return fmt.Errorf("%w: %s", e.err, a.Full)
		}
		if e.name == a.Error {
			return e.err
		}
	}
	return fmt.Errorf("%w: another server answered %q", errs.Unavailable, a.Error)
}

// readMessage reads the JSON object of a message: the value of each name into the pointer
// at the same place. Names count exactly as written. Of equal names the last one counts.
// A name that is missing changes nothing. It reports whether the message could be read.
func readMessage(text string, names []string, into ...any) bool {
	raw := []byte(text)
	if !wire.Valid(raw) || !wire.IsObject(raw) {
		return false
	}
	for i, value := range wire.Fields(raw, names...) {
		if value != nil && json.Unmarshal(value, into[i]) != nil {
			return false
		}
	}
	return true
}

var (
	callNames   = []string{"id", "from", "op", "room", "conn", "conns", "paged", "after", "overCap", "position"}
	answerNames = []string{"id", "ok", "rooms", "gone", "count", "after", "full", "error"}
	frameNames  = []string{"conn", "room", "command", "payload"}
)

func readCall(text string) (c Call, ok bool) {
	ok = readMessage(text, callNames, &c.ID, &c.From, &c.Op, &c.Room, &c.Conn, &c.Conns, &c.Paged, &c.After, &c.OverCap, &c.Position)
	return c, ok
}

func readAnswer(text string) (a answer, ok bool) {
	ok = readMessage(text, answerNames, &a.ID, &a.OK, &a.Rooms, &a.Gone, &a.Count, &a.After, &a.Full, &a.Error)
	return a, ok
}

func readFrame(text string) (f Frame, ok bool) {
	ok = readMessage(text, frameNames, &f.Conn, &f.Room, &f.Command, &f.Payload)
	return f, ok
}
