package meshtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/gorilla/websocket"
)

// DefaultTimeout is how long a [Client] waits for what is to come, unless
// [WithTimeout] says otherwise.
const DefaultTimeout = 30 * time.Second

// ConnectOption changes how a [Client] connects.
type ConnectOption func(*dialing) error

// dialing is what the options set.
type dialing struct {
	path      string
	header    http.Header
	protocols []string
	timeout   time.Duration
}

// WithPath sets where the client connects: a path, with a query if need be.
// Defaults to "/ws".
func WithPath(path string) ConnectOption {
	return func(d *dialing) error {
		if !strings.HasPrefix(path, "/") {
			return fmt.Errorf("%w: path %q does not begin with a slash", ErrOption, path)
		}
		d.path = path
		return nil
	}
}

// WithHeader adds a header to the request that is upgraded: Authorization,
// Cookie, Origin.
func WithHeader(name, value string) ConnectOption {
	return func(d *dialing) error {
		d.header.Add(name, value)
		return nil
	}
}

// WithSubprotocols sets the subprotocols that the client offers, the one it
// likes best first. [Client.Subprotocol] says which was taken.
func WithSubprotocols(names ...string) ConnectOption {
	return func(d *dialing) error {
		d.protocols = names
		return nil
	}
}

// WithTimeout sets how long the client waits: to be connected, for an answer,
// an update, a push, the end. Time is the bubble's in a synctest bubble.
// Defaults to [DefaultTimeout].
func WithTimeout(timeout time.Duration) ConnectOption {
	return func(d *dialing) error {
		if timeout <= 0 {
			return fmt.Errorf("%w: timeout %v is not positive", ErrOption, timeout)
		}
		d.timeout = timeout
		return nil
	}
}

// HandshakeError says that the server answered the request for an upgrade with
// something else.
type HandshakeError struct {
	Status int    // HTTP status: 401, 403, 503 …
	Body   string // the first KiB of it, without white space around it
	Header http.Header
}

// Error returns the status and the body.
func (e *HandshakeError) Error() string {
	return fmt.Sprintf("meshtest: handshake refused: %d %s", e.Status, e.Body)
}

// Connect opens a WebSocket and waits for its connection id. It fails the test
// where that fails, and closes the client when the test is over; a server may
// be shared by the tests below it.
func (s *Server) Connect(t TB, opts ...ConnectOption) *Client {
	t.Helper()
	c, err := s.dial(t, opts)
	if err != nil {
		t.Fatalf("meshtest: connect: %s", strings.TrimPrefix(err.Error(), "meshtest: "))
		return nil
	}
	t.Cleanup(c.Close)
	return c
}

// Dial is [Server.Connect] for tests of what is refused, and for use without a
// test: it returns an error, a [*HandshakeError] where the server answered. A
// client that it returns fails the test that started the server, and is closed
// with the server if not before.
func (s *Server) Dial(opts ...ConnectOption) (*Client, error) { return s.dial(s.tb, opts) }

func (s *Server) dial(t TB, opts []ConnectOption) (*Client, error) {
	d := dialing{path: "/ws", header: make(http.Header), timeout: DefaultTimeout}
	for _, o := range opts {
		if err := o(&d); err != nil {
			return nil, err
		}
	}
	c := newClient(t, s, d.timeout)
	if err := c.connect(d); err != nil {
		return nil, err
	}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		c.Close()
		return nil, errors.New("meshtest: server is closed")
	}
	s.clients[c] = struct{}{}
	s.mu.Unlock()
	return c, nil
}

// connect makes the handshake and waits for the connection id.
func (c *Client) connect(d dialing) error {
	ctx, cancel := context.WithTimeout(context.Background(), d.timeout)
	defer cancel()
	dialer := websocket.Dialer{
		Subprotocols: d.protocols,
		NetDialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := c.server.network.dial(ctx)
			if err != nil {
				return nil, err
			}
			c.conn = conn
			return conn, nil
		},
	}
	ws, resp, err := dialer.DialContext(ctx, "ws://"+host+d.path, d.header)
	if errors.Is(err, websocket.ErrBadHandshake) && resp != nil {
		body, _ := io.ReadAll(resp.Body) // in memory already
		return &HandshakeError{Status: resp.StatusCode, Body: strings.TrimSpace(string(body)), Header: resp.Header}
	}
	if err != nil {
		return fmt.Errorf("meshtest: %w", err)
	}
	c.ws = ws
	c.begin()
	if c.await(d.timeout, func() bool { return c.id != "" }) {
		return nil
	}
	end := c.ended()
	c.Kill()
	if end != nil {
		return end
	}
	return fmt.Errorf("meshtest: no connection id within %v", d.timeout)
}
