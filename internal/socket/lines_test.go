package socket

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/meshpresence/mesh/internal/wire"
)

// Commands of one line are executed one after the other, those of different lines
// concurrently. A command that hangs blocks only its own line.
func TestLines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := runFloor(t, nil)
		f.say("a", "a", "b", "c free", "c free", "b")
		f.begun("+1 +3 +4 +5")
		f.end("3")
		f.begun("+6")
		f.end("4", "6")
		f.answered("3", "4", "6")
		f.say("b", "a")
		f.begun("+7")
		f.end("1")
		f.begun("+2")
		f.end()
		f.begun("+8")
		f.answered("1", "2", "5", "7", "8")
		f.idle()
	})
}

// Commands that overlap are begun in order within their line, and do not wait for other
// lines.
func TestLinesOfCommandsThatOverlap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := runFloor(t, nil)
		f.say("a over", "a over", "b over", "a", "a over", "b")
		f.begun("+1 +2 +3")
		f.end("2")
		f.answered()
		f.end("3")
		f.begun("+6")
		f.answered("3")
		f.end("1")
		f.answered("1")
		f.end("2") // the test ends it only now
		f.begun("+4")
		f.answered("2")
		f.end()
		f.begun("+5")
		f.answered("4", "5", "6")
		f.idle()
	})
}

// A command that holds waits only for its own line. All later commands wait for it.
func TestCommandsThatHold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := runFloor(t, nil)
		f.say("a", "own", "own holds", "b", "c beside", "d free", "own holds", "own")
		f.begun("+1 +2")
		f.end("2")
		f.begun("+3")
		f.end("3")
		f.begun("+4 +5 +6 +7")
		f.end("7")
		f.begun("+8")
		f.end()
		f.answered("1", "2", "3", "4", "5", "6", "7", "8")
		f.idle()
	})
}

// The number of commands of each kind that run at once is limited.
func TestCommandsAtOnceAreLimited(t *testing.T) {
	t.Parallel()
	for how, c := range map[string]struct{ most, n int }{"x": {5, 40}, "free": {maxFree, 40}, "beside": {3, 300}} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := runFloor(t, func(cfg *Config) { cfg.LinesAtOnce, cfg.HandlerConcurrency = 5, 3 })
				for i := range c.n {
					f.say(fmt.Sprint("line", i, " ", how))
				}
				f.say("pong")
				f.mu.Lock()
				running := f.running
				f.mu.Unlock()
				if running != c.most {
					t.Errorf("%d run at once, want %d", running, c.most)
				}
				f.end()
				if n := len(f.r.got()); n != c.n || f.most != c.most {
					t.Errorf("%d answers, want %d; at most %d at once, want %d", n, c.n, f.most, c.most)
				}
				f.idle()
			})
		})
	}
}

// The lines of all sockets together are limited, but each socket always has a few. The
// count is zero at the end, however the connection ends.
func TestLinesOfAllSocketsAreLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := runFloor(t, nil)
		f.r.group.extraLines = 2
		running := func(want int) {
			t.Helper()
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.running != want {
				t.Fatalf("%d run at once, want %d", f.running, want)
			}
		}
		for i := range 20 {
			f.say(fmt.Sprint("line", i))
		}
		running(minLines + 2)
		f.say("line0", "line0 over")
		running(minLines + 2)
		f.end("1", "2")
		running(minLines + 2)
		f.r.group.lines.Add(2) // lines of other sockets
		f.end("3", "4")
		running(minLines)
		f.r.group.lines.Add(-2)
		f.end()
		f.idle()
		if n := f.r.group.lines.Load(); n != 0 {
			t.Fatalf("%d lines are still counted", n)
		}
		f.mu.Lock()
		f.open = false
		f.mu.Unlock()
		for i := range 20 {
			f.say(fmt.Sprint("line", i))
			f.say(fmt.Sprint("line", i, " over"))
		}
		running(minLines + 2)
		f.r.Close(1000, "")
		f.r.end()
		if n := f.r.group.lines.Load(); n != 0 {
			t.Fatalf("%d lines are counted after the end", n)
		}
	})
}

// A command whose outcome depends on those before it is begun again when they are done.
func TestCommandsAreBegunAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := runFloor(t, func(c *Config) { c.LinesAtOnce = 2 })
		inner := f.attempt
		f.attempt = func(ctx context.Context, req wire.Request, last bool) Begun {
			b := inner(ctx, req, last)
			_, how, _ := strings.Cut(req.Command, " ")
			b.Again = strings.HasPrefix(how, "again") || how == "free"
			return b
		}
		f.say("a", "b again", "c again", "x free", "b", "d")
		f.begun("+1 +2 +3 +4 +6") // waiting commands do not count
		f.end("6")
		f.end("1")
		f.begun("+2") // for the last time
		f.end("2")
		f.begun("+3 +5")
		f.end("3")
		f.begun("+4")
		f.end()
		f.answered("1", "2", "3", "4", "5", "6")
		f.say("e again") // no command is before it
		f.begun("+7")
		f.answered("7")
		f.idle()
		f.mu.Lock()
		f.open = false
		f.mu.Unlock()
		f.say("a", "b again", "b")
		f.r.Close(1000, "")
		f.r.end()
		f.begun("+8 +9")
	})
}

// A panic, or the end of a handler's goroutine, blocks no other command.
func TestLinesGoOnAfterFailures(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(){"panic": func() { panic("boo") }, "goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := runFloor(t, func(c *Config) { c.LinesAtOnce, c.HandlerConcurrency = 1, 1 })
				f.end()
				f.attempt = func(context.Context, wire.Request, bool) Begun {
					fail()
					return Begun{}
				}
				f.concurrent = func(context.Context, wire.Request) { fail() }
				f.say("a", "a", "b", "c over", "c over", "c", "d free", "e holds", "f beside", "f beside", "g")
				var want []string
				for id := range 11 {
					want = append(want, fmt.Sprint(id+1, "ESERVER"))
				}
				f.answered(want...)
				f.idle()
			})
		})
	}
}
