package store

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// Redis may stop a script in its midst: here the user has lost the right to a
// channel. What the script had changed by then nobody may miss for good: the
// rooms stand where it left them, and who watches finds that an event is lacking.
func TestStoppedInTheMidst(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	w.ok("I", join("a", "c", "a1"), join("b", "c", "b1"))
	allow := func(rules ...any) {
		w.Helper()
		require.NoError(w, w.rdb.Do(w.Context(), append([]any{"ACL", "SETUSER", "default"}, rules...)...).Err())
	}
	deny := func() { allow("resetchannels", "&"+w.keys.EventsPrefix()+"a") }
	commit := func(ops ...Op) error {
		w.numbers["I"]++
		_, err := w.Commit(w.Context(), 0, "I", w.numbers["I"], 0, ops)
		return err
	}

	deny()
	batch := []Op{join("a", "d", "a2"), join("b", "d", "b2"), join("b", "e", "b3")}
	require.Error(w, commit(batch...))
	assert.EqualValues(w, 2, w.position("a").Seq, "this one was told")
	assert.EqualValues(w, 2, w.position("b").Seq, "whoever stands before it has missed something")
	assert.Equal(w, "b2", w.record("b", "d").Entry)
	w.absent("b", "e")
	assert.Equal(w, map[string]string{"I": "2"}, w.homes("b"))
	assert.Len(w, w.owned("I"), 4)

	_, err := w.Reap(w.Context(), w.judgment(), []ReapItem{item(ReapCleared, "a", "d", "a2", "I"), item(ReapCleared, "b", "d", "b2", "I")})
	require.Error(w, err)
	assert.EqualValues(w, 3, w.position("a").Seq)
	assert.EqualValues(w, 3, w.position("b").Seq)
	assert.Equal(w, map[string]string{"I": "1"}, w.homes("b"))

	// Nothing is left of it when the right is back and it is tried again.
	allow("allchannels")
	w.listen()
	w.ok("I", batch...)
	assert.Equal(w, "JJJ", kinds(w.events()))
	assert.EqualValues(w, 4, w.position("a").Seq)
	assert.EqualValues(w, 5, w.position("b").Seq)
	assert.Equal(w, map[string]string{"I": "3"}, w.homes("b"))
	assert.Len(w, w.owned("I"), 5)
	assert.Equal(w, []string{"a", "b"}, w.rooms())
}
