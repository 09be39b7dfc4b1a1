package meshtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// DefaultTimeout is the time for which a [Client] waits for an answer, an update or
// another message, unless [WithTimeout] sets it.
const DefaultTimeout = 30 * time.Second

// ConnectOption changes how a [Client] connects.
type ConnectOption func(*dialing) error

// dialing holds the values that the options set.
type dialing struct {
	path      string // "": the default
	netDial   func(ctx context.Context, network, address string) (net.Conn, error)
	level     int // 0: none in the URL
	replaces  string
	header    http.Header
	protocols []string
	timeout   time.Duration
	early     bool             // see WithEarlyReturn
	frames    func(Frame) bool // see WithFrames
}

// WithPath sets the path to which a client of a [Server] connects. It may include a query.
// Defaults to "/ws". [Connect] and [Dial] have the path in the URL.
func WithPath(path string) ConnectOption {
	return func(d *dialing) error {
		if !strings.HasPrefix(path, "/") {
			return fmt.Errorf("%w: path %q does not begin with a slash", ErrOption, path)
		}
		d.path = path
		return nil
	}
}

// WithLevel sets the level of the wire protocol that the client speaks, as mesh-level in
// the URL. At level 2 [Client.Call] returns a [*CommandError] for commands that answer
// false at level 1, and the client receives updates of all types. Defaults to no level in
// the URL, which is level 1.
func WithLevel(level int) ConnectOption {
	return func(d *dialing) error {
		if level < 1 {
			return fmt.Errorf("%w: level %d is not positive", ErrOption, level)
		}
		d.level = level
		return nil
	}
}

// WithReplaces sets the id of the client's last connection. Each [Client.Join] then names
// it, as a client does that has reconnected, and takes the place of that connection if it
// has the same user, even while the server believes that it is open. Defaults to none.
func WithReplaces(connectionID string) ConnectOption {
	return func(d *dialing) error {
		if connectionID == "" {
			return fmt.Errorf("%w: WithReplaces of an empty id", ErrOption)
		}
		d.replaces = connectionID
		return nil
	}
}

// WithNetDial sets the function that makes the network connection of a client that
// [Connect] or [Dial] returns. Use it for a Unix socket, for TLS with the certificate of a
// test ([crypto/tls.Dialer], with a URL that begins with ws://), or for a network with
// faults. The function gets the network "tcp" and the host and port of the URL.
func WithNetDial(dial func(ctx context.Context, network, address string) (net.Conn, error)) ConnectOption {
	return func(d *dialing) error {
		if dial == nil {
			return fmt.Errorf("%w: nil function to dial with", ErrOption)
		}
		d.netDial = dial
		return nil
	}
}

// WithHeader adds a header to the upgrade request, such as Authorization, Cookie or
// Origin.
func WithHeader(name, value string) ConnectOption {
	return func(d *dialing) error {
		d.header.Add(name, value)
		return nil
	}
}

// WithSubprotocols sets the subprotocols that the client offers, in order of preference.
// [Client.Subprotocol] returns the one that the server has chosen.
func WithSubprotocols(names ...string) ConnectOption {
	return func(d *dialing) error {
		d.protocols = names
		return nil
	}
}

// WithTimeout sets how long the client waits for the handshake, an answer, an update, a
// push, or the end of the connection. In a synctest bubble this is the bubble's time.
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

// WithEarlyReturn makes [Server.Connect] and [Server.Dial] return as soon as the client
// has its connection id, while the functions given to Server.OnConnection may still run.
// The client then sends no command by itself. Use it to test what happens while such a
// function runs, how a connection ends if the function fails, or an exact rate of
// commands.
func WithEarlyReturn() ConnectOption {
	return func(d *dialing) error {
		d.early = true
		return nil
	}
}

// WithFrames makes the client call f with each frame of the Mesh protocol that it receives,
// in order, answers and its connection id included. Use it to log the frames, to see the
// order between rooms or between answers and updates, or to imitate a client that ignores
// something. If f returns true, the client ignores the frame: it does not answer a ping,
// and does not keep an update or another push for the test. The result does not matter
// for answers and for the connection id.
//
// f is called on the goroutine that reads. It must not call the client's methods that
// wait.
func WithFrames(f func(Frame) (ignore bool)) ConnectOption {
	return func(d *dialing) error {
		if f == nil {
			return fmt.Errorf("%w: nil function for frames", ErrOption)
		}
		d.frames = f
		return nil
	}
}

// newDialing applies the options.
func newDialing(opts []ConnectOption) (*dialing, error) {
	d := &dialing{header: make(http.Header), timeout: DefaultTimeout}
	for _, o := range opts {
		if err := o(d); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// withLevel adds the level to a URL.
func (d *dialing) withLevel(url string) string {
	if d.level == 0 {
		return url
	}
	separator := "?"
	if strings.Contains(url, "?") {
		separator = "&"
	}
	return url + separator + "mesh-level=" + strconv.Itoa(d.level)
}

// HandshakeError says that the server refused the upgrade with an HTTP response.
type HandshakeError struct {
	Status int    // HTTP status: 401, 403, 503 …
	Body   string // the first KiB of the body, trimmed
	Header http.Header
}

// Error returns the status and the body.
func (e *HandshakeError) Error() string {
	return fmt.Sprintf("meshtest: handshake refused: %d %s", e.Status, e.Body)
}

// Connect opens a WebSocket. It waits for its connection id, and until the functions
// given to Server.OnConnection have returned. Their effects are then there, and the
// messages that they sent have come. To learn that they have returned, the client sends a
// "mesh/noop". It counts as one command of the client for Limits.CommandsPerSecond. See
// [WithEarlyReturn].
//
// Connect fails the test if any of that fails. If an OnConnection function fails, the
// message has the code and reason of the close frame (1011). If the app closes the
// connection in such a function, with another code than 1011 and 1012, Connect returns
// the client, and [Client.AwaitClose] says how it ended. The client is closed when the
// test is over. The subtests of a test may share its server.
func (s *Server) Connect(t TB, opts ...ConnectOption) *Client {
	t.Helper()
	c, err := s.dial(t, opts)
	return connected(t, c, err)
}

// Dial is [Server.Connect] for tests of refused connections, and for use without a test.
// It returns an error: a [*HandshakeError] if the server refused the upgrade, a
// [*CloseError] if the connection ended before an OnConnection function returned. The
// client that it returns fails the test that started the server. It is closed with the
// server at the latest.
func (s *Server) Dial(opts ...ConnectOption) (*Client, error) { return s.dial(s.tb, opts) }

// Connect is [Server.Connect] for a server that this package did not start, such as one in
// another process or behind an [net/http/httptest.Server]. The URL begins with ws://,
// wss://, http:// or https://, and contains the path of the mesh server.
//
//	ann := meshtest.Connect(t, web.URL+"/ws", meshtest.WithHeader("Cookie", session))
func Connect(t TB, url string, opts ...ConnectOption) *Client {
	t.Helper()
	c, err := dialURL(t, url, opts)
	return connected(t, c, err)
}

// Dial is [Connect] for tests of refused connections, and for use without a test. It
// returns the errors of [Server.Dial]. Close the client when done. The client has no test,
// so it panics if something else fails.
func Dial(url string, opts ...ConnectOption) (*Client, error) { return dialURL(noTest{}, url, opts) }

// connected returns a client that is closed when the test is over, or fails the test.
func connected(t TB, c *Client, err error) *Client {
	t.Helper()
	if err != nil {
		t.Fatalf("meshtest: connect: %s", strings.TrimPrefix(err.Error(), "meshtest: "))
		return nil
	}
	t.Cleanup(c.Close)
	return c
}

func (s *Server) dial(t TB, opts []ConnectOption) (*Client, error) {
	d, err := newDialing(opts)
	switch {
	case err != nil:
		return nil, err
	case d.netDial != nil:
		return nil, fmt.Errorf("%w: WithNetDial: a Server is reached in memory only", ErrOption)
	case d.path == "":
		d.path = "/ws"
	}
	d.netDial = func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := s.network.dial(ctx)
		if err != nil {
			return nil, err // not a nil *memConn in a net.Conn
		}
		return conn, nil
	}
	c := newClient(t, s, d)
	if err := c.connect(d, "ws://"+host+d.path); err != nil {
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

func dialURL(t TB, url string, opts []ConnectOption) (*Client, error) {
	d, err := newDialing(opts)
	switch {
	case err != nil:
		return nil, err
	case d.path != "":
		return nil, fmt.Errorf("%w: WithPath: the path is in the URL", ErrOption)
	}
	if rest, ok := strings.CutPrefix(url, "http"); ok { // https too
		url = "ws" + rest
	}
	c := newClient(t, nil, d)
	if err := c.connect(d, url); err != nil {
		return nil, err
	}
	return c, nil
}

// connect makes the handshake and waits for the connection id.
func (c *Client) connect(d *dialing, url string) error {
	ctx, cancel := context.WithTimeout(context.Background(), d.timeout)
	defer cancel()
	dialer := websocket.Dialer{Subprotocols: d.protocols, NetDialContext: d.netDial}
	ws, resp, err := dialer.DialContext(ctx, d.withLevel(url), d.header) //nolint:bodyclose // the dialer has read it
	if errors.Is(err, websocket.ErrBadHandshake) && resp != nil {
		body, _ := io.ReadAll(resp.Body) // in memory already
		return &HandshakeError{Status: resp.StatusCode, Body: strings.TrimSpace(string(body)), Header: resp.Header}
	}
	if err != nil {
		return fmt.Errorf("meshtest: %w", err)
	}
	c.ws, c.header = ws, resp.Header
	c.begin()
	if err := c.arrive(ctx, d); err != nil {
		c.Kill()
		return err
	}
	return nil
}

// arrive waits for the connection id and, unless the client returns early, until the
// OnConnection functions have returned.
func (c *Client) arrive(ctx context.Context, d *dialing) error {
	deadline, _ := ctx.Deadline()
	if !c.await(time.Until(deadline), func() bool { return c.id != "" }) {
		if end := c.ended(); end != nil {
			return end
		}
		return fmt.Errorf("meshtest: no connection id within %v", d.timeout)
	}
	if d.early {
		return nil
	}
	// The server answers no command before they have returned.
	_, err := c.roundTrip(request{Command: wire.CommandNoop, Payload: json.RawMessage("{}")}, time.Until(deadline))
	end := c.ended()
	switch {
	case err == nil:
		return nil
	case end == nil:
		return fmt.Errorf("meshtest: the OnConnection functions have not returned within %v", d.timeout)
	case end.byServer():
		return end
	}
	return nil // the app closed it
}
