package wire

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/gorilla/websocket"
)

// Frame is one encoded message from server to client. It is encoded once and
// can be sent to any number of connections. All methods are safe for
// concurrent use; a Frame must not be copied.
type Frame struct {
	data []byte
	// rest is what follows; nil: nothing. Frames that answer different
	// requests with the same large list share the list: a thousand connections
	// that are back after a restart do not take its memory a thousand times.
	rest Text

	once     sync.Once // makes prepared and err
	prepared *websocket.PreparedMessage
	err      error
}

// Bytes returns the JSON text. It may be shared: callers must not change it. A
// frame that shares a list is put together at each call, see Write.
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

// mostJoined is up to which size the parts of a frame are put together to be
// written, which saves calls of the system.
const mostJoined = 64 << 10

// joined are buffers of up to mostJoined.
var joined = sync.Pool{New: func() any { return new([]byte) }}

// Write writes the frame as one text message, of several fragments where it
// shares a long list.
func (f *Frame) Write(conn *websocket.Conn) error {
	switch {
	case f.rest == nil:
		return conn.WriteMessage(websocket.TextMessage, f.data)
	case f.Size() <= mostJoined:
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

// Prepared returns the frame ready for gorilla/websocket. It is built at the
// first call and shared from then on, so that many connections cost one
// framing (and, where they compress, one compression).
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

// Pieces returns the frame as a WebSocket message in the pieces that it shares
// with other frames; nil where it shares none, or is so short that it is better
// put together. The pieces must not be changed.
func (f *Frame) Pieces() [][]byte {
	if f.rest == nil || f.Size() <= mostJoined {
		return nil
	}
	head := append(appendHeader(nil, websocket.TextMessage, f.Size()), f.data...)
	return append([][]byte{head}, f.rest...)
}

// AppendMessage appends the frame as a WebSocket message, see the function
// AppendMessage.
func (f *Frame) AppendMessage(dst []byte) []byte {
	return f.append(appendHeader(dst, websocket.TextMessage, f.Size()))
}

// AppendMessage appends a WebSocket message as a server sends it: one frame,
// neither masked nor compressed (RFC 6455, section 5.2). kind is that of the
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

// Answer encodes the answer to a request: its id as Request.ID has it, its
// command, and the result. The error says that payload cannot be encoded.
func Answer(id, command string, payload any) (*Frame, error) {
	return encode(id, command, payload)
}

// Push encodes a message that answers no request. The error says that payload
// cannot be encoded.
func Push(command string, payload any) (*Frame, error) {
	return encode("", command, payload)
}

// ErrorAnswer encodes the answer to a request that failed. Code and name are
// what the client's user sees beside the message, see CodeServer and
// NameError.
func ErrorAnswer(id, command, message, code, name string) *Frame {
	// An Appender cannot fail to encode.
	f, _ := encode(id, command, ErrorPayload{Message: message, Code: code, Name: name})
	return f
}

// NotFound encodes the answer to a request whose command nobody handles.
func NotFound(id, command string) *Frame {
	return ErrorAnswer(id, command, `Command "`+command+`" not found`, CodeNotFound, NameCommandError)
}

// AssignID encodes the first message on every connection: its id.
func AssignID(conn string) *Frame {
	f, _ := encode("", PushAssignID, conn) // a string cannot fail to encode
	return f
}

// Ping returns the frame that asks a client for a pong: always the same one.
func Ping() *Frame { return pingFrame }

// LatencyRequest returns the frame that asks a client for a latency:response:
// always the same one.
func LatencyRequest() *Frame { return latencyRequestFrame }

var (
	pingFrame           = &Frame{data: []byte(`{"command":"` + PushPing + `","payload":{}}`)}
	latencyRequestFrame = &Frame{data: []byte(`{"command":"` + PushLatencyRequest + `","payload":{}}`)}
)

// encode builds a frame; an empty id is left out.
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
	if v, ok := payload.(EncodedView); ok && v.long() {
		return v.frame(dst), nil
	}
	dst, err := appendPayload(dst, payload)
	if err != nil {
		return nil, err
	}
	return &Frame{data: append(dst, '}')}, nil
}
