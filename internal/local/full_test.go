package local

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

func requireFull(r *rig, err error, of store.Bound, most int) {
	r.Helper()
	var full *FullError
	require.ErrorAs(r, err, &full)
	require.Equal(r, FullError{Of: of, Max: most}, *full)
	require.Equal(r, fmt.Sprintf("local: the room is full: %d %s", most, of), err.Error())
}

// A join that finds the room full leaves nothing behind.
func TestFullRoom(t *testing.T) {
	virtual(t, func(r *rig) {
		r.cap("small", 2, 0)
		r.cap("few", 0, 1)
		a, b, c := r.connectAs("a", "ann"), r.connectAs("b", "ann"), r.connectAs("c", "bob")
		for _, room := range []string{"small", "few"} {
			r.join(a, room)
			require.Equal(r, 1, r.join(b, room).Users)
		}
		for room, of := range map[string]store.Bound{"small": store.BoundConnections, "few": store.BoundUsers} {
			joined, err := c.Join(r.Context(), room)
			requireFull(r, err, of, map[string]int{"small": 2, "few": 1}[room])
			require.Equal(r, Joined{Users: -1}, joined)
			require.False(r, c.In(room))
		}
		require.Empty(r, r.takeHeard(), "the caller knows")
		require.EqualValues(r, 2, r.Stats().Full)
		require.Empty(r, r.ops(store.OpLeave))
		c.mu.Lock()
		require.Empty(r, c.entries)
		c.mu.Unlock()

		joined, err := c.JoinIf(r.Context(), "small", JoinOptions{OverCap: true})
		require.NoError(r, err)
		require.Equal(r, 3, joined.Total)
		require.Equal(r, 2, joined.Users)
		r.leave(a, "few")
		r.leave(b, "few")
		r.join(c, "few")
		r.atRest()
	}, withUsers)
}

// Caps need no users.
func TestCapWithoutUsers(t *testing.T) {
	virtual(t, func(r *rig) {
		r.cap("room", 1, 0)
		r.join(r.connect("a"), "room")
		_, err := r.connect("b").Join(r.Context(), "room")
		requireFull(r, err, store.BoundConnections, 1)
		r.redis.do(func() {
			clear(r.redis.rooms["room"])
			r.redis.rooms["room"]["z"] = storedEntry{entry: "z", inc: "other"}
		})
		r.heartbeat(true)
		require.Len(r, r.redis.rooms["room"], 2, "an entry that Redis had is written again in any case")
	})
}

// An entry that the client believes to be in the room ends with a call of Full.
func TestPromisedEntryFindsTheRoomFull(t *testing.T) {
	for name, begin := range map[string]func(r *rig, c *Conn){
		"a kept join": func(r *rig, c *Conn) {
			r.away()
			joined, err := c.Join(r.Context(), "room")
			require.ErrorIs(r, err, ErrUnavailable)
			require.True(r, joined.Kept)
		},
		"a return": func(r *rig, c *Conn) {
			r.rule("room", time.Second)
			r.join(c, "room")
			r.sleep(3 * time.Second)
			r.away()
			c.Touched()
		},
		"a return with permission": func(r *rig, c *Conn) {
			r.rule("room", time.Second)
			r.join(c, "room")
			r.sleep(3 * time.Second)
			r.away()
			c.seen.Store(int64(time.Since(r.madeAt)))
			_, err := c.Return("room", yes)
			require.NoError(r, err)
		},
		"a return after a clean-up": func(r *rig, c *Conn) {
			r.rule("room", time.Second)
			r.Registry.cfg.EndSilent = false
			r.join(c, "room")
			r.sleep(3 * time.Second)
			r.redis.do(r.redis.cleanUpExpired)
			r.away()
			c.Touched()
		},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.cap("room", 1, 0)
				c := r.connectAs("c", "ann")
				require.NoError(r, c.Registered(r.Context()))
				begin(r, c)
				require.True(r, c.In("room"))
				r.redis.do(func() {
					r.redis.rooms["room"] = map[string]storedEntry{"other": {entry: "x", inc: "other", user: "bob"}}
				})
				again := make(chan error)
				go func() { _, err := c.Join(r.Context(), "room"); again <- err }()
				r.sleep(0)
				r.heal()
				require.Error(r, <-again)
				r.sleep(2 * time.Second)
				require.Equal(r, []string{"full c/room connections"}, r.takeHeard())
				require.False(r, c.In("room"))
				require.Len(r, r.redis.rooms["room"], 1)
				c.Touched()
				r.atRest()
			}, withUsers)
		})
	}
}

// The terms of a join survive a lost call, a refusal and a new incarnation. Entries that
// Redis has acknowledged have none.
func TestTermsOfJoinsSurviveRetries(t *testing.T) {
	virtual(t, func(r *rig) {
		r.cap("room", 9, 8)
		r.rule("room", 0)
		c := r.connectAs("c", "ann")
		require.NoError(r, c.Registered(r.Context()))
		r.refuse(func(op store.Op) bool { return op.Kind == store.OpJoin })
		go func() { _, _ = c.JoinIf(r.Context(), "room", JoinOptions{Replaces: "x"}) }()
		r.sleep(10 * time.Millisecond)
		r.away()
		r.sleep(1500 * time.Millisecond)
		r.reregister("I2", false)
		r.sleep(time.Second)
		r.heal()
		r.sleep(2 * time.Second)
		ids := make(map[string]bool)
		for _, op := range r.ops(store.OpJoin) {
			ids[op.Entry] = true
			require.Equal(r, []any{"x", 9, 8, time.Duration(0)}, []any{op.Replaces, op.MaxConnections, op.MaxUsers, op.Rebuild})
		}
		require.Len(r, ids, 2)
		rebuilt := func() {
			r.Helper()
			op := r.lastOp(store.OpJoin)
			require.Equal(r, []any{"", 0, 0, time.Second}, []any{op.Replaces, op.MaxConnections, op.MaxUsers, op.Rebuild})
		}
		r.reregister("I3", false)
		r.sleep(time.Second)
		rebuilt()
		r.redis.do(func() { clear(r.redis.rooms) })
		r.heartbeat(true)
		rebuilt()
		r.leave(c, "room")
		r.join(c, "room")
		op := r.lastOp(store.OpJoin)
		require.Equal(r, []any{"", 9, 8, time.Duration(0)}, []any{op.Replaces, op.MaxConnections, op.MaxUsers, op.Rebuild})
		r.heartbeat(true) // ends what the loss has left in the index
		r.atRest()
	}, withUsers)
}

// A second caller asks for other terms while the join of the first is in flight.
func TestOtherTermsWhileJoinIsInFlight(t *testing.T) {
	for name, opts := range map[string]JoinOptions{"over the cap": {OverCap: true}, "with a place": {Replaces: "a"}, "the same": {}} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.cap("room", 1, 0)
				a, c := r.connectAs("a", "ann"), r.connectAs("c", "ann")
				r.join(a, "room")
				r.plan(func(int, []store.Op) fault {
					return fault{before: 100 * time.Millisecond, after: 100 * time.Millisecond}
				})
				errs := make(chan error, 2)
				go func() { _, err := c.Join(r.Context(), "room"); errs <- err }()
				r.sleep(50 * time.Millisecond)
				go func() { _, err := c.JoinIf(r.Context(), "room", opts); errs <- err }()
				for range 2 {
					if err := <-errs; name == "the same" {
						requireFull(r, err, store.BoundConnections, 1)
					} else {
						require.NoError(r, err)
					}
				}
				require.Equal(r, name != "the same", c.In("room"))
				require.Equal(r, name != "with a place", a.In("room"))
				r.sleep(time.Second)
				r.atRest()
			}, withUsers)
		})
	}
}

// The reply to a join is lost, and the connection is another user when the join is sent
// again. If that user finds the room full, the entry of the first one ends.
func TestFullAfterLostReply(t *testing.T) {
	for _, reborn := range []bool{false, true} {
		t.Run(fmt.Sprint(reborn), func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.cap("room", 0, 1)
				r.join(r.connectAs("a", "ann"), "room")
				c := r.connectAs("c", "ann")
				require.NoError(r, c.Registered(r.Context()))
				r.plan(func(int, []store.Op) fault { return fault{lost: true} })
				done := make(chan struct{})
				go func() {
					defer close(done)
					_, err := c.Join(r.Context(), "room")
					assert.Error(r, err)
				}()
				r.sleep(10 * time.Millisecond)
				r.away()
				c.SetMeta(2, []byte("@bob"))
				if reborn {
					r.reregister("I2", false)
				}
				r.sleep(3 * time.Second)
				r.heal()
				r.sleep(3 * time.Second)
				<-done
				require.False(r, c.In("room"), "%v %+v", r.told(), r.ops(store.OpJoin))
				_, in := r.storedEntry("room", "c")
				require.False(r, in)
				require.Equal(r, []string{"full c/room users"}, r.takeHeard())
				requireLegal(r, r.redis.events)
			}, withUsers)
		})
	}
}

// The server gets a new incarnation while a join is in flight. If Redis has taken that
// join, the entry is written again in any case.
func TestJoinIsAcknowledgedUnderEarlierIncarnation(t *testing.T) {
	for _, reported := range []bool{false, true} {
		t.Run(fmt.Sprint(reported), func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.cap("room", 1, 0)
				old, c := r.connectAs("a", "ann"), r.connectAs("c", "ann")
				r.join(old, "room")
				r.plan(func(call int, _ []store.Op) fault {
					return fault{after: 100 * time.Millisecond * time.Duration(one(call == 0))}
				})
				replaced := make(chan string, 1)
				go func() {
					joined, err := c.JoinIf(r.Context(), "room", JoinOptions{Replaces: "a"})
					assert.NoError(r, err)
					replaced <- joined.Replaced
				}()
				r.sleep(50 * time.Millisecond)
				if r.setIncarnation("I2"); reported {
					r.Reregistered(false)
				}
				r.sleep(100 * time.Millisecond)
				r.Reregistered(false)
				require.Equal(r, "a", <-replaced)
				op := r.lastOp(store.OpJoin)
				require.Equal(r, []any{"c", "", 0, time.Second}, []any{op.Conn, op.Replaces, op.MaxConnections, op.Rebuild})
				require.True(r, c.In("room"))
				require.False(r, old.In("room"))
			}, withUsers)
		})
	}
}
