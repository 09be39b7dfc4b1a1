package local

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// Without users, the ops are those of a registry that knows none.
func TestOpsWithoutUsers(t *testing.T) {
	for name, set := range map[string]func(*Config){
		"no UserOf":       func(*Config) {},
		"no user of this": func(cfg *Config) { cfg.UserOf = func(string, []byte) string { return "" } },
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.rule("room", 2*time.Second)
				r.keep("room", 5*time.Second)
				c := r.connectAs("c", "ann")
				_, err := c.JoinIf(r.Context(), "room", JoinOptions{})
				require.NoError(r, err)
				c.SetMeta(5, []byte("@bob"))
				r.sleep(3 * time.Second) // silent
				c.Touched()
				r.redis.do(func() { clear(r.redis.rooms) })
				r.heartbeat(true)
				r.keep("room", time.Second)
				r.ApplyRules(r.Rooms())
				c.Close(store.CauseClosed, true)
				<-c.Gone()
				require.Zero(r, r.Stats().Kept)
				for _, b := range r.redis.batches {
					for _, op := range b {
						require.Empty(r, op.User)
						require.Zero(r, op.Grace)
						require.Zero(r, op.Rebuild+time.Duration(op.MaxConnections+op.MaxUsers), "%+v", op)
						require.False(r, op.Keep)
						require.False(r, op.Person && name == "no UserOf")
					}
				}
				require.Empty(r, r.takeHeard())
				r.nothingLeft()
			}, set)
		})
	}
}

// UserOf is called once for each version of the metadata.
func TestUserOfIsAskedOncePerVersion(t *testing.T) {
	asked := 0
	virtual(t, func(r *rig) {
		c := r.connectAs("c", "ann")
		require.Equal(r, "ann", c.User())
		for _, room := range []string{"a", "b", "d"} {
			r.join(c, room)
		}
		require.Equal(r, 1, asked)
		for range 2 {
			go c.SetMeta(7, []byte("@bob"))
		}
		r.sleep(time.Second)
		c.SetMeta(6, []byte("@eve"))
		require.Equal(r, 2, asked)
		require.Equal(r, "bob", c.User())
		for _, room := range []string{"a", "b", "d"} {
			h, _ := r.storedEntry(room, "c")
			require.Equal(r, "bob", h.user)
		}
		for _, op := range r.ops(store.OpUpdate) {
			require.True(r, op.Person && op.MetaVersion == 7, "%+v", op)
		}
		r.atRest()
	}, func(cfg *Config) {
		cfg.UserOf = func(conn string, meta []byte) string {
			asked++
			return userOf(conn, meta)
		}
	})
}

// UserOf may call the connection.
func TestUserOfMayCallTheConn(t *testing.T) {
	var c *Conn
	virtual(t, func(r *rig) {
		c = r.connectAs("c", "ann")
		c.SetMeta(7, []byte("@bob"))
		require.Equal(r, "bob after ann", c.User())
	}, func(cfg *Config) {
		cfg.UserOf = func(conn string, meta []byte) string {
			if c == nil {
				return userOf(conn, meta)
			}
			return userOf(conn, meta) + " after " + c.User()
		}
	})
}

// A connection that closes without having asked to leave keeps its places in rooms with a
// grace.
func TestCloseKeepsPlaces(t *testing.T) {
	virtual(t, func(r *rig) {
		r.keep("kept", 5*time.Second)
		c := r.connectAs("c", "ann")
		r.join(c, "kept")
		r.join(c, "other")
		require.Equal(r, 5*time.Second, r.ops(store.OpJoin)[0].Grace)
		require.Zero(r, r.ops(store.OpJoin)[1].Grace)
		r.forgetTold()
		c.Close(store.CauseLost, true)
		<-c.Gone()
		require.ElementsMatch(r, []string{"D c/kept b", "L c/other b"}, r.told())
		require.Equal(r, []string{"kept c/kept"}, r.takeHeard())
		require.Equal(r, 1, r.Stats().Kept)
		r.sleep(4 * time.Second)
		require.Equal(r, 1, r.Stats().Kept)
		r.sleep(2 * time.Second)
		require.Zero(r, r.Stats().Kept, "its time is over")
		r.redis.do(r.redis.endKept)
		r.nothingLeft()
	}, withUsers)
}

func TestDrainKeepsPlaces(t *testing.T) {
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprint(keep), func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.keep("room", 5*time.Second)
				r.join(r.connectAs("c", "ann"), "room")
				require.NoError(r, r.Drain(r.Context(), store.CauseClosed, keep))
				h, ok := r.storedEntry("room", "c")
				require.Equal(r, keep, ok && h.kept())
			}, withUsers)
		})
	}
}

// Whatever the connection asks for after its entry has ended by silence decides about the
// place that was kept then.
func TestEndOfASilentConnection(t *testing.T) {
	for name, tc := range map[string]struct {
		do   func(r *rig, c *Conn)
		want string // the last event; "": none
	}{
		"leaves":          {func(r *rig, c *Conn) { r.leave(c, "room") }, "L c/room l"},
		"is removed":      {func(r *rig, c *Conn) { _, _ = c.Leave(r.Context(), "room", store.CauseRemoved) }, "L c/room r"},
		"closes":          {func(r *rig, c *Conn) { c.Close(store.CauseClosed, false) }, "L c/room c"},
		"breaks":          {func(r *rig, c *Conn) { c.Close(store.CauseLost, true) }, ""},
		"may not return":  {func(r *rig, c *Conn) { c.StayOut("room", func(uint64) bool { return true }) }, "L c/room r"},
		"returns":         {func(r *rig, c *Conn) { c.Touched() }, "J c/room"},
		"returns as bob":  {func(r *rig, c *Conn) { c.SetMeta(9, []byte("@bob")); c.Touched() }, "J c/room"},
		"is drained":      {func(r *rig, c *Conn) { _ = r.Drain(r.Context(), store.CauseClosed, true) }, ""},
		"is forgotten":    {func(r *rig, c *Conn) { require.Equal(r, c, r.Forget("room", "c", store.Position{Epoch: "E", Seq: 99})) }, ""},
		"joins otherwise": {func(r *rig, c *Conn) { r.join(c, "room") }, "J c/room"},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.rule("room", time.Second)
				r.keep("room", 20*time.Second)
				c := r.connectAs("c", "ann")
				r.join(c, "room")
				r.sleep(3 * time.Second)
				require.Equal(r, []string{"kept c/room"}, r.takeHeard())
				r.forgetTold()
				tc.do(r, c)
				r.sleep(500 * time.Millisecond)
				told := r.told()
				if tc.want == "" {
					require.Empty(r, told)
					require.Equal(r, "ann", r.redis.rooms["room"]["c"].user)
				} else {
					require.Equal(r, tc.want, told[len(told)-1])
				}
				h, in := r.storedEntry("room", "c")
				switch name {
				case "returns", "joins otherwise":
					require.Equal(r, []string{"replaced c/room of ~ by c"}, r.takeHeard(), "its own place")
					require.EqualValues(r, 1, r.Stats().Returned)
					require.Zero(r, r.Stats().Kept)
				case "returns as bob":
					require.Equal(r, []string{"L c/room r", "J c/room"}, told)
					require.Equal(r, "bob", h.user)
				default:
					require.Equal(r, tc.want == "", in)
				}
				if in && !h.kept() {
					r.atRest()
				}
			}, withUsers)
		})
	}
}

// A connection asks to leave while its place is about to be kept, or while its return has
// not reached Redis. The place ends in every case.
func TestLeaveWhileAPlaceIsBeingKept(t *testing.T) {
	for name, during := range map[string]fault{
		"in flight":     {before: 200 * time.Millisecond, after: 200 * time.Millisecond},
		"lost reply":    {lost: true},
		"not run":       {never: true},
		"runs too late": {late: 300 * time.Millisecond},
	} {
		for _, back := range []bool{false, true} {
			t.Run(fmt.Sprint(name, back), func(t *testing.T) {
				virtual(t, func(r *rig) {
					r.rule("room", time.Second)
					r.keep("room", time.Minute)
					c := r.connectAs("c", "ann")
					r.join(c, "room")
					if back { // the return is in flight
						r.sleep(3 * time.Second)
						r.plan(func(int, []store.Op) fault { return during })
						c.Touched()
					} else { // the silent leave is in flight
						r.plan(func(int, []store.Op) fault { return during })
						r.sleep(1100 * time.Millisecond)
					}
					r.sleep(50 * time.Millisecond)
					go func() { _, _ = c.Leave(r.Context(), "room", store.CauseLeft) }()
					r.sleep(50 * time.Millisecond)
					r.heal()
					r.sleep(5 * time.Second)
					_, in := r.storedEntry("room", "c")
					require.False(r, in, "%v", r.told())
					require.Zero(r, r.Stats().Kept)
					require.False(r, c.In("room"))
					r.atRest()
					requireLegal(r, r.redis.events)
				}, withUsers)
			})
		}
	}
}

// Another server may have ended an entry and kept its place. A leave ends that place, and
// a sign of life takes it back.
func TestPlaceKeptByCleanUp(t *testing.T) {
	for _, comes := range []bool{false, true} {
		t.Run(fmt.Sprint(comes), func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.rule("room", time.Second)
				r.keep("room", time.Minute)
				c := r.connectAs("c", "ann")
				r.join(c, "room")
				r.sleep(3 * time.Second)
				r.redis.do(r.redis.cleanUpExpired)
				h, _ := r.storedEntry("room", "c")
				require.True(r, h.kept())
				r.forgetTold()
				if comes {
					c.Touched()
					r.sleep(500 * time.Millisecond)
					require.Equal(r, []string{"J c/room"}, r.told())
					require.Equal(r, []string{"replaced c/room of ~ by c"}, r.takeHeard())
					require.Zero(r, r.lastOp(store.OpJoin).Rebuild, "a return is no rebuild")
				} else {
					r.leave(c, "room")
					require.Equal(r, []string{"L c/room l"}, r.told())
				}
				r.sleep(time.Second / 10)
				r.atRest()
			}, withUsers, func(cfg *Config) { cfg.EndSilent = false })
		})
	}
}

// The record follows the rule's grace and the user, with and without metadata.
func TestGraceAndUserOfRecord(t *testing.T) {
	virtual(t, func(r *rig) {
		plain, err := r.Connect("plain", nil, nil, func() {})
		require.NoError(r, err)
		tagged := r.connectAs("tagged", "ann")
		nobody, err := r.Connect("nobody", []byte("none"), nil, func() {})
		require.NoError(r, err)
		for _, c := range []*Conn{plain, tagged, nobody} {
			r.join(c, "room")
		}
		calls := r.calls()
		r.ApplyRules(r.Rooms())
		r.sleep(time.Second)
		require.Equal(r, calls, r.calls(), "nothing has changed")
		r.keep("room", 7*time.Second)
		r.ApplyRules(r.Rooms())
		r.sleep(time.Second)
		record := func(conn string) string {
			h, _ := r.storedEntry("room", conn)
			return fmt.Sprint(h.user, h.grace)
		}
		require.Equal(r, "plain of plain7s", record("plain"))
		require.Equal(r, "ann7s", record("tagged"))
		require.Equal(r, "0s", record("nobody"))
		nobody.SetMeta(2, []byte("@ann"))
		tagged.SetMeta(2, []byte("none"))
		r.sleep(time.Second)
		require.Equal(r, "0s", record("tagged"))
		require.Equal(r, "ann7s", record("nobody"))
		r.redis.do(func() { // an older record
			h := r.redis.rooms["room"]["nobody"]
			h.user, h.grace = "eve", time.Second
			r.redis.rooms["room"]["nobody"] = h
		})
		r.heartbeat(true)
		require.Equal(r, "ann7s", record("nobody"))
		r.atRest()
	}, func(cfg *Config) {
		cfg.UserOf = func(conn string, meta []byte) string {
			if meta == nil {
				return conn + " of plain"
			}
			return userOf(conn, meta)
		}
	})
}

// A join or an update that was made before the user changed does not hide the change.
func TestUserChangesDuringAWrite(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connectAs("c", "ann")
		require.NoError(r, c.Registered(r.Context()))
		r.plan(func(int, []store.Op) fault { return fault{after: 100 * time.Millisecond} })
		go func() { _, _ = c.Join(r.Context(), "room") }()
		for i, user := range []string{"bob", "eve"} { // during the join, and during the update
			r.sleep(50 * time.Millisecond)
			c.SetMeta(uint64(i+2), []byte("@"+user))
			r.sleep(75 * time.Millisecond)
		}
		r.sleep(time.Second)
		h, _ := r.storedEntry("room", "c")
		require.Equal(r, "eve", h.user)
		r.keep("room", time.Second)
		r.ApplyRules(r.Rooms())
		r.sleep(50 * time.Millisecond)
		r.keep("room", time.Minute)
		r.ApplyRules(r.Rooms())
		r.sleep(time.Second)
		h, _ = r.storedEntry("room", "c")
		require.Equal(r, time.Minute, h.grace)
		r.atRest()
	}, withUsers)
}

// A connection returns and leaves at once, before its join is sent. Its place ends.
func TestLeaveBeforeTheReturnIsSent(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("room", time.Second)
		r.keep("room", time.Minute)
		c, other := r.connectAs("c", "ann"), r.connectAs("d", "bob")
		r.join(c, "room")
		r.sleep(3 * time.Second)
		r.plan(func(int, []store.Op) fault { return fault{before: 500 * time.Millisecond} })
		go func() { _, _ = other.Join(r.Context(), "other") }() // the writer is busy
		r.sleep(10 * time.Millisecond)
		r.forgetTold()
		c.Touched()
		r.leave(c, "room")
		require.Equal(r, []string{"J d/other", "L c/room l"}, r.told())
		r.atRest()
	}, withUsers)
}

// Redis goes back to a time before a hand-over. The server hands the entry over again, but
// not after the place has ended.
func TestHandOverAfterRollback(t *testing.T) {
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprint(late), func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.keep("room", 10*time.Second)
				c := r.connectAs("c", "ann")
				r.join(c, "room")
				before, _ := r.storedEntry("room", "c")
				c.Close(store.CauseLost, true)
				<-c.Gone()
				if late {
					r.sleep(11 * time.Second)
				}
				require.Equal(r, []string{"kept c/room"}, r.takeHeard())
				r.redis.do(func() {
					r.redis.rooms["room"] = map[string]storedEntry{"c": before}
					r.redis.owned[ownerKey{0, "I1"}] = map[store.EntryRef]bool{{Conn: "c", Entry: before.entry, Room: "room"}: true}
				})
				r.heartbeat(true)
				h, in := r.storedEntry("room", "c")
				if late {
					require.False(r, in)
				} else {
					require.Equal(r, store.CauseLost, h.keptCause)
					require.Equal(r, []string{"kept c/room"}, r.takeHeard())
					require.Equal(r, 1, r.Stats().Kept)
				}
				require.Zero(r, r.owned())
			}, withUsers)
		})
	}
}

// The memory of hand-overs is bounded, and each is forgotten in time.
func TestHandOversAreBounded(t *testing.T) {
	virtual(t, func(r *rig) {
		h := &handOvers{}
		for i := range maxHandedOver + 10 {
			h.remember(r.wheel, roomConn{"room", fmt.Sprint(i)}, handedOver{entry: "e", life: time.Duration(1+i%3) * time.Second})
		}
		require.Equal(r, maxHandedOver, h.size())
		h.drop(roomConn{"room", "0"})
		require.Equal(r, maxHandedOver-1, h.size())
		h.remember(r.wheel, roomConn{"room", "1"}, handedOver{entry: "newer", life: time.Hour})
		_, ok := h.find(store.EntryRef{Room: "room", Conn: "1", Entry: "e"})
		require.False(r, ok, "an entry that cannot be remembered does not leave an earlier one behind")
		for left := 2; left >= 0; left-- {
			r.sleep(1050 * time.Millisecond)
			require.InDelta(r, left*maxHandedOver/3, h.size(), 3)
		}
		require.Empty(r, h.ends)
		require.Zero(r, r.wheel.Armed())
		h.remember(r.wheel, roomConn{"room", "1"}, handedOver{entry: "e", life: time.Second})
		h.close(r.wheel)
		h.remember(r.wheel, roomConn{"room", "2"}, handedOver{entry: "e", life: time.Second})
		require.Zero(r, r.wheel.Armed())
	})
}
