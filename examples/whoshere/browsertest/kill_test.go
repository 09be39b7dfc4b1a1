package browsertest

import (
	"testing"
	"time"
)

// slack is the time that the page may take to show an update on a busy machine.
const slack = 2 * time.Second

// killedServer kills a server. Its people must vanish exactly once, within the promised
// time, and return exactly once when the server is back.
func (w *world) killedServer(t *testing.T) {
	const room = "kill"
	ann, bob := w.meet(t, room)
	cyd := newPerson(t, w.two, "")
	cyd.join(room, map[string]any{"name": "Cyd"})
	ann.await(`rows("Cyd").length === 1`)
	get[bool](bob, `window.stays = true`)

	killed := time.Now() // the last renewal was before this
	w.two.kill()
	bob.await(`status() === "reconnecting"`)
	bob.shot("reconnecting")
	ann.await(`rows("Bob").length === 0 && rows("Cyd").length === 0`)
	type departure struct {
		Name string
		At   int64 // in ms since 1970
	}
	for _, one := range get[[]departure](ann, `seen.gone`) {
		took := time.UnixMilli(one.At).Sub(killed)
		t.Logf("%s left %v after the kill", one.Name, took.Round(time.Millisecond))
		if took > leaseTTL+time.Second+slack {
			t.Errorf("%s left %v after the kill", one.Name, took)
		}
	}

	// If a person is back at once, the page has only been reloaded, and shows no toast.
	ann.await(`toasts("leave", "Bob") === 1 && toasts("leave", "Cyd") === 1`)

	w.two.start()
	bob.await(`status() === "live" && rows("Ann").length === 1 && rows("Bob").length === 1 && all("#people li").length === 2`)
	ann.await(`rows("Bob").length === 1 && rows("Bob")[0].dataset.tabs === "1" && all("#people li").length === 2`)
	if !get[bool](bob, `window.stays`) {
		t.Error("the page was loaded again")
	}

	w.settle(t, room, ann, bob)
	for what, want := range map[string]int{
		`toasts("leave", "Bob")`:                              1,
		`toasts("leave", "Cyd")`:                              1,
		`toasts("join", "Bob")`:                               2, // the first join, and the return
		`toasts("leave", "Ann")`:                              0,
		`seen.gone.filter(({name}) => name === "Bob").length`: 1,
	} {
		if n := get[int](ann, what); n != want {
			t.Errorf("Ann's page: %s is %d, not %d", what, n, want)
		}
	}
	for _, what := range []string{`toasts("leave", "Ann")`, `toasts("leave", "Cyd")`, `toasts("join", "Ann")`} {
		if n := get[int](bob, what); n != 0 {
			t.Errorf("Bob's page: %s is %d", what, n)
		}
	}
	ann.clean(false)
	bob.clean(true)
}
