package store

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A new connection does not get metadata that a connection with its id left on another
// server. A connection that registers again keeps its metadata.
func TestFreshConnection(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("dead", Op{Kind: OpConnect, Conn: "c", MetaVersion: 7, Meta: []byte(`{"admin":true}`), Fresh: true})
		fresh := Op{Kind: OpConnect, Conn: "c", Fresh: true}
		for range 2 {
			res, err := w.Commit(w.Context(), 0, "I", 1, 0, []Op{fresh})
			require.NoError(w, err)
			assert.EqualValues(w, 8, res[0].MetaVersion)
			assert.Nil(w, res[0].Meta)
		}
		m, err := w.ConnMeta(w.Context(), "c")
		require.NoError(w, err)
		assert.Equal(w, MetaValue{Version: 8, Owner: "I"}, m)
		res, err := w.Commit(w.Context(), 0, "J", 1, 0, []Op{{Kind: OpConnect, Conn: "c", MetaVersion: 8}})
		require.NoError(w, err)
		assert.Zero(w, res[0].MetaVersion)
	})
}

func TestConnectAndDisconnect(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		res := w.ok("I", Op{Kind: OpConnect, Conn: "c", MetaVersion: 1, Meta: []byte(`{"n":1}`)})
		assert.Zero(w, res[0].MetaVersion)
		meta := func() MetaValue {
			m, err := w.ConnMeta(w.Context(), "c")
			require.NoError(w, err)
			return m
		}
		assert.Equal(w, MetaValue{Version: 1, Data: []byte(`{"n":1}`), Owner: "I"}, meta())
		assert.Equal(w, []EntryRef{{Conn: "c"}}, w.owned("I"))

		_, ok, err := w.SetConnMeta(w.Context(), "c", 1, 0, []byte(`{"n":2} x`))
		require.NoError(w, err)
		require.True(w, ok)
		res = w.ok("J", Op{Kind: OpConnect, Conn: "c", MetaVersion: 1, Meta: []byte(`{"n":1}`)})
		assert.EqualValues(w, 2, res[0].MetaVersion, "Redis knows better")
		assert.Equal(w, `{"n":2} x`, string(res[0].Meta))
		assert.Equal(w, "J", meta().Owner)

		w.ok("I", Op{Kind: OpDisconnect, Conn: "c"})
		assert.Empty(w, w.owned("I"))
		assert.Equal(w, "J", meta().Owner, "the first server does not own it any more")
		w.ok("J", Op{Kind: OpDisconnect, Conn: "c"})
		assert.Equal(w, MetaValue{}, meta())
		assert.Empty(w, w.permanent())

		w.ok("I", Op{Kind: OpConnect, Conn: "none"}) // without metadata
		m, err := w.ConnMeta(w.Context(), "none")
		require.NoError(w, err)
		assert.Equal(w, MetaValue{Owner: "I"}, m)
	})
}
