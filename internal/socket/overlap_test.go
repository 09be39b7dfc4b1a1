package socket

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// overlapping is the command that overlaps in these tests.
const overlapping = "over"

// overlap is a handler that records which commands are begun, and answers on demand.
type overlap struct {
	*handler
	mu   sync.Mutex // guards log
	log  []string
	gate chan struct{} // one value per answer
	r    *rig
}

func (o *overlap) note(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.log = append(o.log, fmt.Sprintf(format, args...))
}

// noted returns the records so far, and clears them.
func (o *overlap) noted() string {
	synctest.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	log := strings.Join(o.log, " ")
	o.log = nil
	return log
}

func (o *overlap) answer(n int) {
	for range n {
		o.gate <- struct{}{}
	}
	synctest.Wait()
}

// say makes the client send commands, "over" or others, numbered from first.
func (o *overlap) say(first int, commands ...string) {
	for i, command := range commands {
		o.r.say(fmt.Sprintf(`{"id":%d,"command":%q}`, first+i, command))
	}
	synctest.Wait()
}

// answered returns the ids of the answers that the client got.
func (o *overlap) answered() (ids []string) {
	for _, m := range o.r.got() {
		ids = append(ids, m.ID.String()+m.code())
	}
	return ids
}

func runOverlapping(t *testing.T, change func(*Config)) *overlap {
	o := &overlap{handler: new(handler), gate: make(chan struct{})}
	o.handler.command = func(ctx context.Context, req wire.Request) {
		o.note("do%s", req.ID)
		o.r.echo(ctx, req)
	}
	o.handler.begin = func(_ context.Context, req wire.Request) func(context.Context) {
		o.note("begin%s", req.ID)
		return func(ctx context.Context) {
			select {
			case <-o.gate:
			case <-ctx.Done():
				o.note("over%s", req.ID)
			}
			o.r.echo(ctx, req)
		}
	}
	o.r = run(t, o.handler, change)
	return o
}

// idle checks that no command is left.
func (o *overlap) idle(t *testing.T) {
	t.Helper()
	synctest.Wait()
	s := o.r.Socket
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.commands != nil {
		t.Fatalf("commands are left: %+v", s.commands)
	}
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

// Commands that overlap are begun without waiting for the answers of those before them,
// and are answered in order. Other commands wait for all before them.
func TestOverlappingCommands(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := runOverlapping(t, nil)
		o.say(1, "other", "over", "over", "other", "over")
		equal(t, "begun", o.noted(), "do1 begin2 begin3")
		equal(t, "answers", o.answered(), []string{"1"})
		o.answer(1)
		equal(t, "begun", o.noted(), "")
		equal(t, "answers", o.answered(), []string{"2"})
		o.say(6, "over")
		equal(t, "begun", o.noted(), "") // it waits behind 4
		o.answer(1)
		equal(t, "begun", o.noted(), "do4 begin5 begin6")
		equal(t, "answers", o.answered(), []string{"3", "4"})
		o.answer(2)
		equal(t, "answers", o.answered(), []string{"5", "6"})
	})
}

// Space is reserved for the answers to come, so that the answers to accepted commands do
// not close the connection.
func TestOverlappingCommandsLeaveRoomForAnswers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := runOverlapping(t, func(c *Config) { c.QueueBytes = 16 << 10 })
		o.say(1, slices.Repeat([]string{"over"}, 40)...)
		equal(t, "begun", len(strings.Fields(o.noted())), 32)
		for n := range 40 {
			o.answer(1)
			equal(t, "answers", o.answered(), []string{fmt.Sprint(n + 1)})
		}
	})
}

// A panic in either part, or the end of the goroutine, is answered in order. Later
// commands go on.
func TestOverlappingCommandsThatFail(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(){"panic": func() { panic("boo") }, "goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o := runOverlapping(t, nil)
				inner := o.handler.begin
				o.handler.begin = func(ctx context.Context, req wire.Request) func(context.Context) {
					if req.ID == "2" {
						fail()
					}
					rest := inner(ctx, req)
					if req.ID == "3" {
						return func(context.Context) { fail() }
					}
					return rest
				}
				o.say(1, "over", "over", "over", "over", "other")
				equal(t, "answers", o.answered(), []string(nil))
				o.answer(2)
				equal(t, "answers", o.answered(), []string{"1", "2ESERVER", "3ESERVER", "4", "5"})
				o.idle(t)
			})
		})
	}
}

// A command without an id has its effect too.
func TestOverlappingCommandWithoutAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := runOverlapping(t, nil)
		o.handler.begin = func(_ context.Context, req wire.Request) func(context.Context) {
			o.note("begin%s", req.ID)
			return nil
		}
		o.say(1, "over", "other")
		equal(t, "begun", o.noted(), "begin1 do2")
	})
}

// The end of the connection ends the wait, and Run returns when no command runs any more.
func TestOverlappingCommandsEndWithTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := runOverlapping(t, nil)
		o.say(1, "over", "over", "other")
		o.noted()
		o.r.Close(websocket.CloseNormalClosure, "")
		o.r.end()
		equal(t, "ended", o.noted(), "over1 over2")
		time.Sleep(time.Minute)
		equal(t, "after the end", o.noted(), "")
	})
}

// A connection without commands has no goroutine for them.
func TestOverlappingCommandsLeaveNoGoroutine(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := runOverlapping(t, nil)
		o.say(1, "over", "over", "over")
		o.answer(3)
		o.idle(t)
	})
}
