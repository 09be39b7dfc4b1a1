package hub

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// withUser is a record option of join, which then replaces nothing.
func withUser(user string) func(*store.Record) {
	return func(r *store.Record) { r.User = user }
}

func countUsers(cfg *Config) { cfg.CountUsers = true }

// peopled fills the room: a and a2 of Ann, with state 1 and none; b of Bob, with state 1;
// n without a user; and the kept place k of Kat, whose socket broke.
func peopled(r *fakeRedis) {
	r.joinAs(room, "a", "ann", "", withState("1", false))
	r.joinAs(room, "a2", "ann", "")
	r.joinAs(room, "b", "bob", "", withState("1", false))
	r.joinAs(room, "n", "", "")
	r.joinAs(room, "k", "kat", "")
	r.disconnect(room, "k", store.CauseLost)
}

// userCases are changes of the room of peopled. repaired is nil if a repair delivers the
// same updates.
var userCases = []struct {
	name     string
	do       func(r *fakeRedis) []string
	want     []string
	repaired []string
}{
	{"another connection", func(r *fakeRedis) []string { return r.joinAs(room, "b2", "bob", "") },
		[]string{`join b2 {"n":"b2"} bob 2`}, nil},
	{"a user arrives", func(r *fakeRedis) []string { return r.joinAs(room, "e", "eve", "") }, []string{`join e {"n":"e"} eve 1`}, nil},
	{"one of two leaves", func(r *fakeRedis) []string { return []string{r.end(room, "a", store.CauseLeft)} },
		[]string{"leave a ann 1 left"}, []string{"leave a ann 1 closed"}},
	{"one of two disconnects", func(r *fakeRedis) []string { return r.disconnect(room, "a", store.CauseLost) },
		[]string{"leave a ann 1 lost"}, []string{"leave a ann 1 closed"}},
	{"the last one leaves", func(r *fakeRedis) []string { return []string{r.end(room, "b", store.CauseRemoved)} },
		[]string{"leave b bob 0 removed"}, []string{"leave b bob 0 closed"}},
	{"without a user", func(r *fakeRedis) []string { return r.disconnect(room, "n", store.CauseSilent) }, []string{"leave n"}, nil},
	{"the last one disconnects", func(r *fakeRedis) []string { return r.disconnect(room, "b", store.CauseServerLost) },
		[]string{"state b", "disconnect b server_lost"}, nil},
	{"metadata of a user", func(r *fakeRedis) []string { return r.metaAs(room, "b", "bob", "1") }, []string{"metadata b 1"}, nil},
	{"login as a present user", func(r *fakeRedis) []string { return r.metaAs(room, "n", "ann", "1") }, []string{"metadata n 1 ann 3"}, nil},
	{"login as a new user", func(r *fakeRedis) []string { return r.metaAs(room, "n", "eve", "1") }, []string{"metadata n 1 eve 1"}, nil},
	{"login without a change of metadata", func(r *fakeRedis) []string { return r.metaAs(room, "n", "eve", `{"n":"n"}`) },
		[]string{`metadata n {"n":"n"} eve 1`}, nil},
	{"login by a rejoin", func(r *fakeRedis) []string { return []string{r.join(room, "n", withUser("eve"))} },
		[]string{`metadata n {"n":"n"} eve 1`}, nil},
	{"another user", func(r *fakeRedis) []string { return r.metaAs(room, "a", "bob", "1") },
		[]string{"leave a ann 1 left", "join a 1 bob 2", "state a 1"}, []string{"leave a ann 1 closed", "join a 1 bob 2", "state a 1"}},
	{"another user by a rejoin", func(r *fakeRedis) []string { return []string{r.join(room, "a", withUser("bob"))} },
		[]string{"leave a ann 1 closed", `join a {"n":"a"} bob 2`}, nil},
	{"no user any more", func(r *fakeRedis) []string { return []string{r.join(room, "b")} },
		[]string{"leave b bob 0 closed", `join b {"n":"b"}`}, nil},
	{"back under the same id", func(r *fakeRedis) []string { return r.joinAs(room, "k", "kat", "") }, []string{"reconnect k"}, nil},
	{"back with metadata and state", func(r *fakeRedis) []string {
		return r.joinAs(room, "k", "kat", "", withMeta("1"), withState("2", false))
	}, []string{"reconnect k", "metadata k 1", "state k 2"}, nil},
	{"back with a silent state", func(r *fakeRedis) []string { return r.joinAs(room, "k", "kat", "", withState("2", true)) },
		[]string{"reconnect k"}, nil},
	{"back under another id", func(r *fakeRedis) []string { return r.joinAs(room, "k2", "kat", "", withState("1", false)) },
		[]string{`join k2 {"n":"k2"} kat 2 replaces k`, "state k2 1", "leave k kat 1 replaced"},
		[]string{`join k2 {"n":"k2"} kat 2`, "state k2 1", "leave k kat 1 lost"}},
	{"in the place of an open connection", func(r *fakeRedis) []string { return r.joinAs(room, "b2", "bob", "b") },
		[]string{`join b2 {"n":"b2"} bob 2 replaces b`, "leave b bob 1 replaced"}, []string{`join b2 {"n":"b2"} bob 2`, "leave b bob 1 closed"}},
	{"in the place of another user", func(r *fakeRedis) []string { return r.joinAs(room, "e", "eve", "b") }, []string{`join e {"n":"e"} eve 1`}, nil},
	{"the time is over", func(r *fakeRedis) []string { return []string{r.end(room, "k", store.CauseLeft)} },
		[]string{"leave k kat 0 lost"}, nil},
	{"a kept place becomes another user's", func(r *fakeRedis) []string { return r.joinAs(room, "k", "bob", "") },
		[]string{"leave k kat 0 lost", `join k {"n":"k"} bob 2`}, nil},
	{"all at once", func(r *fakeRedis) []string {
		return slices.Concat(r.joinAs(room, "k2", "kat", ""), r.metaAs(room, "a", "bob", "1"), []string{r.end(room, "b", store.CauseLeft)})
	}, []string{
		`join k2 {"n":"k2"} kat 2 replaces k`, "leave k kat 1 replaced", "leave a ann 1 left", "join a 1 bob 2", "state a 1", "leave b bob 1 left",
	}, []string{`join k2 {"n":"k2"} kat 2`, "leave a ann 1 closed", "join a 1 bob 2", "state a 1", "leave b bob 1 closed", "leave k kat 1 lost"}},
}

func TestUpdatesOfUsers(t *testing.T) {
	t.Parallel()
	for _, tt := range userCases {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				peopled(h.redis)
				s := h.watch()
				h.sleep(2 * time.Second)
				h.send(tt.do(h.redis)...)
				assert.Equal(t, tt.want, s.takeLines())
				h.checkSink(s)
				h.sleep(11 * time.Second)
				assert.Equal(t, 1, h.snapshots())
			}, countUsers)
		})
	}
}

func TestRepairsOfUsers(t *testing.T) {
	t.Parallel()
	for _, tt := range userCases {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				peopled(h.redis)
				s := h.watch()
				tt.do(h.redis) // the events are lost
				h.hub.Resync()
				h.sleep(time.Second)
				from := tt.want
				if tt.repaired != nil {
					from = tt.repaired
				}
				want := make([]string, len(from))
				for i := range from {
					want[i] = from[i] + " repair"
				}
				assert.Equal(t, want, s.takeLines())
				h.checkSink(s)
				h.send(h.redis.joinAs(room, "next", "ann", "")...)
				h.checkSink(s)
			}, countUsers)
		})
	}
}

// Lists and views show users and kept places.
func TestViewOfUsers(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		peopled(h.redis)
		s := h.watch()
		assert.JSONEq(t, `[
			{"id":"a","userId":"ann","metadata":{"n":"a"},"joinedAt":946684800000}, {"id":"a2","userId":"ann","metadata":{"n":"a2"},"joinedAt":946684800000},
			{"id":"b","userId":"bob","metadata":{"n":"b"},"joinedAt":946684800000}, {"id":"n","metadata":{"n":"n"},"joinedAt":946684800000},
			{"id":"k","userId":"kat","metadata":{"n":"k"},"joinedAt":946684800000,"disconnected":true}]`, text(s.view))
		assert.Equal(t, 5, s.view.Total)
		assert.Equal(t, wire.CountOf(4), s.view.Users)
		h.send(h.redis.disconnect(room, "b", store.CauseLost)...)
		h.send(h.redis.joinAs(room, "k2", "kat", "", withMeta(`"\u0000"`))...)
		v, ok := h.hub.View(room)
		assert.True(t, ok)
		assert.Contains(t, text(v), `{"id":"b","userId":"bob","metadata":{"n":"b"},"joinedAt":946684800000,"disconnected":true}`)
		assert.NotContains(t, text(v), `"id":"k"`)
		for _, m := range v.Members() {
			assert.Equal(t, "e-"+m.Conn, m.Entry)
			assert.NotEmpty(t, m.Meta())
		}
		assert.Equal(t, wire.CountOf(4), v.Users)
	}, countUsers)
}

// If users are not counted, records of servers that count them have none here. Kept
// places are shown all the same.
func TestUsersAreNotCounted(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		peopled(h.redis)
		s := h.watch()
		assert.Equal(t, wire.Count{}, s.view.Users)
		assert.NotContains(t, text(s.view), "userId")
		assert.Contains(t, text(s.view), "disconnected")
		h.send(h.redis.joinAs(room, "k2", "kat", "")...)
		h.send(h.redis.disconnect(room, "b", store.CauseLost)...)
		h.send(h.redis.metaAs(room, "n", "eve", "1")...)
		assert.Equal(t, []string{
			`join k2 {"n":"k2"} replaces k`, "leave k", "state b", "disconnect b lost", "metadata n 1",
		}, s.takeLines())
		h.checkSink(s)
		for _, u := range s.updates {
			assert.NotContains(t, string(u.Frame().Bytes()), "user")
		}
		m := h.hub.mirror(room)
		m.mu.Lock()
		defer m.mu.Unlock()
		assert.Nil(t, m.numbers.of)
	})
}

// A repair tells of a member that joined and disconnected unseen.
func TestRepairOfKeptPlaceThatIsNew(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s := h.watch()
		h.redis.joinAs(room, "a", "ann", "")
		h.redis.disconnect(room, "a", store.CauseClosed)
		h.hub.Resync()
		h.sleep(time.Second)
		assert.Equal(t, []string{`join a {"n":"a"} ann 1 repair`, "disconnect a closed repair"}, s.takeLines())
		h.checkSink(s)
	}, countUsers)
}

// The numbers are those of a recount after every change.
func TestNumbers(t *testing.T) {
	t.Parallel()
	for _, counted := range []bool{true, false} {
		rng := rand.New(rand.NewPCG(1, 2))
		n := numbers{counted: counted}
		var list []*Member
		for range 2000 {
			if len(list) > 0 && rng.IntN(100) < 48 {
				i := rng.IntN(len(list))
				n.remove(list[i].User)
				list = slices.Delete(list, i, i+1)
			} else {
				m := &Member{User: []string{"", "ann", "bob", fmt.Sprint(rng.IntN(20))}[rng.IntN(4)]}
				n.add(m.User)
				list = append(list, m)
			}
			users, alone := map[string]int{}, 0
			for _, m := range list {
				switch {
				case !counted:
				case m.User == "":
					alone++
				default:
					users[m.User]++
				}
			}
			want := wire.Numbers{Connections: wire.CountOf(len(list))}
			if counted {
				want.Users = wire.CountOf(alone + len(users))
			}
			assert.Equal(t, want, n.shown())
			assert.Equal(t, want, new(numbersOf(list, counted)).shown())
			assert.Len(t, n.of, len(users))
			for user, connections := range users {
				assert.Equal(t, connections, n.of[user])
			}
		}
	}
}

// No server owns a kept place. If Redis lost it, it ends after the time for unconfirmed
// members, with the cause of its disconnect, and no owner is asked about it.
func TestLostKeptPlaceEnds(t *testing.T) {
	var asked []string
	inBubble(t, func(t *testing.T, h *harness) {
		peopled(h.redis)
		s := h.watch()
		h.redis.wipe(room, nil)
		h.send(h.redis.joinAs(room, "b", "bob", "", withState("1", false))...)
		h.sleep(10900 * time.Millisecond)
		assert.Empty(t, s.takeLines())
		h.sleep(200 * time.Millisecond)
		assert.ElementsMatch(t, []string{
			"leave a ann 1 closed repair", "leave a2 ann 0 closed repair", "leave n repair", "leave k kat 0 lost repair",
		}, s.takeLines())
		h.checkSink(s)
		assert.Contains(t, asked, "inc a")
		assert.NotContains(t, asked, "~ k")
	}, countUsers, func(cfg *Config) {
		cfg.AskOwner = func(_, owner string, conns []string, _ func([]string)) {
			for _, conn := range conns {
				asked = append(asked, owner+" "+conn)
			}
		}
	})
}

// A rollback gives a kept place back to its owner, which gives it up again.
func TestKeptPlaceAfterRollback(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.joinAs(room, "a", "ann", "", withState("1", false))
		back := h.redis.copy(room)
		s := h.watch()
		h.send(h.redis.disconnect(room, "a", store.CauseLost)...)
		assert.Equal(t, []string{"state a", "disconnect a lost"}, s.takeLines())
		h.redis.wipe(room, back)
		h.hub.Resync()
		h.sleep(time.Second)
		assert.Equal(t, []string{"reconnect a repair", "state a 1 repair"}, s.takeLines())
		h.send(h.redis.disconnect(room, "a", store.CauseLost)...)
		assert.Equal(t, []string{"state a", "disconnect a lost"}, s.takeLines())
		h.checkSink(s)
	}, countUsers)
}

// A server that dies leaves a kept place behind. The end of that place is not taken for
// the end of an entry whose record was lost.
func TestKeptPlaceOfDeadServerEnds(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.joinAs(room, "a", "ann", "")
		s := h.watch()
		h.send(h.redis.disconnect(room, "a", store.CauseServerLost)...)
		h.send(h.redis.end(room, "a", store.CauseServerLost))
		assert.Equal(t, []string{"disconnect a server_lost", "leave a ann 0 server_lost"}, s.takeLines())
	}, countUsers)
}

// The last metadata, the entry and the time of the join are in updates for the app.
func TestUpdatesForTheApp(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		peopled(h.redis)
		s := h.watch()
		h.sleep(time.Second)
		h.send(h.redis.metaAs(room, "b", "bob", "1")...)
		h.send(h.redis.disconnect(room, "b", store.CauseLost)...)
		h.send(h.redis.end(room, "b", store.CauseLost))
		for _, u := range s.updates {
			assert.Equal(t, "bob", u.UserID)
			assert.Equal(t, "e-b", u.EntryID)
			assert.EqualValues(t, 946684800000, u.JoinedAt)
			connections, _ := u.Connections.Get()
			assert.Equal(t, u.Type == wire.UpdateLeave, connections == 4)
		}
		last := s.updates[len(s.updates)-1]
		assert.Equal(t, "1", string(last.Metadata))
		assert.NotContains(t, string(last.Frame().Bytes()), "metadata")
	}, countUsers)
}
