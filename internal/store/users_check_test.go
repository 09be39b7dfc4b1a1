package store

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// crowd is what a room holds about its members, from one of several sources.
type crowd struct {
	total, users int
	seats        map[string]string // per user the number of live connections, or ~ and the connection of the kept place
	counts       map[string]int    // per incarnation the number of entries
}

// crowdOf counts records. A user must have live connections or one kept place.
func crowdOf(w *world, records []Record) crowd {
	w.Helper()
	c := crowd{seats: make(map[string]string), counts: make(map[string]int)}
	for _, r := range records {
		c.total++
		c.counts[r.Incarnation]++
		require.Equal(w, r.Kept(), r.KeptUntil != 0, "%+v", r)
		seat, there := c.seats[r.User]
		switch {
		case r.User == "":
			c.users++
		case !there:
			c.users++
			c.seats[r.User] = "1"
			if r.Kept() {
				c.seats[r.User] = "~" + r.Conn
			}
		default:
			n, err := strconv.Atoi(seat)
			require.NoError(w, err, "%s has a kept place and another one: %+v", r.User, records)
			require.False(w, r.Kept(), "%s has connections and a kept place: %+v", r.User, records)
			c.seats[r.User] = strconv.Itoa(n + 1)
		}
	}
	return c
}

// numbersIn returns the room's numbers in its position. "" means that it is not numbered.
func (w *world) numbersIn(room string) string {
	w.Helper()
	at, err := w.rdb.Get(w.Context(), w.keys.Seq(room)).Result()
	if errors.Is(err, redis.Nil) {
		return ""
	}
	require.NoError(w, err)
	_, numbers, ok := decodeCounts(at)
	require.True(w, ok, at)
	numbers, _, _ = strings.Cut(numbers, "/")
	return numbers
}

// seatsIn returns the hash of users of a room, without the number of entries.
func (w *world) seatsIn(room string) (seats map[string]string, entries string) {
	w.Helper()
	seats, err := w.rdb.HGetAll(w.Context(), w.keys.Users(room)).Result()
	require.NoError(w, err)
	entries = seats[""]
	delete(seats, "")
	return seats, entries
}

// keptIn returns the deadlines of the index of kept places, by item.
func (w *world) keptIn() map[string]int64 {
	w.Helper()
	list, err := w.rdb.ZRangeWithScores(w.Context(), w.keys.Kept(0), 0, -1).Result()
	require.NoError(w, err)
	kept := make(map[string]int64)
	for _, z := range list {
		kept[z.Member.(string)] = int64(z.Score)
	}
	return kept
}

// counted asserts that the position of a room, its hash of users and its records agree,
// and returns the records.
func (w *world) counted(room string) []Record {
	w.Helper()
	snap, err := w.Snapshot(w.Context(), room)
	require.NoError(w, err)
	require.False(w, snap.Incomplete)
	c := crowdOf(w, snap.Records)
	at := w.rdb.Get(w.Context(), w.keys.Seq(room)).Val()
	counts, _, _ := decodeCounts(at)
	got := make(map[string]int)
	for _, n := range counts {
		got[n.incarnation] = atoi(w.T, n.entries)
	}
	require.Equal(w, c.counts, got, at)
	seats, entries := w.seatsIn(room)
	require.Zero(w, w.rdb.Exists(w.Context(), w.keys.Recount(room)).Val())
	if numbers := w.numbersIn(room); numbers == "" {
		require.Empty(w, c.seats, "a room with users is numbered")
		require.Zero(w, c.counts[NoOwner], "a room with kept places is numbered")
		require.Empty(w, entries, "it has no hash of users")
	} else {
		require.Equal(w, strconv.Itoa(c.users), numbers, at)
		require.Equal(w, strconv.Itoa(c.total), entries)
	}
	require.Equal(w, c.seats, seats)
	if c.total == 0 {
		require.Zero(w, w.rdb.Exists(w.Context(), w.keys.Users(room)).Val())
	}
	return snap.Records
}

// indexed asserts that the index lists exactly the kept places of the rooms.
func (w *world) indexed(rooms ...string) {
	w.Helper()
	want := make(map[string]int64)
	for _, room := range rooms {
		snap, err := w.Snapshot(w.Context(), room)
		require.NoError(w, err)
		for _, r := range snap.Records {
			if r.Kept() {
				want[fmt.Sprintf("e %s %s %s", r.Conn, r.Entry, room)] = r.KeptUntil
			}
		}
	}
	require.Equal(w, want, w.keptIn())
}

// told returns events in short: type and cause, connection, the place taken, and the
// numbers of the user and of the room.
func told(events []event) []string {
	list := make([]string, len(events))
	for i, e := range events {
		text := string(e.Type)
		if e.Cause != '.' {
			text += string(e.Cause)
		}
		if e.Rebuild {
			text += "="
		}
		text += " " + e.Conn
		if e.User != "" {
			text += "/" + e.User
		}
		if e.Replaces != "" {
			text += " for " + e.Replaces
		}
		if e.Counted {
			text += fmt.Sprintf(" %d %d %d", e.UserConnections, e.Connections, e.Users)
		}
		list[i] = text
	}
	return list
}

// tells asserts what was published since the last call.
func (w *world) tells(want ...string) {
	w.Helper()
	require.Equal(w, want, told(w.events()))
}

// joinUser is a join of a user.
func joinUser(room, conn, entry, user string) Op {
	return Op{Kind: OpJoin, Room: room, Conn: conn, Entry: entry, User: user}
}

// disconnect is a leave whose place may be kept.
func disconnect(room, conn, entry string) Op {
	return Op{Kind: OpLeave, Room: room, Conn: conn, Entry: entry, Cause: CauseLost, Keep: true, Known: true}
}

// z is a member of a sorted set.
func z(score float64, member string) redis.Z { return redis.Z{Score: score, Member: member} }
