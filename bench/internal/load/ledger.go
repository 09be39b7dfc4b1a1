package load

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
)

// Ledger holds the updates of one room as a subscriber received them, and checks the
// promises. A member never joins again before it has left. A connection that is not a
// member never leaves and has no state, so that each leave is delivered once. seq never
// decreases within an epoch. To find a missing update, compare Present with Redis at a
// moment without changes.
type Ledger struct {
	Room    string
	Present map[string]struct{}
	epoch   string
	seq     uint64
}

// NewLedger begins with the payload of the answer to a subscribe request.
func NewLedger(room string, answer []byte) (*Ledger, error) {
	var a struct {
		Success bool
		Present []struct{ ID string }
		Epoch   string
		Seq     uint64
	}
	if err := json.Unmarshal(answer, &a); err != nil || !a.Success {
		return nil, fmt.Errorf("no snapshot of %s: %.200s: %v", room, answer, err)
	}
	l := &Ledger{Room: room, Present: make(map[string]struct{}, len(a.Present)), epoch: a.Epoch, seq: a.Seq}
	for _, m := range a.Present {
		l.Present[m.ID] = struct{}{}
	}
	return l, nil
}

// Apply handles a frame mesh/presence-update. An error is a broken promise. Frames of
// other rooms are ignored.
func (l *Ledger) Apply(frame []byte) error {
	if !bytes.Equal(value(frame, `"roomName":"`, '"'), []byte(l.Room)) {
		return nil
	}
	kind, conn := string(value(frame, `"type":"`, '"')), string(value(frame, `"connectionId":"`, '"'))
	tail := frame[max(bytes.LastIndex(frame, []byte(`"seq":`)), 0):] // after metadata and state
	seq, err := strconv.ParseUint(string(value(tail, `"seq":`, ',')), 10, 64)
	if err != nil {
		return fmt.Errorf("no seq: %s", frame)
	}
	epoch := string(value(tail, `"epoch":"`, '"'))
	if epoch == l.epoch && seq < l.seq {
		return fmt.Errorf("seq decreases, it was %d: %s", l.seq, frame)
	}
	l.epoch, l.seq = epoch, seq
	_, present := l.Present[conn]
	switch {
	case kind == "join" && present:
		return fmt.Errorf("joined twice: %s", frame)
	case kind == "join":
		l.Present[conn] = struct{}{}
	case !present:
		return fmt.Errorf("%s of a connection that is not a member: %s", kind, frame)
	case kind == "leave":
		delete(l.Present, conn)
	}
	return nil
}

// value returns the text between begin and end.
func value(text []byte, begin string, end byte) []byte {
	_, rest, _ := bytes.Cut(text, []byte(begin))
	if i := bytes.IndexByte(rest, end); i >= 0 {
		return rest[:i]
	}
	return nil
}
