package api

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// cursor publishes the position of a client's cursor in a room, at a rate.
type cursor struct {
	c    *harness.StockClient
	room string
	rate int
	n    int
	sent []*harness.StockCall
}

// move publishes states for a while, and returns the last one.
func (m *cursor) move(d time.Duration) string {
	begun := time.Now()
	for i := 0; ; i++ {
		at := time.Duration(i) * time.Second / time.Duration(m.rate)
		if at >= d {
			return fmt.Sprintf(`{"x":%d}`, m.n)
		}
		time.Sleep(time.Until(begun.Add(at)))
		m.n++
		m.sent = append(m.sent, m.c.Publish(m.room, map[string]any{"x": m.n}))
	}
}

func TestCursorsFasterThanTheRate(t *testing.T) {
	t.Parallel()
	for _, interval := range []time.Duration{10 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond} {
		for _, rate := range []int{144, 165, 240} {
			t.Run(fmt.Sprint(interval, " ", rate), func(t *testing.T) {
				t.Parallel()
				if interval != 50*time.Millisecond || rate != 240 {
					harness.Calm(t, "nine combinations of cursors")
				}
				harness.Embedded(t, func(t *testing.T, w *harness.World) {
					s := w.Server()
					s.Track(".*", mesh.PresenceOptions{StateInterval: interval})
					watcher, c := s.Dial(), s.Stock("")
					watcher.Subscribe("board")
					c.AllOK(c.JoinRoom("board"))
					m := &cursor{c: c, room: "board", rate: rate}
					for range 5 {
						last := m.move(2 * time.Second)
						asked := time.Now()
						c.AllOK(c.Send("mesh/noop", "", nil), c.Room("mesh/join-room", "other"), c.Room("mesh/leave-room", "other"))
						assert.LessOrEqual(t, time.Since(asked), 120*time.Millisecond, "other requests are answered promptly")
						w.Sleep(interval + 200*time.Millisecond)
						states := watcher.Got()
						assert.Equal(t, last, string(states[len(states)-1].State), "the last position after a rest")
					}
					m.move(2 * time.Second)
					c.AllOK(c.Room("mesh/clear-presence-state", "board"))
					w.Sleep(time.Second)
					states := watcher.Got()
					assert.Equal(t, "null", string(states[len(states)-1].State), "no state after clear")
					c.AllOK(m.sent...)
					assert.LessOrEqual(t, len(states), int(12*time.Second/interval)+20, "no more than the interval allows")
					assert.Zero(t, s.Stats().Closed["flood"])
				})
			})
		}
	}
}

// In a room with an interval, a newer state supersedes states that wait for a token. In
// a room without one, each state is delivered. Silent states and other states do not
// supersede each other, and an invalid state supersedes none.
func TestStatesThatWaitAreSuperseded(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.Limits(func(l *mesh.Limits) { l.CommandsPerSecond, l.StateBytes = 1, 100 }))
		s.Track("^fast", mesh.PresenceOptions{StateInterval: 10 * time.Millisecond})
		s.Track("^each", mesh.PresenceOptions{})
		watcher, c := s.Dial(), s.Stock("")
		watcher.Subscribe("fast")
		w.Sleep(time.Second)
		watcher.Subscribe("each")
		c.AllOK(c.Room("mesh/join-room", "fast"), c.Room("mesh/join-room", "each")) // no token is left
		state := func(room string, state string, more string) *harness.StockCall {
			return c.Send("mesh/publish-presence-state", room, json.RawMessage(fmt.Sprintf(`{"roomName":%q,"state":%s%s}`, room, state, more)))
		}
		silent, brief := `,"silent":true`, `,"expireAfter":100`
		calls := []*harness.StockCall{
			state("fast", `{"a":1}`, ""), state("fast", `{"a":2}`, ""), state("each", `{"e":1}`, ""), state("fast", `{"a":3}`, ""), // 1 token
			state("each", `{"e":2}`, ""),                                       // 2 with the first of that room
			state("fast", `{"b":1}`, silent), state("fast", `{"b":2}`, silent), // 1
			state("fast", `{"c":1}`, ""),                                                                                       // 1
			c.Room("mesh/get-presence-state", "fast"),                                                                          // 1
			state("fast", `{"d":1}`, ""), state("fast", `null`, ""), state("fast", `{"f":"`+strings.Repeat("x", 100)+`"}`, ""), // 3
			state("fast", `{"g":1}`, ""), state("fast", `{"g":2}`, brief), // 1
		}
		begun := time.Now()
		answers := c.WaitAll(calls...)
		var got []string
		for _, a := range answers {
			got = append(got, fmt.Sprintf("%v %t %s", a.At.Sub(begun).Round(time.Second).Seconds(), a.Ok(), a.Code()))
		}
		assert.Equal(t, []string{
			"1 true ", "1 true ", "2 true ", "1 true ", "3 true ", "4 true ", "4 true ", "5 true ", "6 true ",
			"7 true ", "8 false ", "9 false ", "10 true ", "10 true ",
		}, got)
		w.Sleep(time.Second)
		delivered := map[string][]string{}
		for _, u := range watcher.Got() {
			if u.Type == "state" {
				delivered[u.RoomName] = append(delivered[u.RoomName], string(u.State))
			}
		}
		assert.Equal(t, []string{`{"a":3}`, `{"c":1}`, `{"d":1}`, `{"g":2}`, "null"}, delivered["fast"])
		assert.Equal(t, []string{`{"e":1}`, `{"e":2}`}, delivered["each"])
	})
}
