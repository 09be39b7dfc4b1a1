package meshtest

// message is a frame that is not Mesh's.
type message struct {
	kind int
	data []byte
}

// Write sends a frame as it is, for a server that speaks a protocol of its own
// beside Mesh's (Server.ServeConn), or to see what it does with garbage. kind
// is websocket.TextMessage or BinaryMessage; with CloseMessage and what
// websocket.FormatCloseMessage returns, the client chooses the close code.
//
// The error is a [*CloseError] where the connection has ended, which the
// server may do while it reads.
func (c *Client) Write(kind int, data []byte) error { return c.writeMessage(kind, data) }

// NextMessage returns the next frame that is not Mesh's (binary, or no JSON
// object with a command) and that the test has not had yet, and waits for it.
// It fails the test if none comes.
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
		c.fail("no frame of another protocol within %v, but %s%s", c.timeout, c.otherPushes(), c.plight())
	}
	return m.kind, m.data
}
