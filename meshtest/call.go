package meshtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// maxID is the highest request id that the stock client uses.
const maxID = 99_999_999

// request is a frame that a client sends.
type request struct {
	ID      int64           `json:"id"`
	Command string          `json:"command"`
	Payload json.RawMessage `json:"payload,omitempty"`
}

// CommandError is the error of [Client.Call] if the server answered with an error. It
// holds the error of the command's handler as the client receives it.
type CommandError struct {
	Command string // command that was called
	Code    string // "EINVALID", "EREFUSED", "ENOTFOUND" …
	Name    string
	Message string
}

// Error returns all fields as text.
func (e *CommandError) Error() string {
	return fmt.Sprintf("meshtest: %s: %s (%s, %s)", e.Command, e.Message, e.Code, e.Name)
}

// CodeOf returns the code of the [*CommandError] in err, or "" if err has none.
func CodeOf(err error) string {
	if ce, ok := errors.AsType[*CommandError](err); ok {
		return ce.Code
	}
	return ""
}

// Call sends a command, one of the app's own or of the protocol's, and returns the
// payload of its answer. The command's payload is any value that encodes to JSON. If it
// is nil, the frame has no payload. Call is safe for concurrent use.
//
// The error is a [*CommandError] if the server answered with an error, and a
// [*CloseError] if the connection ended. Any other error says that no answer came in time
// ([WithTimeout]) or that the payload cannot be encoded.
func (c *Client) Call(command string, payload any) (json.RawMessage, error) {
	req := request{Command: command}
	if payload != nil {
		data, err := json.Marshal(payload)
		if err != nil {
			return nil, fmt.Errorf("meshtest: payload of %s: %w", command, err)
		}
		req.Payload = data
	}
	got, err := c.roundTrip(req, c.timeout)
	if err != nil {
		return nil, err
	}
	return result(command, got)
}

// roundTrip sends a request under a new id and waits for its answer.
func (c *Client) roundTrip(req request, timeout time.Duration) (json.RawMessage, error) {
	answer := make(chan json.RawMessage, 1)
	c.mu.Lock()
	req.ID = c.newID()
	c.calls[req.ID] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.calls, req.ID)
	}()
	if err := c.write(req); err != nil {
		return nil, err
	}
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case got := <-answer:
		return got, nil
	case <-c.readEnded:
	case <-t.C:
	}
	select {
	case got := <-answer: // the answer came at the last moment
		return got, nil
	default:
	}
	if end := c.ended(); end != nil {
		return nil, end
	}
	return nil, fmt.Errorf("meshtest: no answer to %s within %v", req.Command, timeout)
}

// newID returns the id of a new request. c.mu is held.
func (c *Client) newID() int64 {
	c.lastID = c.lastID%maxID + 1
	return c.lastID
}

// handleAnswer hands an answer to the call that waits for it, if it still does.
func (c *Client) handleAnswer(id int64, payload json.RawMessage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ch := c.calls[id]; ch != nil {
		delete(c.calls, id)
		ch <- payload
	}
}

// result returns a [*CommandError] if the payload is an error object, and otherwise the
// payload.
func result(command string, payload json.RawMessage) (json.RawMessage, error) {
	var e struct {
		Message *string `json:"error"`
		Code    *string `json:"code"`
		Name    *string `json:"name"`
	}
	if json.Unmarshal(payload, &e) == nil && e.Message != nil && e.Code != nil && e.Name != nil {
		return nil, &CommandError{Command: command, Code: *e.Code, Name: *e.Name, Message: *e.Message}
	}
	return payload, nil
}

// write writes one frame. If the connection has ended, the error says how.
func (c *Client) write(v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("meshtest: encode a frame: %w", err)
	}
	return c.writeMessage(websocket.TextMessage, data)
}

func (c *Client) writeMessage(kind int, data []byte) error {
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-c.readEnded:
		return c.ended()
	}
	_ = c.ws.SetWriteDeadline(time.Now().Add(c.timeout)) // cannot fail
	err := c.ws.WriteMessage(kind, data)
	if err == nil {
		return nil
	}
	t := time.NewTimer(closeTime)
	defer t.Stop()
	select {
	case <-c.readEnded: // reading has ended too, and its error is more exact
		return c.ended()
	case <-t.C:
	}
	return fmt.Errorf("meshtest: write: %w", err)
}

// ask is Call, but fails the test on an error, and decodes the answer.
func (c *Client) ask(command string, payload, into any) bool {
	c.tb.Helper()
	got, err := c.Call(command, payload)
	if err != nil {
		c.fail("%v", err)
		return false
	}
	if err := json.Unmarshal(got, into); err != nil {
		c.fail("answer to %s is %s: %v", command, got, err)
		return false
	}
	return true
}

func inRoom(room string) wire.RoomRequest { return wire.RoomRequest{RoomName: wire.Name(room)} }
