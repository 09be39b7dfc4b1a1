package wire

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/gorilla/websocket"
)

// Frame is one encoded message from server to client. It is encoded once and can be
// sent to any number of connections. All methods are safe for concurrent use. A Frame
// must not be copied.
type Frame struct {
	data []byte
	// rest follows data; it may be nil. Frames that answer different requests with the
	// same large list share the list. So a thousand connections that return after a
	// restart do not take its memory a thousand times.
	rest Text
	// numbersOf is the room whose numbers the frame has. See NumbersOf.
	numbersOf string

	once     sync.Once // makes prepared and err
	prepared *websocket.PreparedMessage
	err      error
}

// Bytes returns the JSON text. It may be shared, so callers must not change it. For a
// frame that shares a list, each call builds the text again. See Write.
func (f *Frame) Bytes() []byte {
	if f.rest == nil {
		return f.data
	}
	return f.append(make([]byte, 0, f.Size()))
}

// append appends the JSON text.
func (f *Frame) append(dst []byte) []byte { return f.rest.Append(append(dst, f.data...)) }

// Size returns the length of the JSON text in bytes.
func (f *Frame) Size() int { return len(f.data) + f.rest.Size() }

// maxJoined is the size up to which the parts of a frame are joined before they are
// written, which saves system calls.
const maxJoined = 64 << 10

// joined holds buffers of up to maxJoined bytes.
var joined = sync.Pool{New: func() any { return new([]byte) }}

// Write writes the frame as one text message. If the frame shares a long list, the
// message has several fragments.
func (f *Frame) Write(conn *websocket.Conn) error {
	switch {
	case f.rest == nil:
		return conn.WriteMessage(websocket.TextMessage, f.data)
	case f.Size() <= maxJoined:
		buf := joined.Get().(*[]byte)
		defer joined.Put(buf)
		*buf = f.append((*buf)[:0])
		return conn.WriteMessage(websocket.TextMessage, *buf)
	}
	w, err := conn.NextWriter(websocket.TextMessage)
	if err != nil {
		return err
	}
	for _, piece := range append(Text{f.data}, f.rest...) {
		if _, err := w.Write(piece); err != nil {
			return err
		}
	}
	return w.Close()
}

// Prepared returns the frame in the form that gorilla/websocket can send to many
// connections. It is built at the first call and shared after that, so that many
// connections cost one framing (and one compression, if they compress).
func (f *Frame) Prepared() (*websocket.PreparedMessage, error) {
	f.once.Do(func() {
		p, err := websocket.NewPreparedMessage(websocket.TextMessage, f.Bytes())
		if err != nil {
			f.err = fmt.Errorf("mesh: cannot prepare a frame: %w", err)
			return
		}
		f.prepared = p
	})
	return f.prepared, f.err
}

// Pieces returns the frame as a WebSocket message in the pieces that it shares with
// other frames. It returns nil if the frame shares none, or if it is so short that
// joining the pieces is cheaper. The pieces must not be changed.
func (f *Frame) Pieces() [][]byte {
	if f.rest == nil || f.Size() <= maxJoined {
		return nil
	}
	head := append(appendHeader(nil, websocket.TextMessage, f.Size()), f.data...)
	return append([][]byte{head}, f.rest...)
}

// AppendMessage appends the frame as a WebSocket message. See the function
// AppendMessage.
func (f *Frame) AppendMessage(dst []byte) []byte {
	return f.append(appendHeader(dst, websocket.TextMessage, f.Size()))
}

// AppendMessage appends a WebSocket message of a server: one frame that is neither
// masked nor compressed (RFC 6455, section 5.2). kind is a message type of the
// websocket package.
func AppendMessage(dst []byte, kind int, data []byte) []byte {
	return append(appendHeader(dst, kind, len(data)), data...)
}

func appendHeader(dst []byte, kind, size int) []byte {
	const final = 0x80
	dst = append(dst, final|byte(kind))
	switch {
	case size < 126:
		return append(dst, byte(size))
	case size < 1<<16:
		return binary.BigEndian.AppendUint16(append(dst, 126), uint16(size))
	default:
		return binary.BigEndian.AppendUint64(append(dst, 127), uint64(size))
	}
}

// Answer encodes the answer to a request. id is Request.ID. It returns an error if
// payload cannot be encoded.
func Answer(id, command string, payload any) (*Frame, error) {
	return encode(id, command, payload)
}

// Push encodes a message that answers no request. It returns an error if payload cannot
// be encoded.
func Push(command string, payload any) (*Frame, error) {
	return encode("", command, payload)
}

// PushNumbers encodes the push with the numbers of a room.
func PushNumbers(o Occupancy) *Frame {
	f, _ := encode("", PushOccupancy, o) // an Appender cannot fail to encode
	f.numbersOf = o.RoomName
	return f
}

// NumbersOf returns the room whose numbers the frame pushes, or "" if it is another frame.
// A client needs only the last numbers of a room.
func (f *Frame) NumbersOf() string { return f.numbersOf }

// ErrorAnswer encodes the answer to a failed request. The client's user sees the
// message, the code and the name.
func ErrorAnswer(id, command, message, code, name string) *Frame {
	// An Appender cannot fail to encode.
	f, _ := encode(id, command, ErrorPayload{Message: message, Code: code, Name: name})
	return f
}

// NotFound encodes the answer to a request with an unknown command.
func NotFound(id, command string) *Frame {
	return ErrorAnswer(id, command, `Command "`+command+`" not found`, CodeNotFound, NameCommandError)
}

// AssignID encodes the first message on every connection: its id.
func AssignID(conn string) *Frame {
	f, _ := encode("", PushAssignID, conn) // a string cannot fail to encode
	return f
}

// Ping returns the frame that requests a pong. It is always the same frame.
func Ping() *Frame { return pingFrame }

// LatencyRequest returns the frame that requests a latency:response. It is always the
// same frame.
func LatencyRequest() *Frame { return latencyRequestFrame }

var (
	pingFrame           = &Frame{data: []byte(`{"command":"` + PushPing + `","payload":{}}`)}
	latencyRequestFrame = &Frame{data: []byte(`{"command":"` + PushLatencyRequest + `","payload":{}}`)}
)

// encode builds a frame. An empty id is left out.
func encode(id, command string, payload any) (*Frame, error) {
	dst := make([]byte, 0, 128)
	dst = append(dst, '{')
	if id != "" {
		dst = append(dst, `"id":`...)
		dst = append(dst, id...)
		dst = append(dst, ',')
	}
	dst = append(dst, `"command":`...)
	dst = appendString(dst, command)
	dst = append(dst, `,"payload":`...)
	if v, ok := payload.(EncodedView); ok && v.shared() {
		return v.frame(dst), nil
	}
	dst, err := appendPayload(dst, payload)
	if err != nil {
		return nil, err
	}
	return &Frame{data: append(dst, '}')}, nil
}
