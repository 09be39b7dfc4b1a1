package occupancy

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/wire"
)

func TestTheFirstPushComesAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		w := h.newWatcher()
		require.Equal(t, []string{"lobby 0/0"}, h.watchBy(w, lobby))
		h.join(lobby, "c1", "ann")
		h.sleep(soon)
		require.Equal(t, []string{"lobby 1/1"}, w.take())
		require.EqualValues(t, 1, w.got[0].Seq)
		require.Equal(t, "e1", w.got[0].Epoch)

		h.sleep(time.Minute)
		h.join(lobby, "c2", "ann")
		h.sleep(soon)
		require.Equal(t, []string{"lobby 2/1"}, w.take(), "a second tab is a connection, and no other user")
		require.Empty(t, h.redis.truth("other").Position)
	})
}

func TestTheLastNumbersFollowWithinAnInterval(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		w := h.watch(lobby)
		h.join(lobby, "c1")
		h.sleep(soon)
		require.Equal(t, []string{"lobby 1/1"}, w.take())
		for i := range 10 {
			h.join(lobby, fmt.Sprint("d", i))
		}
		h.sleep(time.Second - 2*soon)
		require.Empty(t, w.take(), "the interval is not over")
		h.leave(lobby, "d0")
		h.sleep(2*soon + step)
		require.Equal(t, []string{"lobby 10/10"}, w.take())
		h.sleep(time.Minute)
		require.Empty(t, w.take())
	})
}

func TestEqualNumbersAreNotPushedAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.join(lobby, "c1", "ann")
		w := h.watch(lobby)
		for range 100 {
			h.touch(lobby)
			h.sleep(100 * time.Millisecond)
		}
		h.leave(lobby, "c1")
		h.join(lobby, "c2", "bob")
		h.sleep(time.Minute)
		require.Empty(t, w.take())
		require.Equal(t, "e1", w.has[lobby].Epoch)
		// The position moves all the same.
		next := h.watch(lobby)
		require.EqualValues(t, 103, next.has[lobby].Seq)
		require.Zero(t, h.Stats().Pushes)
	})
}

func TestAnEmptyRoomWaitsForTheInterval(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.join(lobby, "c1")
		w := h.watch(lobby)
		h.sleep(time.Minute)
		h.leave(lobby, "c1")
		h.sleep(time.Second)
		require.Empty(t, w.take(), "the last push is old, but the room has only just become empty")
		h.sleep(soon + step)
		require.Equal(t, []string{"lobby 0/0"}, w.take())

		// The next join is at once, because a room that gets members is news.
		h.sleep(time.Second)
		h.join(lobby, "c1")
		h.sleep(soon)
		require.Equal(t, []string{"lobby 1/1"}, w.take())

		// A reload does not show.
		h.sleep(time.Minute)
		h.leave(lobby, "c1")
		h.sleep(700 * time.Millisecond)
		h.join(lobby, "c1")
		h.sleep(time.Minute)
		require.Empty(t, w.take())
	})
}

// One client joins and leaves an empty room all the time. Without the wait, each watcher
// would get two pushes per interval of the client.
func TestAClientThatFlapsInAnEmptyRoom(t *testing.T) {
	for _, period := range []time.Duration{50 * time.Millisecond, 300 * time.Millisecond, 700 * time.Millisecond, 1500 * time.Millisecond, 1900 * time.Millisecond} {
		t.Run(period.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				var all []*fakeWatcher
				for range 20 {
					all = append(all, h.watch(lobby))
				}
				began := time.Now()
				for time.Since(began) < time.Minute {
					h.join(lobby, "c1")
					h.sleep(period / 2)
					h.leave(lobby, "c1")
					h.sleep(period / 2)
				}
				pushes := h.Stats().Pushes
				// A room that is empty for less than an interval is never shown as empty.
				require.LessOrEqual(t, pushes, uint64(1), "the watchers see one join")
				require.LessOrEqual(t, len(h.redis.readings(lobby)), 62+6, "one reading per interval, and the comparisons")
				h.sleep(3 * time.Second)
				for _, w := range all {
					h.requireTruth(w, lobby)
				}
			})
		})
	}
}

// A room to which 500 connections come and go in a second costs one reading and one push
// per interval, however many watchers it has.
func TestAStormOfEvents(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.latency = 10 * time.Millisecond
		var all []*fakeWatcher
		for range 100 {
			all = append(all, h.watch(lobby))
		}
		calls := len(h.redis.takeCalls())
		require.Equal(t, 1, calls)
		const seconds, perSecond = 60, 500
		for i := range seconds * perSecond {
			if conn := fmt.Sprint("c", i%997); i/997%2 == 0 {
				h.join(lobby, conn, fmt.Sprint("user", i%300))
			} else {
				h.leave(lobby, conn)
			}
			if i%10 == 9 {
				time.Sleep(10 * time.Second / perSecond)
			}
		}
		h.sleep(2 * time.Second)
		reads := h.redis.readings(lobby)
		require.LessOrEqual(t, len(reads), seconds+2)
		require.GreaterOrEqual(t, len(reads), seconds*9/10, "the numbers follow")
		for i := 1; i+1 < len(reads); i++ { // after the reading for the first watcher
			require.GreaterOrEqual(t, reads[i+1].Sub(reads[i]), time.Second-soon)
		}
		stats := h.Stats()
		require.LessOrEqual(t, stats.Pushes, uint64(seconds+2))
		require.Equal(t, stats.Pushes*100, stats.Delivered)
		for _, w := range all {
			h.requireTruth(w, lobby)
			require.Same(t, all[0].has[lobby], w.has[lobby], "one update for all")
		}
	})
}

// A watcher that comes while numbers wait for the end of the interval begins with newer
// numbers than the others. Each must have the last ones in the end, and none twice.
func TestWatchersWithDifferentNumbers(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.join(lobby, "c1")
		old := h.watch(lobby)
		h.join(lobby, "c2")
		h.sleep(soon)
		require.Equal(t, []string{"lobby 2/2"}, old.take())
		h.join(lobby, "c3")
		h.sleep(200 * time.Millisecond)
		between := h.newWatcher()
		require.Equal(t, []string{"lobby 3/3"}, h.watchBy(between, lobby))
		require.Empty(t, old.take(), "the interval is not over")

		// Back to the numbers that the first one has.
		h.leave(lobby, "c3")
		h.sleep(time.Second)
		require.Empty(t, old.take())
		require.Equal(t, []string{"lobby 2/2"}, between.take())

		// The other way round: the later one has the last numbers.
		h.sleep(2 * time.Second)
		h.join(lobby, "c3")
		h.sleep(soon)
		h.join(lobby, "c4")
		h.sleep(200 * time.Millisecond)
		late := h.newWatcher()
		require.Equal(t, []string{"lobby 4/4"}, h.watchBy(late, lobby))
		h.sleep(time.Second)
		require.Equal(t, []string{"lobby 3/3", "lobby 4/4"}, old.take())
		require.Empty(t, late.take())
		for _, w := range []*fakeWatcher{old, between, late} {
			h.requireTruth(w, lobby)
		}
	})
}

// Watchers that come all the time, each with a reading, do not put off the pushes.
func TestNewWatchersDoNotDelayPushes(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.latency = 60 * time.Millisecond
		w := h.watch(lobby)
		for i := range 1000 {
			h.join(lobby, fmt.Sprint("c", i))
			go h.watchAs(h.newWatcher(), lobby)
			time.Sleep(10 * time.Millisecond)
		}
		h.sleep(time.Second)
		require.InDelta(t, 10, len(w.take()), 1)
	})
}

func TestAnIntervalOfARuleThatChanges(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.every[lobby] = time.Minute
		w := h.watch(lobby)
		h.join(lobby, "c1")
		h.sleep(soon)
		require.Equal(t, []string{"lobby 1/1"}, w.take())
		h.join(lobby, "c2")
		h.sleep(20 * time.Second)
		require.Empty(t, w.take())
		require.Equal(t, []string{"lobby 2/2"}, h.watchBy(h.newWatcher(), lobby), "a new watcher does not wait")

		h.mu.Lock()
		h.every[lobby] = 100 * time.Millisecond
		h.mu.Unlock()
		h.ApplyRules(append(h.Rooms.Rooms(), "unknown"))
		h.sleep(0)
		require.Equal(t, []string{"lobby 2/2"}, w.take())
		var last string
		for i := range 20 {
			h.join(lobby, fmt.Sprint("d", i))
			h.sleep(100*time.Millisecond + step + soon)
			lines := w.take()
			require.Len(t, lines, 1)
			require.NotEqual(t, last, lines[0])
			last = lines[0]
		}
	})
}

func TestTheDefaultInterval(t *testing.T) {
	for name, interval := range map[string]func(string) time.Duration{"nil": nil, "0": func(string) time.Duration { return 0 }} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				w := h.watch(lobby)
				for i := range 100 {
					h.join(lobby, fmt.Sprint("c", i))
					time.Sleep(50 * time.Millisecond)
				}
				h.sleep(2 * time.Second)
				require.InDelta(t, 6, len(w.take()), 1)
				h.requireTruth(w, lobby)
			}, func(c *Config) { c.Interval = interval })
		})
	}
}

func TestAnUpdateIsEncodedOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		one, two := h.watch(lobby), h.watch(lobby)
		require.Same(t, one.has[lobby], two.has[lobby])
		h.join(lobby, "c1")
		h.sleep(soon)
		require.Same(t, one.got[0], two.got[0])
		encoded := 0
		encode := func(u *Update) *wire.Frame {
			encoded++
			f, err := wire.Push("mesh/occupancy", u.Connections)
			require.NoError(t, err)
			return f
		}
		require.Same(t, one.got[0].Frame(encode), two.got[0].Frame(encode))
		require.Equal(t, 1, encoded)
	})
}

// Many rooms that change at about the same time are read with few calls.
func TestManyRoomsAndWatchers(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		const rooms, watchers, seconds = 700, 3, 5
		names := make([]string, rooms)
		for i := range names {
			names[i] = fmt.Sprint("r", i)
			h.join(names[i], "c")
		}
		var all []*fakeWatcher
		for range watchers {
			w := h.newWatcher()
			all = append(all, w)
			for part := range slices.Chunk(names, 100) {
				h.watchBy(w, part...)
			}
		}
		require.Len(t, h.redis.takeCalls(), rooms/100, "one call for each first hundred, and none for the watchers after")
		for i := range seconds * 4 {
			for _, name := range names {
				h.join(name, fmt.Sprint("d", i))
			}
			time.Sleep(250 * time.Millisecond)
		}
		h.sleep(3 * time.Second)
		for _, w := range all {
			for _, name := range names {
				h.requireTruth(w, name)
			}
		}
		calls := h.redis.takeCalls()
		for _, call := range calls {
			require.LessOrEqual(t, len(call), roomsPerCall)
		}
		require.LessOrEqual(t, len(calls), (seconds+3)*(rooms/roomsPerCall+3))
	})
}

// An event that comes after Redis has read the room, and before the answer has arrived,
// causes another reading.
func TestAnEventDuringAReading(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.latency = 100 * time.Millisecond
		w := h.watch(lobby)
		h.join(lobby, "c1")
		h.sleep(80 * time.Millisecond)
		h.join(lobby, "c2")
		h.sleep(40 * time.Millisecond)
		require.Equal(t, []string{"lobby 1/1"}, w.take())
		h.sleep(time.Second + step + h.redis.latency)
		require.Equal(t, []string{"lobby 2/2"}, w.take())
	})
}

// However often watchers come, they cause few readings.
func TestReadingsForWatchersAreSpacedOut(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		for i := range 1000 {
			h.join(lobby, fmt.Sprint("c", i))
			go h.watchAs(h.newWatcher(), lobby)
			time.Sleep(time.Millisecond)
		}
		h.sleep(100 * time.Millisecond)
		require.Equal(t, 1000, h.Stats().Watches)
		require.LessOrEqual(t, len(h.redis.readings(lobby)), 25)
		require.LessOrEqual(t, h.Stats().Pushes, uint64(2))
	})
}
