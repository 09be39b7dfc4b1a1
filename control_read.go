package mesh

import (
	"encoding/json"

	"github.com/meshpresence/mesh/internal/wire"
)

// readMessage reads the JSON object of a message between servers: the value of
// each name into the pointer at the same place. Names count exactly as written,
// of equal names the last one counts, and values without a name in the message are
// not changed. It
// reports whether the message could be read.
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
	callNames   = []string{"id", "from", "op", "room", "conn", "conns", "paged", "after"}
	answerNames = []string{"id", "ok", "rooms", "gone", "count", "after", "error"}
	frameNames  = []string{"conn", "room", "command", "payload"}
)

func readCall(text string) (c remoteCall, ok bool) {
	ok = readMessage(text, callNames, &c.ID, &c.From, &c.Op, &c.Room, &c.Conn, &c.Conns, &c.Paged, &c.After)
	return c, ok
}

func readAnswer(text string) (a remoteAnswer, ok bool) {
	ok = readMessage(text, answerNames, &a.ID, &a.OK, &a.Rooms, &a.Gone, &a.Count, &a.After, &a.Error)
	return a, ok
}

func readFrame(text string) (f remoteFrame, ok bool) {
	ok = readMessage(text, frameNames, &f.Conn, &f.Room, &f.Command, &f.Payload)
	return f, ok
}
