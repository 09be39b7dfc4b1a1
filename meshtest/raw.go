package meshtest

// message is a frame that is not one of the Mesh protocol.
type message struct {
	kind int
	data []byte
}

// Write sends a frame as it is. Use it for a server that speaks a protocol of its own
// beside Mesh's (Server.ServeConn), or to test the server with invalid frames. kind is
// websocket.TextMessage or BinaryMessage. To choose a close code, use CloseMessage with
// data from websocket.FormatCloseMessage.
//
// The error is a [*CloseError] if the connection has ended. The server may end it as soon
// as it reads the frame.
func (c *Client) Write(kind int, data []byte) error { return c.writeMessage(kind, data) }

// NextMessage waits for the next frame that is not one of the Mesh protocol (binary, or
// not a JSON object with a command), and returns it. It fails the test if none comes.
func (c *Client) NextMessage() (kind int, data []byte) {
	c.tb.Helper()
	var m message
	found := c.await(c.timeout, func() bool {
		if len(c.raw) == 0 {
			return false
		}
		m, c.raw = c.raw[0], c.raw[1:]
		return true
	})
	if !found {
		c.fail("no frame of another protocol within %v, but %s%s", c.timeout, c.otherPushes(), c.diagnosis())
	}
	return m.kind, m.data
}
