package socket

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

func TestFirstCloseCountsAndFlushes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), nil).start(false)
		for i := range 10 {
			_ = r.Send(push(t, "n", i))
		}
		r.Close(4001, strings.Repeat("é", 100))
		r.Close(4002, "second")
		if err := r.Send(push(t, "n", 10)); !errors.Is(err, ErrClosed) {
			t.Errorf("Send after Close: %v", err)
		}
		r.read()
		if n := len(r.got()); n != 10 {
			t.Errorf("client got %d of the frames sent before", n)
		}
		if code := r.clientCode(); code != 4001 {
			t.Errorf("client got close code %d", code)
		}
		if e := r.end(); e.Cause != CauseClosed || e.Code != 4001 || e.Reason != strings.Repeat("é", 61) {
			t.Errorf("ended with %v", e)
		}
		r.Close(4003, "third")
		if n := r.group.Counts().Closes["closed"]; n != 1 {
			t.Errorf("counted %d closes", n)
		}
	})
}

func TestCloseBeforeRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), nil)
		_ = r.Send(wire.AssignID("c1"))
		r.Close(0, "bye")
		r.start(true)
		if code := r.clientCode(); code != websocket.CloseNormalClosure {
			t.Errorf("client got close code %d", code)
		}
		if got := r.got(); len(got) != 1 || r.end().Cause != CauseClosed {
			t.Errorf("client got %v, end %v", got, r.end())
		}
	})
}

func TestCloseIsBounded(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		queued int
		want   time.Duration
	}{
		"writer stuck":             {queued: 3, want: closeGrace},
		"close frame not read":     {queued: 0, want: closeGrace},
		"close frame not answered": {queued: -1, want: closeGrace},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := prepare(t, new(handler), func(c *Config) { c.WriteTimeout = time.Hour })
				r.client.SetCloseHandler(func(int, string) error { return nil })
				r.start(test.queued < 0)
				for i := range test.queued {
					_ = r.Send(push(t, "n", i))
				}
				synctest.Wait()
				begun := time.Now()
				r.Close(1000, "")
				e := r.end()
				if took := time.Since(begun); e.Cause != CauseClosed || took < test.want || took > test.want+20*time.Millisecond {
					t.Errorf("ended with %v after %v", e, took)
				}
			})
		})
	}
}

// A peer that reads, but not all of a long queue in time, sees the close code and not a
// broken network, even if it does not answer.
func TestSlowPeerGetsTheCloseCode(t *testing.T) {
	t.Parallel()
	for name, code := range map[string]int{"answered": 4001, "not answered": 4001, "not read": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := prepare(t, new(handler), nil).start(false)
				if name == "not answered" {
					r.client.SetCloseHandler(func(int, string) error { return nil })
				}
				for range 40 { // each is written by itself; small ones would share a write
					_ = r.Send(push(t, "n", strings.Repeat("x", largeBytes)))
				}
				begun := time.Now()
				r.Close(4001, "")
				got, closed := 0, 0
				for {
					time.Sleep(closeGrace / 8)
					if name == "not read" && got == 3 {
						<-r.ended
					}
					_, _, err := r.client.ReadMessage()
					if err == nil {
						got++
						continue
					}
					var ce *websocket.CloseError
					if errors.As(err, &ce) && ce.Code != websocket.CloseAbnormalClosure {
						closed = ce.Code
					}
					break
				}
				e := r.end()
				if took := time.Since(begun); closed != code || got < 3 || got > 20 || e.Code != 4001 || took > 2*closeGrace+20*time.Millisecond+closeGrace/8 {
					t.Errorf("client got %d frames and close code %d; %v after %v", got, closed, e, took)
				}
				if n := r.group.Counts().Dropped; n == 0 {
					t.Error("what was not written was not counted as dropped")
				}
			})
		})
	}
}

func TestContextCloses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, nil)
		var cause error
		h.command = func(ctx context.Context, _ wire.Request) {
			<-ctx.Done()
			time.Sleep(5 * time.Second) // Run waits for it, the client does not
			cause = context.Cause(ctx)
		}
		r.say(`{"id":1,"command":"mesh/noop"}`)
		r.say(`{"id":2,"command":"mesh/noop"}`) // is never started
		synctest.Wait()
		begun := time.Now()
		r.release()
		if code := r.clientCode(); code != websocket.CloseGoingAway || time.Since(begun) != 0 {
			t.Errorf("client got close code %d after %v", code, time.Since(begun))
		}
		e := r.end()
		if e.Cause != CauseShutdown || !errors.Is(r.err, context.Canceled) || time.Since(begun) != 5*time.Second {
			t.Errorf("ended with %v after %v", e, time.Since(begun))
		}
		if cause == nil {
			t.Error("the command's context had no cause")
		}
	})
}

func TestPeerDisconnects(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		go_   func(r *rig)
		cause Cause
		code  int
	}{
		"close frame": {func(r *rig) {
			_ = r.client.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(4004, "bye"), time.Now().Add(time.Minute))
		}, CausePeer, 4004},
		"close frame without code": {func(r *rig) {
			_ = r.client.WriteControl(websocket.CloseMessage, nil, time.Now().Add(time.Minute))
		}, CausePeer, websocket.CloseNoStatusReceived},
		"network": {func(r *rig) { _ = r.client.NetConn().Close() }, CauseBroken, 0},
		"garbage": {func(r *rig) { _, _ = r.client.NetConn().Write([]byte("\xff\xff garbage")) }, CauseProtocol, websocket.CloseProtocolError},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := run(t, new(handler), nil)
				test.go_(r)
				if code := r.clientCode(); code != test.code {
					t.Errorf("client got close code %d, want %d", code, test.code)
				}
				if e := r.end(); e.Cause != test.cause || e.Code != test.code {
					t.Errorf("ended with %v", e)
				}
			})
		})
	}
}

func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, func(c *Config) {
			c.PingInterval, c.LatencyInterval = time.Minute, time.Minute
		})
		h.command = r.echo
		r.MinTTL(3 * time.Second)
		r.say(`{"id":1,"command":"mesh/noop"}`)
		if len(r.got()) != 1 {
			t.Fatal("no answer")
		}
		if r.queue.head != nil || r.queue.latest != nil || r.commands != nil || r.writing {
			t.Error("an idle connection holds a writer, a worker or memory")
		}
		r.Close(1000, "")
		r.end()
		r.MinTTL(time.Second)
		r.PingNow()
		if n := r.cfg.Wheel.Armed(); n != 0 {
			t.Errorf("%d timers left", n)
		}
	})
}

func TestEndText(t *testing.T) {
	t.Parallel()
	cause := errors.New("reset")
	e := &End{Cause: CauseSlow, Code: 1013, Reason: "slow", Err: cause}
	if got, want := e.Error(), `mesh: connection is closed (slow): 1013 "slow": reset`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if !errors.Is(e, ErrClosed) || !errors.Is(e, cause) || Cause(200).String() != "cause 200" {
		t.Error("an End does not wrap what it should, or Cause.String is wrong")
	}
}
