package socket

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// refused holds bytes that are not a valid frame of a client, by the kind of error.
var refused = map[string][]byte{
	"not masked": {0x81, 0x01, 'x'},
	"reserved":   {0xf1, 0x80, 0, 0, 0, 0},
	"close code": {0x88, 0x82, 0, 0, 0, 0, 0x00, 0x01},
}

// A peer that breaks the protocol during a write gets the rest of that write and the
// reason. If it does not read, its connection is cut in time, and the cause is the
// invalid frame.
func TestRefusedFrameWhileStuck(t *testing.T) {
	t.Parallel()
	for what, data := range refused {
		for _, reads := range []bool{true, false} {
			name := what + ", silent"
			if reads {
				name = what + ", reading"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					r := prepare(t, new(handler), nil).start(false)
					for i := range 20 {
						if err := r.Send(push(t, "n", i)); err != nil {
							t.Fatal(err)
						}
					}
					synctest.Wait() // stuck in the first of them
					begun := time.Now()
					if _, err := r.client.NetConn().Write(data); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if reads {
						time.Sleep(closeGrace - 50*time.Millisecond)
						r.read()
						if code := r.clientCode(); code != websocket.CloseProtocolError {
							t.Errorf("client got close code %d (%v), want 1002", code, r.readErr)
						}
						_ = r.client.Close()
					}
					if e := r.end(); e.Cause != CauseProtocol || e.Code != websocket.CloseProtocolError {
						t.Errorf("ended with %v, want protocol, 1002", e)
					}
					if took := time.Since(begun); took > 2*closeGrace+50*time.Millisecond {
						t.Errorf("took %v", took)
					}
				})
			})
		}
	}
}

// If an app upgraded the connection, the websocket package informs the peer and abandons
// stuck data. That does not count as a slow peer.
func TestRefusedFrameElsewhere(t *testing.T) {
	t.Parallel()
	for _, stuck := range []bool{false, true} {
		p := newPlain(t, new(handler), Config{WriteTimeout: time.Minute}, elsewhere)
		s, client := p.dial()
		if stuck {
			for range 16 << 10 {
				if err := s.Send(push(t, "n", strings.Repeat("x", 1000))); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := client.NetConn().Write(refused["not masked"]); err != nil {
			t.Fatal(err)
		}
		if !stuck {
			if _, _, err := client.ReadMessage(); !websocket.IsCloseError(err, websocket.CloseProtocolError) {
				t.Errorf("client got %v, want close code 1002", err)
			}
			_ = client.Close()
		}
		if e := s.end(t); e.Cause != CauseProtocol {
			t.Errorf("stuck %v: ended with %v, want protocol", stuck, e)
		}
	}
}

// A request that cannot be hijacked is answered with a status.
func TestUpgradeNeedsAHijacker(t *testing.T) {
	t.Parallel()
	r, err := http.NewRequest(http.MethodGet, "http://mesh.test/", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{
		"Connection": {"upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	var w unhijackable
	if _, err := Upgrade(new(websocket.Upgrader), &w, r, nil); err == nil || w.status != http.StatusInternalServerError {
		t.Errorf("%v, status %d", err, w.status)
	}
}

type unhijackable struct{ status int }

func (*unhijackable) Header() http.Header         { return http.Header{} }
func (*unhijackable) Write(p []byte) (int, error) { return len(p), nil }
func (u *unhijackable) WriteHeader(status int)    { u.status = status }

// A panic in an app's function is counted and logged, and affects only that frame.
func TestRecovered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		h := new(handler)
		r := prepare(t, h, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
		h.command = func(ctx context.Context, req wire.Request) {
			if req.ID == "1" {
				panic("secret " + strings.Repeat("x", 10_000))
			}
			r.echo(ctx, req)
		}
		h.foreign = func(int, []byte) { panic(errors.New("foreign")) }
		r.start(true)
		r.say(`{"id":1,"command":"mesh/noop"}`)
		synctest.Wait() // the first of several equal entries is logged
		r.say(`foreign`)
		r.say(`{"id":2,"command":"mesh/noop"}`)
		if got := r.got(); len(got) != 2 || got[0].code() != wire.CodeServer || got[1].ID != "2" || got[1].code() != "" {
			t.Errorf("got %v, want ESERVER and an answer", got)
		}
		if n := r.group.Counts().Panics; n != 2 {
			t.Errorf("%d panics counted, want 2", n)
		}
		r.Close(1000, "")
		r.end()
		text := log.String()
		for _, want := range []string{"mesh: handler panicked", "in=command", "stack=", "refuse_test.go"} {
			if !strings.Contains(text, want) {
				t.Errorf("log lacks %q: %.2000s", want, text)
			}
		}
		if strings.Contains(text, strings.Repeat("x", 5000)) {
			t.Error("what it panicked with was not shortened")
		}
	})
}
