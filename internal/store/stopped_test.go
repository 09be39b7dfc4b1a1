package store

import (
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// Redis may stop a script halfway, here because the user has lost the right to a
// channel. Subscribers must not miss the changes that the script had made for good: the
// rooms have the new position, so mirrors notice that an event is missing.
func TestStoppedHalfway(t *testing.T) {
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
	require.ErrorIs(w, commit(batch...), ErrForbidden)
	assert.EqualValues(w, 2, w.position("a").Seq, "this one was published")
	assert.EqualValues(w, 2, w.position("b").Seq, "mirrors at an earlier position have missed something")
	assert.Equal(w, "b2", w.record("b", "d").Entry)
	w.absent("b", "e")
	assert.Equal(w, map[string]string{"I": "2"}, w.owners("b"))
	assert.Len(w, w.owned("I"), 4)

	w.whileDead("I", func() {
		_, err := w.CleanUp(w.Context(), w.clockProof(), []CleanUpItem{item(GroundDead, "a", "d", "a2", "I"), item(GroundDead, "b", "d", "b2", "I")})
		require.ErrorIs(w, err, ErrForbidden)
	})
	assert.EqualValues(w, 3, w.position("a").Seq)
	assert.EqualValues(w, 3, w.position("b").Seq)
	assert.Equal(w, map[string]string{"I": "1"}, w.owners("b"))

	// Everything is in order after the right is back and the batch is repeated.
	allow("allchannels")
	w.listen()
	w.ok("I", batch...)
	assert.Equal(w, "JJJ", kinds(w.events()))
	assert.EqualValues(w, 4, w.position("a").Seq)
	assert.EqualValues(w, 5, w.position("b").Seq)
	assert.Equal(w, map[string]string{"I": "3"}, w.owners("b"))
	assert.Len(w, w.owned("I"), 5)
	assert.Equal(w, []string{"a", "b"}, w.rooms())
}

// The same holds if Redis refuses the command after the first write.
func TestStoppedAfterTheFirstWrite(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	in := join("r", "c", "c1")
	in.StateVersion, in.State = 1, []byte("{}")
	w.ok("J", in)
	w.ok("I", join("r", "d", "d1"))
	require.NoError(w, w.Fence(w.Context(), 0, "J"))
	j := w.clockProof()
	require.NoError(w, w.rdb.Do(w.Context(), "ACL", "SETUSER", "default", "-del", "-hlen").Err())
	_, err := w.CleanUp(w.Context(), j, []CleanUpItem{item(GroundDead, "r", "c", "c1", "J")})
	require.ErrorIs(w, err, ErrForbidden)
	assert.EqualValues(w, 3, w.position("r").Seq)
	_, err = w.Commit(w.Context(), 0, "I", 9, 0, []Op{join("r", "e", "e1")})
	require.ErrorIs(w, err, ErrForbidden)
	assert.EqualValues(w, 4, w.position("r").Seq)
	assert.Contains(w, w.owned("I"), EntryRef{"e", "e1", "r"}, "it ends with its server")
}

// The error text of Redis is returned as it is, because the client library acts on its
// beginning.
func TestStoppedWithTheErrorOfRedis(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	w.ok("I", join("r", "c", "c1"))
	w.ok("J", join("r", "d", "d1"))
	require.NoError(w, w.Fence(w.Context(), 0, "J"))
	require.NoError(w, w.rdb.Do(w.Context(), "REPLICAOF", "127.0.0.1", "1").Err())
	_, err := w.CleanUp(w.Context(), w.clockProof(), []CleanUpItem{item(GroundDead, "r", "d", "d1", "J")})
	require.True(w, redis.HasErrorPrefix(err, "READONLY "), "%v", err)
	_, err = w.Commit(w.Context(), 0, "I", 9, 0, []Op{leave("r", "c", "c1")})
	require.True(w, redis.HasErrorPrefix(err, "READONLY "), "%v", err)
}
