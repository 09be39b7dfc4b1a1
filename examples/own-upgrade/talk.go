package main

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh"
)

// This is the app's protocol. A text message is one command in a line:
//
//	TIME         the server's time, as 2006-01-02T15:04:05Z
//	ECHO words   the words
//	ME           the name on the client's pass
//	             ERR and a reason, for everything else
//
// The first byte of a binary message is its kind. The only kind is a part of an upload.
// The answer has the same byte, the part's CRC-32 (four bytes, big-endian) and the number
// of bytes received so far (eight).
const kindPart = 1

// perSecond limits the app's messages of a client per second. Each message is answered.
// If a client sends faster than it reads, Mesh closes its connection when
// Limits.QueueBytes wait for it (code 1013).
const perSecond = 100

// talk is the app's side of one connection. Mesh calls handle on the connection's reader,
// one message after the other, so talk needs no lock.
type talk struct {
	name     string
	uploaded uint64
	second   time.Time // start of the current second
	count    int
}

// handle is mesh.ConnOptions.Foreign.
func (t *talk) handle(c *mesh.Connection, messageType int, data []byte) {
	if t.tooMany() {
		_ = c.Close(websocket.ClosePolicyViolation, "too many messages")
		return
	}
	if messageType == websocket.BinaryMessage {
		t.part(c, data)
		return
	}
	// Text arrives unchanged. If an answer is not valid UTF-8, SendMessage refuses it.
	err := c.SendMessage(websocket.TextMessage, []byte(t.line(string(data))))
	if errors.Is(err, mesh.ErrInvalidMessage) {
		_ = c.Close(websocket.CloseInvalidFramePayloadData, "text must be UTF-8")
	}
	// Ignore mesh.ErrClosed: the connection has ended, and the client does not wait for
	// the answer.
}

// line executes a command and returns the answer.
func (t *talk) line(line string) string {
	verb, words, _ := strings.Cut(strings.TrimRight(line, "\r\n"), " ")
	switch verb {
	case "TIME":
		return time.Now().UTC().Format(time.RFC3339)
	case "ECHO":
		// The answer begins with its verb, so that a client cannot mistake it for a frame
		// of the Mesh protocol.
		return "ECHO " + words
	case "ME":
		return "ME " + t.name
	}
	return "ERR unknown command"
}

// part receives a part of an upload.
func (t *talk) part(c *mesh.Connection, data []byte) {
	if len(data) == 0 || data[0] != kindPart {
		_ = c.Close(websocket.CloseUnsupportedData, "unknown kind of message")
		return
	}
	t.uploaded += uint64(len(data) - 1)
	ack := binary.BigEndian.AppendUint32([]byte{kindPart}, crc32.ChecksumIEEE(data[1:]))
	_ = c.SendMessage(websocket.BinaryMessage, binary.BigEndian.AppendUint64(ack, t.uploaded)) // fails if the connection has ended
}

// tooMany counts a message and reports whether the client has sent too many.
func (t *talk) tooMany() bool {
	if now := time.Now(); now.Sub(t.second) >= time.Second {
		t.second, t.count = now, 0
	}
	t.count++
	return t.count > perSecond
}
