package store

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// occupancy reads the numbers of one room.
func (w *world) occupancy(room string) Occupancy {
	w.Helper()
	o, err := w.Occupancy(w.Context(), room)
	require.NoError(w, err)
	return o[0]
}

// The numbers of a room are those of its list, at the same position.
func TestOccupancy(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		none, err := w.Occupancy(w.Context())
		require.NoError(w, err)
		assert.Empty(w, none)
		w.ok("I", join("plain", "a", "a1"), join("plain", "b", "b1"))
		w.ok("I", joinUser("r", "a", "a1", "ann"), joinUser("r", "b", "b1", "ann"), join("r", "x", "x1"))
		w.ok("I", joinUser("left", "a", "a1", "ann"), leave("left", "a", "a1"))
		var rooms []string
		for i := range 2 * positionsPerCall {
			rooms = append(rooms, fmt.Sprint("none", i))
		}
		rooms = append(rooms, "plain", "left", "r")
		all, err := w.Occupancy(w.Context(), rooms...)
		require.NoError(w, err)
		require.Len(w, all, len(rooms))
		assert.Equal(w, Occupancy{}, all[0])
		last := all[2*positionsPerCall:]
		assert.Equal(w, Occupancy{Position: w.position("plain"), Numbers: Numbers{Connections: 2, Users: 2}}, last[0])
		assert.Equal(w, Occupancy{Position: w.position("left")}, last[1])
		assert.Equal(w, Occupancy{Position: w.position("r"), Numbers: Numbers{Connections: 3, Users: 2}}, last[2])
		snap, err := w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		assert.Equal(w, last[2].Numbers, snap.Numbers)
		page, err := w.EntriesFrom(w.Context(), "r", Cursor{}, 1)
		require.NoError(w, err)
		assert.Equal(w, last[2].Numbers, page.Numbers)

		require.NoError(w, w.rdb.ScriptFlush(w.Context()).Err())
		assert.Equal(w, last[2], w.occupancy("r"))
		w.del(w.keys.Members("r"))
		assert.True(w, w.occupancy("r").Incomplete)
		require.NoError(w, w.rdb.Set(w.Context(), w.keys.Members("r"), "mine", 0).Err())
		_, err = w.Occupancy(w.Context(), "plain", "r")
		require.ErrorIs(w, err, ErrUnavailable)
	})
}

func TestOccupancyOfBuckets(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.Store = New(w.client, testKeys{buckets: 3})
		for bucket, room := range []string{"abc", "abcd", "abcde"} {
			for i := range bucket + 1 {
				_, err := w.Commit(w.Context(), bucket, "I", uint64(i+1), 0, []Op{joinUser(room, fmt.Sprint(i), "e", "ann")})
				require.NoError(w, err)
			}
		}
		all, err := w.Occupancy(w.Context(), "abcde", "abc", "x", "abcd")
		require.NoError(w, err)
		var got []Numbers
		for _, o := range all {
			got = append(got, o.Numbers)
		}
		assert.Equal(w, []Numbers{{3, 1, false}, {1, 1, false}, {}, {2, 1, false}}, got)
	})
}

func TestDecodeNumbers(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Numbers{
		"":                     {3, 3, false},
		"e 1 t":                {3, 3, false},
		"e 1 t I 3":            {3, 3, false},
		"e 1 t * 2 I 3":        {3, 2, false},
		"e 1 t * 2/99 I 3":     {3, 2, false},
		"e 1 t * 2/101 I 3":    {3, 2, true},
		"e 1 t * ? I 3":        {3, -1, false},
		"e 1 t * ?12/101 I 3":  {3, -1, true},
		"e 1 t * ?12 I 2 ~ 1":  {3, -1, false},
		"e 1 t * odd/odd I 3":  {3, -1, false},
		"e 1 t I 3 * 1 J 2":    {3, 1, false},
		"e 1 t * 18446744073x": {3, -1, false},
	} {
		assert.Equal(t, want, decodeNumbers(text, 3, 100), text)
	}
	assert.Equal(t, Numbers{}, decodeNumbers("e 1 t * 2 ~ 2", 0, 100), "its records are lost")
}
