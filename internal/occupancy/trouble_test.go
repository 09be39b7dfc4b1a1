package occupancy

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// Events that were missed while the listener was disconnected show after the channel is
// confirmed again. A short disconnect is not shown as stale.
func TestAShortDisconnect(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		w := h.watch(lobby)
		for i := range 10 {
			h.listener.disconnect()
			h.join(lobby, fmt.Sprint("c", i))
			h.sleep(200 * time.Millisecond)
			require.Empty(t, w.take())
			h.listener.reconnect()
			h.sleep(soon)
			require.Equal(t, []string{fmt.Sprintf("lobby %d/%d", i+1, i+1)}, w.take())
			h.sleep(2 * time.Second)
			require.Empty(t, w.take())
		}
	})
}

func TestALongDisconnect(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.join(lobby, "c1")
		w := h.watch(lobby)
		h.sleep(time.Second)
		h.listener.disconnect()
		h.sleep(249 * time.Millisecond)
		require.Empty(t, w.take())
		h.sleep(1*time.Millisecond + step)
		require.Equal(t, []string{"lobby 1/1 stale"}, w.take())
		require.Equal(t, 1, h.Stats().Stale)
		h.leave(lobby, "c1")
		h.sleep(time.Minute)
		require.Empty(t, w.take(), "once")

		began := time.Now()
		late := h.newWatcher()
		require.Equal(t, []string{"lobby 1/1 stale"}, h.watchBy(late, lobby))
		require.Equal(t, 250*time.Millisecond, time.Since(began))
		h.listener.reconnect()
		h.sleep(soon)
		require.Empty(t, w.take(), "the room is empty, so this waits")
		h.sleep(time.Second + step)
		require.Equal(t, []string{"lobby 0/0"}, w.take())
		require.Equal(t, []string{"lobby 0/0"}, late.take())
		require.Zero(t, h.Stats().Stale)
	})
}

// While Redis does not answer, watchers get one push, and one when it answers again, even
// if the numbers are the same.
func TestRedisAway(t *testing.T) {
	for name, set := range map[string]func(f *fakeRedis, away bool){
		"calls fail":             func(f *fakeRedis, away bool) { f.away[0] = away },
		"calls are not answered": func(f *fakeRedis, away bool) { f.hangs[0] = away },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.join(lobby, "c1")
				h.join("quiet", "c1")
				w := h.watch(lobby, "quiet")
				h.sleep(time.Second)
				h.redis.set(func(f *fakeRedis) { set(f, true) })
				h.join(lobby, "c2")
				h.sleep(240 * time.Millisecond)
				require.Empty(t, w.take())
				h.sleep(soon + step)
				require.Equal(t, []string{"lobby 1/1 stale"}, w.take(), "the quiet room has not been read")
				h.sleep(12 * time.Second)
				require.Equal(t, []string{"quiet 1/1 stale"}, w.take(), "its comparison was not answered")
				h.redis.takeCalls()
				h.sleep(time.Minute)
				require.Empty(t, w.take())
				require.LessOrEqual(t, len(h.redis.takeCalls()), 60, "calls become rare")
				h.redis.set(func(f *fakeRedis) { set(f, false) })
				h.sleep(11 * time.Second)
				require.ElementsMatch(t, []string{"lobby 2/2", "quiet 1/1"}, w.take())
				h.requireTruth(w, lobby)
				require.Zero(t, h.Stats().Stale)
				h.sleep(time.Minute)
				require.Empty(t, w.take())
			})
		})
	}
}

func TestASlowAnswerIsNoTrouble(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.latency = 240 * time.Millisecond
		w := h.watch(lobby)
		for i := range 20 {
			h.join(lobby, fmt.Sprint("c", i))
			h.sleep(1500 * time.Millisecond)
			require.Equal(t, []string{fmt.Sprintf("lobby %d/%d", i+1, i+1)}, w.take())
		}
		h.redis.set(func(f *fakeRedis) { f.latency = 600 * time.Millisecond })
		h.join(lobby, "d")
		h.sleep(5 * time.Second)
		require.Equal(t, []string{"lobby 20/20 stale", "lobby 21/21"}, w.take())
	})
}

// A Redis that answers nothing to a heartbeat may have lost events as well.
func TestResync(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		names := make([]string, 50)
		for i := range names {
			names[i] = fmt.Sprint("r", i)
		}
		w := h.watch(names...)
		h.redis.takeCalls()
		for _, name := range names {
			h.redis.change(name, func(r *fakeRoom) { r.join("c1", "") }) // no event
		}
		h.sleep(time.Second)
		require.Empty(t, w.take())
		h.Resync()
		h.sleep(soon)
		require.Len(t, w.take(), 50)
		require.Len(t, h.redis.takeCalls(), 1)

		h.sleep(2 * time.Second)
		h.redis.set(func(f *fakeRedis) { f.hangs[0] = true })
		h.Resync()
		h.sleep(time.Second)
		require.Len(t, w.take(), 50, "stale")
		require.Equal(t, 50, h.Stats().Stale)
		h.redis.set(func(f *fakeRedis) { f.hangs[0] = false })
		h.sleep(10 * time.Second)
		require.Len(t, w.take(), 50, "recovered")
	})
}

func TestAMissedEventIsFoundByTheComparison(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		w := h.watch(lobby)
		h.redis.change(lobby, func(r *fakeRoom) { r.join("c1", "") })
		h.sleep(10*time.Second + step + soon)
		require.Equal(t, []string{"lobby 1/1"}, w.take())
		h.redis.takeCalls()
		h.sleep(time.Minute)
		require.InDelta(t, 6.5, len(h.redis.takeCalls()), 1.5)
	})
}

// A subscription that is lost while the room is read: the reading may lack what came
// between.
func TestADisconnectDuringAReading(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.latency = 100 * time.Millisecond
		w := h.watch(lobby)
		h.join(lobby, "c1")
		h.sleep(60 * time.Millisecond) // Redis has read the room, and the answer is on its way
		h.join(lobby, "c2")
		h.listener.disconnect()
		h.join(lobby, "c3")
		h.listener.reconnect()
		h.sleep(2 * time.Second)
		h.requireTruth(w, lobby)
		require.NotContains(t, w.take(), "lobby 3/3 stale")

		h.sleep(5 * time.Second)
		h.redis.takeCalls()
		h.join(lobby, "c4")
		h.sleep(60 * time.Millisecond)
		require.Len(t, h.redis.takeCalls(), 1)
		h.listener.disconnect()
		h.sleep(time.Second)
		require.True(t, w.has[lobby].Stale, "the answer came after the disconnect, and is of before")
		require.True(t, h.watch(lobby).has[lobby].Stale)
	})
}

// If one Redis node does not answer, the rooms of the others are read, and share calls.
func TestOneNodeAway(t *testing.T) {
	buckets := map[string]int{"a": 1, "b": 2, "c": 3}
	for name, set := range map[string]func(f *fakeRedis){
		"calls fail":             func(f *fakeRedis) { f.away[1] = true },
		"calls are not answered": func(f *fakeRedis) { f.hangs[1] = true },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				w := h.watch("a", "b", "c")
				require.Len(t, h.redis.takeCalls(), 1)
				h.redis.set(set)
				h.join("a", "c1")
				h.join("b", "c1")
				h.join("c", "c1")
				h.sleep(3 * time.Second)
				require.Equal(t, "a 0/0 stale", text(w.has["a"]))
				h.requireTruth(w, "b")
				h.requireTruth(w, "c")
				w.take()

				// From now on the others are not concerned.
				for i := range 20 {
					h.join("a", fmt.Sprint("d", i))
					h.join("b", fmt.Sprint("d", i))
					h.join("c", fmt.Sprint("d", i))
					h.sleep(soon)
					require.ElementsMatch(t, []string{fmt.Sprintf("b %d/%d", i+2, i+2), fmt.Sprintf("c %d/%d", i+2, i+2)}, w.take())
					h.sleep(1500 * time.Millisecond)
				}
				h.redis.set(func(f *fakeRedis) { clear(f.away); clear(f.hangs) })
				h.sleep(11 * time.Second)
				h.requireTruth(w, "a")
				h.redis.takeCalls()
				h.join("a", "e")
				h.join("b", "e")
				h.sleep(soon)
				require.Len(t, h.redis.takeCalls(), 1, "they share calls again")
				require.Empty(t, h.queue.alone)
			}, func(c *Config) { c.Bucket = func(room string) int { return buckets[room] } })
		})
	}
}

// A room that cannot be read spoils the calls that it is in, but not those of the others
// for long.
func TestARoomThatCannotBeRead(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		names := make([]string, 40)
		for i := range names {
			names[i] = fmt.Sprint("r", i)
			h.join(names[i], "c1")
		}
		w := h.watch(names...)
		h.redis.set(func(f *fakeRedis) { f.poison["r0"] = true })
		for i := range 30 {
			for _, name := range names {
				h.join(name, fmt.Sprint("d", i))
			}
			h.sleep(time.Second)
		}
		h.sleep(8 * time.Second)
		for _, name := range names[1:] {
			h.requireTruth(w, name)
		}
		require.True(t, w.has["r0"].Stale)
		require.Equal(t, 1, h.Stats().Stale)
	})
}

// Redis has lost its data, and two owners write their members again. The numbers stay
// until they are complete.
func TestRebuilding(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.lossy = true
		h.join(lobby, "c1", "ann")
		h.join(lobby, "c2", "bob")
		w := h.watch(lobby)
		h.sleep(time.Second)
		h.redis.replace(lobby, nil)
		h.Resync()
		h.sleep(soon + step)
		require.Equal(t, []string{"lobby 2/2 stale"}, w.take())
		require.Equal(t, "e1", w.has[lobby].Epoch, "the numbers are those of the old position")
		h.sleep(2 * time.Second)
		require.Empty(t, w.take())

		h.join(lobby, "c1", "ann") // the first owner
		h.redis.set(func(f *fakeRedis) { f.rooms[lobby].rebuilding = true })
		h.sleep(time.Second)
		late := h.newWatcher()
		require.Equal(t, []string{"lobby 2/2 stale"}, h.watchBy(late, lobby))
		h.join(lobby, "c2", "bob")
		h.join(lobby, "c3", "eve")
		h.sleep(20 * time.Second) // longer than UncertainFor
		require.Empty(t, append(w.take(), late.take()...))
		h.redis.set(func(f *fakeRedis) { f.rooms[lobby].rebuilding = false }) // without an event
		h.sleep(uncertainEvery + step + soon)
		require.Equal(t, []string{"lobby 3/3"}, w.take())
		require.Equal(t, []string{"lobby 3/3"}, late.take())
		require.Equal(t, "e2", w.has[lobby].Epoch)
	})
}

// If a room has no last numbers, those that Redis has are shown.
func TestARoomThatIsRebuildingAtTheFirstReading(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.join(lobby, "c1")
		h.redis.set(func(f *fakeRedis) { f.rooms[lobby].rebuilding = true })
		w := h.newWatcher()
		require.Equal(t, []string{"lobby 1/1 stale"}, h.watchBy(w, lobby))
		h.join(lobby, "c2")
		h.sleep(soon)
		require.Equal(t, []string{"lobby 2/2 stale"}, w.take())
		h.redis.set(func(f *fakeRedis) { f.rooms[lobby].rebuilding = false })
		h.sleep(uncertainEvery + step + soon)
		require.Equal(t, []string{"lobby 2/2"}, w.take())
	})
}

// Redis has lost a room that no owner writes again. After a while that is the truth.
func TestALostRoomThatStaysEmpty(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.lossy = true
		h.join(lobby, "c1")
		w := h.watch(lobby)
		h.redis.replace(lobby, nil)
		h.Resync()
		h.sleep(11 * time.Second)
		require.Equal(t, []string{"lobby 1/1 stale"}, w.take())
		h.sleep(3 * time.Second)
		require.Equal(t, []string{"lobby 0/0"}, w.take())
		require.Equal(t, "e1", w.has[lobby].Epoch, "Redis knows no other")
		h.join(lobby, "c2")
		h.sleep(2 * time.Second)
		require.Equal(t, []string{"lobby 1/1"}, w.take())
		require.Equal(t, "e2", w.has[lobby].Epoch)
	})
}

// A failover to a replica that lacks the last writes: the room goes back. The members
// that it lacks are written again in most cases, so the numbers stay for a while.
func TestARoomThatWentBack(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.lossy = true
		for i := range 5 {
			h.join(lobby, fmt.Sprint("c", i))
		}
		replica := h.redis.copyOf(lobby)
		for i := range 5 {
			h.join(lobby, fmt.Sprint("d", i))
		}
		w := h.watch(lobby)
		h.sleep(time.Second)
		h.redis.replace(lobby, replica)
		h.listener.disconnect()
		h.listener.reconnect()
		h.sleep(soon)
		require.Equal(t, []string{"lobby 10/10 stale"}, w.take())
		for i := range 5 {
			h.join(lobby, fmt.Sprint("d", i))
		}
		h.sleep(3 * time.Second)
		require.Equal(t, []string{"lobby 10/10"}, w.take())

		h.redis.replace(lobby, replica)
		h.Resync()
		h.sleep(30 * time.Second)
		require.Equal(t, []string{"lobby 10/10 stale", "lobby 5/5"}, w.take())
		require.EqualValues(t, 10, w.has[lobby].Seq, "the seq of watchers does not fall")
	})
}

func TestPositionsThatAreShown(t *testing.T) {
	t.Parallel()
	var v numbers
	move := func(epoch string, seq uint64) string {
		v.take(&Reading{Position: store.Position{Epoch: epoch, Seq: seq}, Connections: 1, Users: 1})
		return fmt.Sprint(v.epoch, " ", v.shownSeq)
	}
	require.Equal(t, " 0", move("", 0))
	require.Equal(t, "a 7", move("a", 7))
	require.Equal(t, "a 7", move("a", 5))
	require.EqualValues(t, 5, v.seq)
	require.Equal(t, "a 7", move("", 0))
	require.Equal(t, "b 3", move("b", 3))
	require.Equal(t, "a 7", move("a", 2), "an epoch that came back")
	require.Equal(t, "a 9", move("a", 9))
	require.Equal(t, "b 3", move("b", 1))
	for i := range 20 {
		move(fmt.Sprint("x", i), 1)
	}
	require.Len(t, v.floors, maxFloors)
	require.Equal(t, floor{epoch: "x18", seq: 1}, v.floors[maxFloors-1])
}

// A channel that is confirmed again without a disconnect may have missed events as well.
func TestAConfirmationWithoutADisconnect(t *testing.T) {
	for _, again := range []bool{false, true} {
		t.Run(fmt.Sprint(again), func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				w := h.watch(lobby)
				h.sleep(time.Second)
				h.redis.change(lobby, func(r *fakeRoom) { r.join("c1", "") }) // no event
				h.HandleSubscribed(lobby, again)
				h.HandleSubscribed("unknown", again)
				h.sleep(soon)
				require.Equal(t, []string{"lobby 1/1"}, w.take())
			})
		})
	}
}
