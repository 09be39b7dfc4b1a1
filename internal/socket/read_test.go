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

func TestCommandsAreDoneInOrder(t *testing.T) {
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

func TestFullQueueAnswersBusy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, func(c *Config) { c.CommandQueue = 2 })
		open := make(chan struct{})
		h.command = func(ctx context.Context, req wire.Request) {
			<-open
			r.echo(ctx, req)
		}
		for i := range 5 {
			r.say(fmt.Sprintf(`{"id":%d,"command":"mesh/noop"}`, i))
			synctest.Wait()
		}
		r.say(`{"command":"mesh/noop"}`) // refused too, without an answer
		got := r.got()
		if len(got) != 2 || got[0].ID != "3" || got[1].ID != "4" || got[0].code() != "EBUSY" {
			t.Fatalf("got %v, want EBUSY for 3 and 4", got)
		}
		close(open)
		if got := r.got(); len(got) != 3 || got[2].ID != "2" || got[2].code() != "" {
			t.Fatalf("got %v, want the answers to 0, 1, 2", got)
		}
		r.say(`{"id":6,"command":"mesh/noop"}`)
		if got := r.got(); len(got) != 1 || got[0].code() != "" {
			t.Fatalf("got %v, want an answer: the queue is empty", got)
		}
		if n := r.group.Counts().Busy; n != 3 {
			t.Errorf("counted %d busy, want 3", n)
		}
	})
}

func TestCommandQueueIsBoundedInBytes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, func(c *Config) { c.QueueBytes = 1000 })
		open := make(chan struct{})
		h.command = func(context.Context, wire.Request) { <-open }
		big := strings.Repeat("x", 600)
		for i := range 3 { // one runs, one waits, one is too much
			r.say(fmt.Sprintf(`{"id":%d,"command":"mesh/noop","payload":"%s"}`, i, big))
			synctest.Wait()
		}
		if got := r.got(); len(got) != 1 || got[0].ID != "2" || got[0].code() != "EBUSY" {
			t.Fatalf("got %v, want EBUSY for 2", got)
		}
		close(open)
	})
}

// A payload is a part of its frame and keeps all of it in memory: padding
// beside it counts like the payload itself, and so does a long name.
func TestPaddingOfWaitingCommandsCounts(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("x", 600)
	for name, text := range map[string]string{
		"beside the payload": `{"id":%d,"command":"mesh/noop","payload":{},"padding":"` + big + `"}`,
		"white space":        `{"id":%d,"command":"mesh/noop","payload":{}` + strings.Repeat(" ", 600) + `}`,
		"the command's name": `{"id":%d,"command":"` + big + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := new(handler)
				r := run(t, h, func(c *Config) { c.QueueBytes = 1000 })
				open := make(chan struct{})
				h.command = func(context.Context, wire.Request) { <-open }
				for i := range 3 {
					r.say(fmt.Sprintf(text, i))
					synctest.Wait()
				}
				if got := r.got(); len(got) != 1 || got[0].ID != "2" || got[0].code() != "EBUSY" {
					t.Errorf("got %v, want EBUSY for 2", got)
				}
				close(open)
			})
		})
	}
}

func TestCommandsPerSecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, func(c *Config) { c.CommandsPerSecond = 10 })
		h.command = r.echo
		for i := range 25 {
			r.say(fmt.Sprintf(`{"id":%d,"command":"mesh/noop"}`, i))
			r.say(fmt.Sprintf(`{"id":%d,"command":"pong"}`, i)) // no command
			synctest.Wait()
		}
		if answers, limited := outcome(r.got()); answers != 20 || limited != 5 {
			t.Errorf("%d answers, %d refused, want 20 and 5: twice the rate may come at once", answers, limited)
		}
		time.Sleep(time.Second)
		for range 11 {
			r.say(`{"id":1,"command":"mesh/noop"}`)
		}
		if answers, limited := outcome(r.got()); answers != 10 || limited != 1 {
			t.Errorf("a second later: %d answers, %d refused, want 10 and 1", answers, limited)
		}
	})
}

// outcome counts the answers and those of them that are ELIMIT.
func outcome(got []message) (answers, limited int) {
	for _, m := range got {
		if m.code() == "ELIMIT" {
			limited++
		} else {
			answers++
		}
	}
	return answers, limited
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

func TestWhatIsNotMeshIsIgnored(t *testing.T) {
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

func TestForeignFrames(t *testing.T) {
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

func TestConcurrentCommandsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := prepare(t, h, func(c *Config) { c.HandlerConcurrency = 3 })
		h.concurrent = func(ctx context.Context, req wire.Request) {
			switch req.ID {
			case "0":
				panic("oh")
			case "9":
			default:
				<-ctx.Done()
			}
			r.echo(ctx, req)
		}
		r.start(true)
		for i := range 5 {
			r.say(fmt.Sprintf(`{"id":%d,"command":"app/slow"}`, i))
			synctest.Wait()
		}
		got := r.got()
		if len(got) != 2 || got[0].ID != "0" || got[0].code() != "ESERVER" || got[1].ID != "4" || got[1].code() != "EBUSY" {
			t.Fatalf("got %v, want ESERVER for 0 and EBUSY for 4", got)
		}
		r.Close(1000, "")
		if e := r.end(); e.Cause != CauseClosed {
			t.Errorf("ended with %v", e)
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
		// The client may be told before it has written everything.
		_ = r.client.WriteMessage(websocket.TextMessage, []byte(strings.Repeat("x", 20_000)))
		if code := r.clientCode(); code != websocket.CloseMessageTooBig {
			t.Errorf("client got close code %d, want 1009", code)
		}
		if e := r.end(); e.Cause != CauseTooLarge {
			t.Errorf("ended with %v, want too large", e)
		}
	})
}
