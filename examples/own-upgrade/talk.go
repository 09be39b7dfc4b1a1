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

// The app's protocol. Text is one command in a line:
//
//	TIME         the server's time, as 2006-01-02T15:04:05Z
//	ECHO words   the words
//	ME           the name on the client's pass
//	             ERR and why, to everything else
//
// A binary message begins with a byte that says of what kind it is. There is
// one: a part of an upload. It is answered with the same byte, the part's CRC-32
// (four bytes, big-endian) and how many bytes have come in all (eight).
const kindPart = 1

// perSecond is how many of its messages a client may send in one second; each
// is answered, so who sends more than it reads is closed by Mesh when
// Limits.QueueBytes wait for it (code 1013).
const perSecond = 100

// talk is the app's side of one connection. Mesh calls hear on the connection's
// reader, one message after the other: no lock is needed.
type talk struct {
	name     string
	uploaded uint64
	second   time.Time // when counting began
	count    int
}

// hear is mesh.ConnOptions.Foreign.
func (t *talk) hear(c *mesh.Connection, messageType int, data []byte) {
	if t.tooMany() {
		_ = c.Close(websocket.ClosePolicyViolation, "too many messages")
		return
	}
	if messageType == websocket.BinaryMessage {
		t.part(c, data)
		return
	}
	// Text comes as it was sent. What is not UTF-8 is refused by SendMessage
	// where it would go back to the client.
	err := c.SendMessage(websocket.TextMessage, []byte(t.line(string(data))))
	if errors.Is(err, mesh.ErrInvalidMessage) {
		_ = c.Close(websocket.CloseInvalidFramePayloadData, "text must be UTF-8")
	}
	// mesh.ErrClosed: it has ended meanwhile, and nobody waits for the answer.
}

// line carries out a command.
func (t *talk) line(line string) string {
	verb, words, _ := strings.Cut(strings.TrimRight(line, "\r\n"), " ")
	switch verb {
	case "TIME":
		return time.Now().UTC().Format(time.RFC3339)
	case "ECHO":
		// A client that takes a line for a frame of Mesh's would be misled by
		// one that looks like it, so an answer begins with its verb.
		return "ECHO " + words
	case "ME":
		return "ME " + t.name
	}
	return "ERR unknown command"
}

// part takes in a part of an upload.
func (t *talk) part(c *mesh.Connection, data []byte) {
	if len(data) == 0 || data[0] != kindPart {
		_ = c.Close(websocket.CloseUnsupportedData, "unknown kind of message")
		return
	}
	t.uploaded += uint64(len(data) - 1)
	ack := binary.BigEndian.AppendUint32([]byte{kindPart}, crc32.ChecksumIEEE(data[1:]))
	_ = c.SendMessage(websocket.BinaryMessage, binary.BigEndian.AppendUint64(ack, t.uploaded)) // fails where it has ended
}

// tooMany counts a message.
func (t *talk) tooMany() bool {
	if now := time.Now(); now.Sub(t.second) >= time.Second {
		t.second, t.count = now, 0
	}
	t.count++
	return t.count > perSecond
}
