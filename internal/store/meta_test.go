package store

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestSetConnMeta(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		now, ok, err := w.SetConnMeta(w.Context(), "c", 0, 0, []byte(`{}`))
		require.NoError(w, err)
		assert.False(w, ok, "unknown connection")
		assert.Equal(w, MetaValue{}, now)
		assert.Empty(w, w.dump())

		w.ok("I", Op{Kind: OpConnect, Conn: "c"})
		w.listen()
		now, ok, err = w.SetConnMeta(w.Context(), "c", 0, 0, []byte("{\"n\": \"a b\n\"}"))
		require.NoError(w, err)
		assert.True(w, ok)
		want := MetaValue{Version: 1, Data: []byte("{\"n\": \"a b\n\"}"), Owner: "I"}
		assert.Equal(w, want, now)
		assert.Equal(w, []message{{w.keys.ServerChannel("I"), "meta c 1 {\"n\": \"a b\n\"}"}}, w.heard())

		for _, version := range []uint64{0, 2, 7} {
			now, ok, err = w.SetConnMeta(w.Context(), "c", version, 0, []byte(`{"late":1}`))
			require.NoError(w, err)
			assert.False(w, ok)
			assert.Equal(w, want, now, "the current value")
		}
		assert.Empty(w, w.heard())
		got, err := w.ConnMeta(w.Context(), "c")
		require.NoError(w, err)
		assert.Equal(w, want, got)

		now, ok, err = w.SetConnMeta(w.Context(), "c", 1, 0, nil) // removes the metadata
		require.NoError(w, err)
		assert.True(w, ok)
		assert.Equal(w, MetaValue{Version: 2, Owner: "I"}, now)
	})
}

func TestSetRoomMeta(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		now, ok, err := w.SetRoomMeta(w.Context(), "r", 0, []byte(`{"n":1}`))
		require.NoError(w, err)
		assert.True(w, ok)
		assert.Equal(w, MetaValue{Version: 1, Data: []byte(`{"n":1}`)}, now)
		now, ok, err = w.SetRoomMeta(w.Context(), "r", 0, []byte(`{"n":2}`))
		require.NoError(w, err)
		assert.False(w, ok)
		assert.Equal(w, MetaValue{Version: 1, Data: []byte(`{"n":1}`)}, now)
		require.NoError(w, w.DeleteRoomMeta(w.Context(), "r"))
		got, err := w.RoomMeta(w.Context(), "r")
		require.NoError(w, err)
		assert.Equal(w, MetaValue{}, got)
	})
}

// No merge is lost if several run at the same time.
func TestMergersLoseNothing(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", Op{Kind: OpConnect, Conn: "c", MetaVersion: 1, Meta: []byte(`{}`)})
		const mergers = 32
		var wg sync.WaitGroup
		merge := func(n int) error {
			now, err := w.ConnMeta(w.Context(), "c")
			for ok := false; err == nil && !ok; {
				values := make(map[string]int)
				if err := json.Unmarshal(now.Data, &values); err != nil {
					return err
				}
				values[fmt.Sprint(n)] = n
				data, e := json.Marshal(values)
				if e != nil {
					return e
				}
				now, ok, err = w.SetConnMeta(w.Context(), "c", now.Version, 0, data)
			}
			return err
		}
		for n := range mergers {
			wg.Go(func() { assert.NoError(w, merge(n)) })
		}
		wg.Wait()
		m, err := w.ConnMeta(w.Context(), "c")
		require.NoError(w, err)
		assert.EqualValues(w, 1+mergers, m.Version)
		assert.Equal(w, mergers, strings.Count(string(m.Data), ":"))
	})
}

// Redis has gone back behind the version of a connection's owner. The owner's next
// version is newer than both.
func TestSetConnMetaBehindTheOwner(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", Op{Kind: OpConnect, Conn: "c", MetaVersion: 1, Meta: []byte(`{"n":1}`)})
		now, ok, err := w.SetConnMeta(w.Context(), "c", 1, 5, []byte(`{"n":2}`))
		require.NoError(w, err)
		require.True(w, ok)
		assert.EqualValues(w, 6, now.Version)
		now, ok, err = w.SetConnMeta(w.Context(), "c", 6, 2, []byte(`{"n":3}`))
		require.NoError(w, err)
		require.True(w, ok)
		assert.EqualValues(w, 7, now.Version)
	})
}
