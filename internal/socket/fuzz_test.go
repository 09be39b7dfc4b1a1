package socket

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// FuzzSocketFrames makes a client send frames, or (raw) bytes that need not be frames.
// For any input nothing panics, and the socket ends when the client has disconnected or
// its connection was closed.
func FuzzSocketFrames(f *testing.F) {
	f.Add(false, []byte("\x01\x28{\"id\":1,\"command\":\"mesh/noop\"}"))
	f.Add(false, []byte("\x01\x16{\"id\":1,\"command\":\"pong\"}\x02\x03abc\x09\x00\x08\x02\x03\xe8"))
	f.Add(false, []byte("\x01\x30{\"id\":1,\"command\":\"latency:response\",\"payload\":{}}"))
	f.Add(true, []byte("\x81\x85\x00\x00\x00\x00hello\x88\x80\x00\x00\x00\x00"))
	f.Add(true, []byte("\x01\x80\x00\x00\x00\x00\x89\x80\x00\x00\x00\x00\x80\x80\x00\x00\x00\x00"))
	f.Add(true, []byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, raw bool, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			h := new(handler)
			r := prepare(t, h, func(c *Config) {
				c.FrameBytes, c.QueueBytes, c.LinesAtOnce = 200, 2000, 2
				c.CommandsPerSecond, c.PingInterval, c.LatencyInterval = 5, time.Second, 300*time.Millisecond
			})
			if len(data)%2 == 0 {
				h.foreign = func(int, []byte) {}
			}
			h.command = r.echo
			r.start(true)
			_ = r.client.SetWriteDeadline(time.Now().Add(time.Minute))
			if raw {
				_, _ = r.client.NetConn().Write(data)
			} else {
				sendFrames(r.client, data)
			}
			time.Sleep(2500 * time.Millisecond) // pings and latency requests
			if n := r.group.Counts().Panics; n != 0 {
				t.Errorf("%d panics", n)
			}
			_ = r.client.Close()
			begun := time.Now()
			r.end()
			if took := time.Since(begun); took > 2*closeGrace+50*time.Millisecond {
				t.Errorf("took %v to end", took)
			}
		})
	})
}

// sendFrames sends data as frames: each a byte for the type, a byte for the length, and a
// payload.
func sendFrames(client *websocket.Conn, data []byte) {
	for len(data) >= 2 {
		messageType, n := int(data[0]), min(int(data[1]), len(data)-2)
		payload := data[2 : 2+n]
		data = data[2+n:]
		var err error
		switch messageType {
		case websocket.CloseMessage, websocket.PingMessage, websocket.PongMessage:
			err = client.WriteControl(messageType, payload[:min(n, 125)], time.Now().Add(time.Minute))
		default:
			err = client.WriteMessage(websocket.TextMessage+messageType%2, payload)
		}
		if err != nil {
			return
		}
	}
}
