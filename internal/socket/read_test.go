package socket

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

func TestCommandsRunInOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, nil)
		h.command = func(ctx context.Context, req wire.Request) {
			if req.ID == "0" {
				time.Sleep(time.Second) // the others wait behind it
			}
			r.echo(ctx, req)
		}
		const n = 50
		for i := range n {
			r.say(fmt.Sprintf(`{"id":%d,"command":"mesh/noop","payload":{}}`, i))
		}
		time.Sleep(time.Second)
		got := r.got()
		if len(got) != n {
			t.Fatalf("got %d answers, want %d", len(got), n)
		}
		for i, m := range got {
			if m.ID.String() != fmt.Sprint(i) || m.Command != wire.CommandNoop {
				t.Fatalf("answer %d has id %s, command %s", i, m.ID, m.Command)
			}
		}
		if seen := h.seen.Load(); seen != n {
			t.Errorf("%d frames seen, want %d", seen, n)
		}
	})
}

func TestFloodCloses(t *testing.T) {
	t.Parallel()
	for name, frame := range map[string]func(r *rig) error{
		"commands": func(r *rig) error {
			return r.client.WriteMessage(websocket.TextMessage, []byte(`{"command":"mesh/noop"}`))
		},
		"pongs": func(r *rig) error {
			return r.client.WriteMessage(websocket.TextMessage, []byte(`{"id":1,"command":"pong"}`))
		},
		"junk": func(r *rig) error { return r.client.WriteMessage(websocket.BinaryMessage, []byte{0}) },
		"control pings": func(r *rig) error {
			return r.client.WriteControl(websocket.PingMessage, nil, time.Now().Add(time.Minute))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := run(t, new(handler), func(c *Config) { c.CommandsPerSecond = 5 })
				for range 100 {
					if err := frame(r); err != nil {
						t.Fatal(err)
					}
				}
				synctest.Wait()
				if r.Socket.ended() != nil {
					t.Fatal("closed already: ten times the rate for two seconds is allowed")
				}
				if err := frame(r); err != nil {
					t.Fatal(err)
				}
				if code := r.clientCode(); code != websocket.ClosePolicyViolation {
					t.Errorf("client got close code %d, want 1008", code)
				}
				if e := r.end(); e.Cause != CauseFlood {
					t.Errorf("ended with %v, want flood", e)
				}
			})
		})
	}
}

func TestForeignFramesAreIgnored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &handler{meshOnly: true}
		r := run(t, h, nil)
		h.command = r.echo
		h.foreign = func(int, []byte) { t.Error("Foreign was called") }
		for _, text := range []string{``, `hello`, `[1]`, `{}`, `{"id":1}`, `{"id":1,"command":7}`, "\xff"} {
			r.say(text)
		}
		_ = r.client.WriteMessage(websocket.BinaryMessage, []byte(`{"id":1,"command":"mesh/noop"}`))
		r.say(`{"command":"mesh/noop"}`) // no id, no answer
		r.say(`{"id":2,"command":"mesh/noop"}`)
		if got := r.got(); len(got) != 1 || got[0].ID != "2" {
			t.Errorf("got %v, want the answer to 2", got)
		}
		if n := h.seen.Load(); n != 10 {
			t.Errorf("%d frames seen, want all 10", n)
		}
	})
}

func TestForeignFramesAreHandled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, func(c *Config) { c.CommandsPerSecond = 1 })
		h.command = r.echo
		var got []string
		h.foreign = func(messageType int, data []byte) {
			got = append(got, fmt.Sprint(messageType, " ", string(data)))
			if len(got) == 1 {
				panic("app")
			}
		}
		r.say(`hello`)
		_ = r.client.WriteMessage(websocket.BinaryMessage, []byte("raw"))
		r.say(`{"id":2,"command":"mesh/noop"}`)
		for range 100 { // no flood
			r.say(`more`)
		}
		if answers := r.got(); len(answers) != 1 || answers[0].ID != "2" {
			t.Errorf("got %v, want the answer to 2", answers)
		}
		if len(got) != 102 || got[0] != "1 hello" || got[1] != "2 raw" {
			t.Errorf("foreign frames: %d, %q", len(got), got[:2])
		}
		if n := r.group.Counts().Panics; n != 1 {
			t.Errorf("counted %d panics, want 1", n)
		}
	})
}

func TestPanicInCommandIsAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, nil)
		h.command = func(ctx context.Context, req wire.Request) {
			switch req.ID {
			case "1":
				panic("oh")
			case "2":
				runtime.Goexit()
			}
			r.echo(ctx, req)
		}
		for i := 1; i <= 3; i++ {
			r.say(fmt.Sprintf(`{"id":%d,"command":"mesh/noop"}`, i))
		}
		got := r.got()
		if len(got) != 3 || got[0].code() != "ESERVER" || got[1].code() != "ESERVER" || got[2].code() != "" {
			t.Fatalf("got %v, want ESERVER twice and an answer", got)
		}
	})
}

func TestTooLargeMessage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := run(t, new(handler), func(c *Config) { c.FrameBytes = 1000 })
		r.say(`"` + strings.Repeat("x", 998) + `"`)
		synctest.Wait()
		if r.Socket.ended() != nil {
			t.Fatal("closed for a message of exactly FrameBytes")
		}
		// The client may get the close frame before it has written everything.
		_ = r.client.WriteMessage(websocket.TextMessage, []byte(strings.Repeat("x", 20_000)))
		if code := r.clientCode(); code != websocket.CloseMessageTooBig {
			t.Errorf("client got close code %d, want 1009", code)
		}
		if e := r.end(); e.Cause != CauseTooLarge {
			t.Errorf("ended with %v, want too large", e)
		}
	})
}
