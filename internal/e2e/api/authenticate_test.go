package api

import (
	"context"
	"crypto/tls"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// withAuth sets Options.Authenticate.
func withAuth(hook func(ctx context.Context, r *http.Request) (any, error)) func(*mesh.Options) {
	return func(o *mesh.Options) { o.Authenticate, o.HookTimeout = hook, time.Second }
}

func TestAuthenticate(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		release := make(chan struct{})
		defer close(release)
		s := w.Tracked(func(o *mesh.Options) {
			o.HookTimeout = 300 * time.Millisecond
			o.Authenticate = func(ctx context.Context, r *http.Request) (any, error) {
				switch r.Header.Get("X-Who") {
				case "ann":
					return map[string]any{"userId": "ann"}, nil
				case "nobody":
					return nil, nil
				case "refused":
					return nil, mesh.Refuse(403, "not today")
				case "wrapped":
					return nil, errors.Join(errors.New("secret"), mesh.Refuse(429, "slow down"))
				case "panic":
					panic("secret")
				case "hang":
					<-release
				case "unencodable":
					return make(chan int), nil
				}
				return nil, errors.New("secret reason")
			}
		})
		header := func(who string) http.Header { return http.Header{"X-Who": {who}} }
		p := s.Dial(header("ann"))
		assert.JSONEq(t, `{"metadata":{"userId":"ann"}}`, string(p.Call("mesh/get-my-connection-metadata", nil)))
		var present []mesh.Member
		require.NoError(t, json.Unmarshal(p.Join("lobby").Present, &present))
		assert.JSONEq(t, `{"userId":"ann"}`, string(present[0].Metadata))
		assert.JSONEq(t, `{"metadata":null}`, string(s.Dial(header("nobody")).Call("mesh/get-my-connection-metadata", nil)))
		for _, c := range []struct {
			who    string
			status int
			body   string
		}{
			{"other", 401, "Unauthorized"},
			{"refused", 403, "not today"},
			{"wrapped", 429, "slow down"},
			{"panic", 500, "Internal Server Error"},
			{"hang", 500, "Internal Server Error"},
			{"unencodable", 500, "Internal Server Error"},
		} {
			begun := time.Now()
			_, resp, err := s.TryDial(header(c.who))
			require.Error(t, err, c.who)
			require.NotNil(t, resp, c.who)
			assert.Equal(t, c.status, resp.StatusCode, c.who)
			body := make([]byte, 100)
			n, _ := resp.Body.Read(body)
			assert.Equal(t, c.body, strings.TrimSpace(string(body[:n])), c.who)
			assert.Less(t, time.Since(begun), w.Unhurried(2*time.Second))
		}
		assert.Equal(t, 2, s.Stats().Connections)
	})
}

// redisReply is an error that Redis answered.
type redisReply string

func (e redisReply) Error() string { return string(e) }

func (redisReply) RedisError() {}

// timeoutOnly has the one method that many a database driver's error has.
type timeoutOnly bool

func (timeoutOnly) Error() string { return "timeout" }

func (e timeoutOnly) Timeout() bool { return bool(e) }

// sqlState is an error of a database as drivers of PostgreSQL have it.
type sqlState string

func (e sqlState) Error() string { return "SQLSTATE " + string(e) }

func (e sqlState) SQLState() string { return string(e) }

// TestOutagesAreNoRefusals: an error of something that did not answer says nothing
// about the client. Errors of parsers look like those of networks, and do.
func TestOutagesAreNoRefusals(t *testing.T) {
	t.Parallel()
	escape := string([]byte("%zz")) // a constant would be reported by linters
	_, badURL := url.Parse(escape)
	_, _, badCIDR := net.ParseCIDR("x")
	_, _, badAddr := net.SplitHostPort("x")
	badJSON := json.Unmarshal([]byte("{"), new(any))
	_, noFile := os.ReadFile(filepath.Join(t.TempDir(), "sessions", "x"))
	_, badFile := os.ReadFile("a\x00b")
	_, longFile := os.ReadFile(filepath.Join(t.TempDir(), strings.Repeat("x", 1000)))
	outage := map[string]error{
		"canceled": context.Canceled, "deadline": context.DeadlineExceeded, "i/o timeout": os.ErrDeadlineExceeded,
		"EOF": io.EOF, "unexpected EOF": io.ErrUnexpectedEOF, "pipe": io.ErrClosedPipe, "closed": net.ErrClosed,
		"dial": &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("no route")}, "name": &net.DNSError{Err: "no such host", IsNotFound: true},
		"address in a dial": &net.OpError{Op: "dial", Net: "tcp", Err: badAddr}, "errno": syscall.ECONNRESET,
		"http": &url.Error{Op: "Get", URL: "https://idp", Err: errors.New("x")}, "certificate": &tls.CertificateVerificationError{Err: errors.New("x")},
		"mesh": mesh.ErrUnavailable, "sql": driver.ErrBadConn, "driver": timeoutOnly(true),
		"socket in a dial": &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.ENOENT)},
		"files":            &fs.PathError{Op: "open", Path: "x", Err: syscall.EMFILE}, "rights": &fs.PathError{Op: "open", Path: "x", Err: syscall.EACCES},
		"starting": sqlState("57P03"), "connections": sqlState("53300"), "lost": sqlState("08006"), "password": sqlState("28P01"),
		"redis closed": redis.ErrClosed, "redis pool": redis.ErrPoolTimeout, "redis": redisReply("LOADING Redis is loading"),
	}
	about := map[string]error{
		"plain": errors.New("no"), "URL": badURL, "CIDR": badCIDR, "address": badAddr, "JSON": badJSON, "nil": redis.Nil,
		"driver": timeoutOnly(false), "not found": mesh.ErrUnknownConnection,
		"no file": noFile, "no such name": badFile, "long name": longFile,
		"rows": sql.ErrNoRows, "UUID": sqlState("22P02"), "raised": sqlState("P0001"), "no state": sqlState("57"), "empty state": sqlState(""),
	}
	for want, errs := range map[int]map[string]error{500: outage, 401: about} {
		for name, err := range errs {
			for how, wrapped := range map[string]error{
				"alone": err, "wrapped": fmt.Errorf("a: %w", fmt.Errorf("b: %w", err)), "joined": errors.Join(errors.New("a"), err),
			} {
				require.Error(t, err, name)
				assert.Equal(t, want == 500, callbacks.IsOutage(wrapped), "%s, %s", name, how)
			}
			t.Run(fmt.Sprint(want, " ", name), func(t *testing.T) {
				t.Parallel()
				harness.Embedded(t, func(t *testing.T, w *harness.World) {
					s := w.Server(withAuth(func(context.Context, *http.Request) (any, error) { return nil, fmt.Errorf("sessions: %w", err) }))
					rec := httptest.NewRecorder()
					s.ServeHTTP(rec, harness.Handshake(t))
					assert.Equal(t, want, rec.Code)
					assert.Equal(t, http.StatusText(want)+"\n", rec.Body.String())
				})
			})
		}
	}
	assert.False(t, callbacks.IsOutage(&selfWrapping{}), "an error that wraps itself ends")
}

// selfWrapping is an error that wraps itself.
type selfWrapping struct{}

func (*selfWrapping) Error() string { return "loop" }

func (e *selfWrapping) Unwrap() error { return e }

// A request whose context ended for another reason than the client's leaving is a
// failure of the server.
func TestDeadlineOfTheRequestIsNoRefusal(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(withAuth(func(ctx context.Context, _ *http.Request) (any, error) { <-ctx.Done(); return nil, ctx.Err() }))
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, harness.Handshake(t).WithContext(ctx))
		assert.Equal(t, http.StatusInternalServerError, rec.Code)
		assert.EqualValues(t, 1, s.Stats().RefusedUpgrades["500"])
	})
}

// A client that hangs up while it is authenticated is no failure of the server.
func TestAClientThatHangsUp(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		asked := make(chan struct{})
		s := w.Server(withAuth(func(ctx context.Context, _ *http.Request) (any, error) {
			close(asked)
			<-ctx.Done()
			return nil, fmt.Errorf("query: %w", ctx.Err())
		}))
		want := s.Stats().RefusedUpgrades
		conn, err := s.Listener.Dial(t.Context(), "", "")
		require.NoError(t, err)
		_, err = io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
		require.NoError(t, err)
		<-asked
		require.NoError(t, conn.Close())
		w.Sleep(time.Millisecond)
		want["499"] = 1
		assert.Equal(t, want, s.Stats().RefusedUpgrades)
	})
}
