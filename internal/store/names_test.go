package store

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// names returns the names of incarnations.
func (w *world) names(incs ...string) []string {
	w.Helper()
	names, err := w.Names(w.Context(), incs)
	require.NoError(w, err)
	return names
}

// A name is written with the lease, and deleted when nothing else of the incarnation is
// left.
func TestNames(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		_, err := w.Register(w.Context(), "J", time.Minute)
		require.NoError(w, err)
		assert.Zero(w, w.rdb.Exists(w.Context(), w.keys.Name("J")).Val(), "no name, no key")
		w.Named("web-1")
		_, err = w.Register(w.Context(), "I", time.Minute)
		require.NoError(w, err)
		assert.Equal(w, []string{"", "web-1", ""}, w.names("J", "I", "X"))
		w.expectTTL(nameLife, w.keys.Name("I"))

		renew := func() {
			for range nameEvery { // one of them restores it
				assert.True(w, w.renew("I", time.Minute).Listed)
			}
		}
		lose := func(how func()) {
			require.NoError(w, w.rdb.Del(w.Context(), w.keys.Name("I")).Err())
			how()
			assert.Equal(w, []string{""}, w.names("I"))
			renew()
			assert.Equal(w, []string{"web-1"}, w.names("I"))
			w.expectTTL(nameLife, w.keys.Name("I"))
		}
		lose(func() {})
		lose(func() { require.NoError(w, w.rdb.SAdd(w.Context(), w.keys.Name("I"), "x").Err()) })
		again := New(w.client, testKeys{buckets: 2})
		again.Named("web-2")
		for range nameEvery {
			_, err = again.Renew(w.Context(), "I", time.Minute, "", false)
			require.NoError(w, err)
		}
		assert.Equal(w, []string{"web-2"}, w.names("I"))

		require.NoError(w, w.DeclareDead(w.Context(), "I"))
		assert.Equal(w, []string{"web-2"}, w.names("I"), "the dead keep their names")
		require.NoError(w, w.RemoveDead(w.Context(), "I"))
		w.waitExpired(w.keys.Name("I"))
		for range nameEvery {
			assert.False(w, w.renew("I", time.Minute).Listed)
		}
		w.waitExpired(w.keys.Name("I"))
		require.NoError(w, w.RemoveDead(w.Context(), "J"), "one without a name")
	})
}

// The names of many servers are read in parts.
func TestNamesOfMany(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		incs := make([]string, sizesPerCall+2)
		for i := range incs {
			incs[i] = fmt.Sprint(i)
		}
		last := incs[len(incs)-1]
		require.NoError(w, w.rdb.Set(w.Context(), w.keys.Name(last), "web", 0).Err())
		names := w.names(incs...)
		require.Len(w, names, len(incs))
		assert.Equal(w, "web", names[len(names)-1])
		assert.Empty(w, names[0])
		assert.Empty(w, w.names())
	})
}
