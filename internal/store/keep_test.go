package store

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// visited is the time for which the position of an empty room is kept if the room was
// only visited or is not tracked.
const visited = 15 * time.Second

// age changes the epoch of a room so that it began d earlier.
func (w *world) age(room string, d time.Duration) {
	w.Helper()
	key := w.keys.Seq(room)
	at, err := w.rdb.Get(w.Context(), key).Result()
	require.NoError(w, err)
	epoch, rest, _ := strings.Cut(at, " ")
	name, began, timed := strings.Cut(epoch, "@")
	require.True(w, timed, at)
	ms, err := strconv.ParseInt(began, 10, 64)
	require.NoError(w, err)
	at = fmt.Sprintf("%s@%d %s", name, ms-d.Milliseconds(), rest)
	require.NoError(w, w.rdb.Set(w.Context(), key, at, 0).Err())
}

func TestLifeOfEmptyRooms(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		tracked bool
		used    time.Duration
		kept    time.Duration
	}{
		{"tracked and used", true, 61 * time.Second, time.Hour},
		{"tracked and visited", true, 50 * time.Second, visited},
		{"not tracked, used", false, 61 * time.Second, visited},
		{"not tracked, used for a day", false, 24 * time.Hour, visited},
		{"not tracked, visited", false, 0, visited},
		{"tracked, Redis's clock went back", true, -time.Hour, visited},
	} {
		for end, empty := range map[string]func(w *world){
			"leave": func(w *world) { w.ok("I", leave("r", "c", "c1")) },
			"clean up": func(w *world) {
				require.NoError(w, w.Fence(w.Context(), 0, "I"))
				require.Equal(w, "+", w.cleanUp(item(GroundDead, "r", "c", "c1", "I")))
			},
		} {
			t.Run(tt.name+" "+end, func(t *testing.T) {
				t.Parallel()
				everywhere(t, func(w *world) {
					w.TrackedBy(func(room string) bool { return room == "r" && tt.tracked })
					w.ok("I", join("r", "c", "c1"))
					w.age("r", tt.used)
					empty(w)
					w.expectTTL(tt.kept, w.keys.Seq("r"))
					assert.Empty(w, w.permanent())
				})
			})
		}
	}
}

// A room is in use as long as it has any members. The rooms of a call are judged one by
// one.
func TestLifeOfEmptyRoomsInOneCall(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.TrackedBy(func(room string) bool { return room != "untracked" })
		w.ok("I", join("used", "a", "a1"), join("untracked", "a", "a2"), join("visited", "a", "a3"))
		w.age("used", 61*time.Second)
		w.age("untracked", 61*time.Second)
		w.ok("I", join("used", "b", "b1"), leave("used", "a", "a1"))
		require.Equal(w, time.Duration(-1), w.pttl(w.keys.Seq("used")))
		w.ok("I", leave("used", "b", "b1"), leave("untracked", "a", "a2"), leave("visited", "a", "a3"))
		w.expectTTL(time.Hour, w.keys.Seq("used"))
		w.expectTTL(visited, w.keys.Seq("untracked"))
		w.expectTTL(visited, w.keys.Seq("visited"))
	})
}

// Servers may have different rules. The one that empties the room decides.
func TestLastServerDecidesTheLifeOfARoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		other := New(w.rdb, testKeys{buckets: 1})
		other.TrackedBy(func(string) bool { return true })
		w.ok("I", join("r", "a", "a1"))
		w.age("r", 61*time.Second)
		_, err := other.Commit(w.Context(), 0, "J", 1, 0, []Op{join("r", "b", "b1")})
		require.NoError(w, err)
		w.ok("I", leave("r", "a", "a1"))
		_, err = other.Commit(w.Context(), 0, "J", 2, 1, []Op{leave("r", "b", "b1")})
		require.NoError(w, err)
		w.expectTTL(time.Hour, w.keys.Seq("r"))
		w.ok("I", join("r", "a", "a2"))
		require.Equal(w, time.Duration(-1), w.pttl(w.keys.Seq("r")))
		w.ok("I", leave("r", "a", "a2"))
		w.expectTTL(visited, w.keys.Seq("r"))
	})
}

// Positions of an earlier version do not contain the beginning of the epoch.
func TestEpochsWithoutATime(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.TrackedBy(func(string) bool { return true })
		w.ok("I", join("r", "a", "a1"))
		require.NoError(w, w.rdb.Set(w.Context(), w.keys.Seq("r"), "older 7 tag I 1", 0).Err())
		w.ok("I", leave("r", "a", "a1"))
		assert.Equal(w, "older", w.position("r").Epoch)
		w.expectTTL(time.Hour, w.keys.Seq("r"))
	})
}

// A forgotten room begins a new epoch. A batch that was too late before still is.
func TestLateBatchOfAForgottenRoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.listen()
		w.ok("I", join("r", "c", "c1"))
		w.ok("I", leave("r", "c", "c1"))
		first := w.events()
		require.Equal(w, "JL", kinds(first))
		require.NoError(w, w.rdb.Del(w.Context(), w.keys.Seq("r")).Err()) // as if its TTL had run out
		_, err := w.Commit(w.Context(), 0, "I", 1, 0, []Op{join("r", "c", "c1")})
		require.ErrorIs(w, err, ErrLate)
		require.Equal(w, "0", string(w.commit("I", leave("r", "c", "c1"))[0].Status))
		require.Equal(w, "0", w.cleanUp(item(GroundDead, "r", "c", "c1", "I")))
		require.Empty(w, w.events())
		require.True(w, w.position("r").None(), "nothing of it is kept")
		w.ok("I", join("r", "c", "c2"))
		again := w.events()
		require.Equal(w, "J", kinds(again))
		require.NotEqual(w, first[0].Epoch, again[0].Epoch)
		require.EqualValues(w, 1, again[0].Seq)
	})
}
