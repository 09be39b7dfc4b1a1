package expired

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/store"
)

// told is one call of Config.Kept.
type told struct {
	room, conn, entry string
	until             int64
}

// keepRoom returns the CleanUp of a Redis in which the places of one room are kept. It
// appends the items to asked.
func keepRoom(room string, until int64, asked *[]store.CleanUpItem) func([]store.CleanUpItem) ([]store.CleanUpStatus, error) {
	return func(items []store.CleanUpItem) ([]store.CleanUpStatus, error) {
		statuses := make([]store.CleanUpStatus, len(items))
		for i := range items {
			statuses[i] = store.Ended
			if items[i].Room == room {
				statuses[i], items[i].KeptUntil = store.PlaceKept, until
			}
		}
		*asked = append(*asked, items...)
		return statuses, nil
	}
}

// A silent connection whose place is kept is done for all servers. A place that is kept
// already is not named again.
func TestPlaceOfExpiredEntryIsKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var kept []told
		var asked []store.CleanUpItem
		note := ""
		s := &fakeStore{publish: func(payload string) { note += payload }, cleanUp: keepRoom("grace", 77, &asked), records: map[string]store.Record{
			"grace": {Conn: "c", Entry: "E", Incarnation: "I", User: "ann", Grace: time.Minute},
			"none":  {Conn: "c", Entry: "F", Incarnation: "I"},
			"away":  {Conn: "c", Entry: "G", Incarnation: store.NoOwner, KeptUntil: 5, KeptCause: store.CauseLost},
		}}
		q := newQueue(s)
		q.cfg.Kept = func(room, conn, entry string, until int64) { kept = append(kept, told{room, conn, entry, until}) }
		var due []hint
		for _, room := range []string{"grace", "none", "away"} {
			due = append(due, hint{keys.Expired{Kind: keys.ConnExpired, Room: room, Conn: "c"}, queued{learned: time.Now()}})
		}
		time.Sleep(ownersTurn)
		require.NoError(t, s.TryWrite(t.Context(), 0))
		q.act(t.Context(), due)
		require.Len(t, asked, 2)
		require.Equal(t, Stats{Used: 1, PlacesKept: 1}, q.Stats())
		require.Equal(t, []told{{"grace", "c", "E", 77}}, kept)
		require.Equal(t, "c c grace\nc c none\n", note)

		q.cfg.Kept = nil // no rule keeps places
		q.act(t.Context(), due[:1])
		require.EqualValues(t, 2, q.Stats().PlacesKept)
	})
}

func TestCleanerKeepsPlaces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var kept []told
		var asked []store.CleanUpItem
		c := Cleaner{
			Store: &fakeStore{cleanUp: keepRoom("grace", 77, &asked)}, Lease: inContact{}, Life: t.Context(),
			Kept: func(room, conn, entry string, until int64) { kept = append(kept, told{room, conn, entry, until}) },
		}
		n, err := c.CleanUp(t.Context(), 0, []store.CleanUpItem{{Room: "grace", Conn: "c", Entry: "E"}, {Room: "none", Conn: "c", Entry: "F"}})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Equal(t, []told{{"grace", "c", "E", 77}}, kept)
	})
}
