package load

import (
	"bytes"
	"fmt"
)

// Dialect is the protocol of a server.
type Dialect string

// The dialects.
const (
	Mesh       Dialect = "mesh"
	Centrifuge Dialect = "centrifuge"
)

// Open dials, and returns when the server has greeted.
func (d Dialect) Open(addr string, buffer int) (*Conn, error) {
	c, err := Dial(addr, "/ws?mesh-level=2", buffer) // so that refused states have a code
	if err != nil {
		return nil, err
	}
	if d == Centrifuge {
		if err := c.Write([]byte(`{"id":1,"connect":{}}`)); err != nil {
			return nil, err
		}
		_, err = c.await(`{"id":1,`)
		return c, err
	}
	_, err = c.await(`{"command":"mesh/assign-id"`)
	return c, err
}

// Watch asks for the events of a room.
func (d Dialect) Watch(c *Conn, room string) error {
	if d == Centrifuge {
		return d.ask(c, fmt.Appendf(nil, `{"id":2,"subscribe":{"channel":%q}}`, room))
	}
	return d.ask(c, fmt.Appendf(nil, `{"id":2,"command":"mesh/subscribe-presence","payload":{"roomName":%q}}`, room))
}

// Enter makes the connection present in a room and gets its members. For Centrifuge that
// takes two calls.
func (d Dialect) Enter(c *Conn, room string) error {
	if d == Centrifuge {
		return errorsOf(
			d.ask(c, fmt.Appendf(nil, `{"id":2,"subscribe":{"channel":%q}}`, room)),
			d.ask(c, fmt.Appendf(nil, `{"id":2,"presence":{"channel":%q}}`, room)),
		)
	}
	return d.ask(c, fmt.Appendf(nil, `{"id":2,"command":"mesh/join-room","payload":{"roomName":%q}}`, room))
}

// Exit takes the connection out of a room.
func (d Dialect) Exit(c *Conn, room string) error {
	if d == Centrifuge {
		return d.ask(c, fmt.Appendf(nil, `{"id":2,"unsubscribe":{"channel":%q}}`, room))
	}
	return d.ask(c, fmt.Appendf(nil, `{"id":2,"command":"mesh/leave-room","payload":{"roomName":%q}}`, room))
}

// publish returns the request that publishes state under an id.
func (d Dialect) publish(dst []byte, id int, room string, state []byte) []byte {
	if d == Centrifuge {
		return fmt.Appendf(dst, `{"id":%d,"publish":{"channel":%q,"data":%s}}`, id, room, state)
	}
	return fmt.Appendf(dst, `{"id":%d,"command":"mesh/publish-presence-state","payload":{"roomName":%q,"state":%s}}`, id, room, state)
}

// event reports whether a message is the update of a state.
func (d Dialect) event(message []byte) bool {
	if d == Centrifuge {
		return bytes.HasPrefix(message, []byte(`{"push":`)) && bytes.Contains(message, []byte(`"pub":`))
	}
	return bytes.HasPrefix(message, []byte(`{"command":"mesh/presence-update"`)) && bytes.Contains(message, []byte(`"type":"state"`))
}

func (d Dialect) ask(c *Conn, request []byte) error {
	if err := c.Write(request); err != nil {
		return err
	}
	answer, err := c.await(`{"id":2,`)
	if err == nil && (bytes.Contains(answer, []byte(`"error":`)) || bytes.Contains(answer, []byte(`"success":false`))) {
		err = fmt.Errorf("%s: %s", request, answer)
	}
	return err
}

func errorsOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
