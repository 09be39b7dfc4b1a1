package socket

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// Above the rate, commands wait for their token, in the order in which they came.
func TestCommandsPerSecond(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := runFloor(t, func(c *Config) { c.CommandsPerSecond = 10 })
		f.end()
		for i := range 25 {
			f.say(fmt.Sprint("line", i%3))
			f.r.say(`{"id":99,"command":"pong"}`) // not a command
		}
		if n := len(f.r.got()); n != 20 {
			t.Fatalf("%d answers, want 20: twice the rate may come at once", n)
		}
		for want := 21; want <= 25; want++ {
			time.Sleep(100 * time.Millisecond)
			f.answered(fmt.Sprint(want))
		}
		f.idle()
		if c := f.r.group.Counts(); c.Delayed != 5 || c.Limited != 0 {
			t.Errorf("%d delayed, %d limited, want 5 and 0", c.Delayed, c.Limited)
		}
		time.Sleep(time.Second)
		f.say(slices.Repeat([]string{"a"}, 12)...)
		if n := len(f.r.got()); n != 10 {
			t.Errorf("%d answers a second later, want 10", n)
		}
		f.r.Close(1000, "") // while some wait
		f.r.end()
	})
}

// A later command of the same kind takes the place of a waiting one, and its token. Both
// are answered.
func TestCommandsAreSuperseded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := runFloor(t, func(c *Config) { c.CommandsPerSecond = 1 })
		f.say("a", "a late", "b late", "a late", "c holds", "a late", "a late", "a", "a late")
		f.begun("+1")
		f.end()
		f.begun("+4") // it has the token of 2
		f.answered("1", "2", "4")
		time.Sleep(time.Second)
		f.begun("+3")
		f.end()
		time.Sleep(time.Second)
		f.begun("+5")
		time.Sleep(time.Second)
		f.begun("+7")
		f.answered("3", "5", "6", "7")
		time.Sleep(2 * time.Second)
		f.begun("+8 +9")
		f.answered("8", "9")
		if n := f.r.group.Counts().Superseded; n != 2 {
			t.Errorf("%d superseded, want 2", n)
		}
		f.idle()
		// A token that was not needed is returned.
		time.Sleep(10 * time.Second)
		for range 9 {
			f.r.say(`{"id":1,"command":"a over","payload":"spared"}`)
			synctest.Wait()
		}
		if n := len(f.r.got()); n != 9 {
			t.Errorf("%d answers, want 9", n)
		}
	})
}
