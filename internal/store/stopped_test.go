package store

import (
	"testing"

	"github.com/redis/go-redis/v9"
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
	require.ErrorIs(w, commit(batch...), ErrForbidden)
	assert.EqualValues(w, 2, w.position("a").Seq, "this one was told")
	assert.EqualValues(w, 2, w.position("b").Seq, "whoever stands before it has missed something")
	assert.Equal(w, "b2", w.record("b", "d").Entry)
	w.absent("b", "e")
	assert.Equal(w, map[string]string{"I": "2"}, w.homes("b"))
	assert.Len(w, w.owned("I"), 4)

	_, err := w.Reap(w.Context(), w.judgment(), []ReapItem{item(ReapCleared, "a", "d", "a2", "I"), item(ReapCleared, "b", "d", "b2", "I")})
	require.ErrorIs(w, err, ErrForbidden)
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

// So it is where the next thing that the script asks for is refused.
func TestStoppedAfterTheFirstWrite(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	in := join("r", "c", "c1")
	in.StateVersion, in.State = 1, []byte("{}")
	w.ok("I", in, join("r", "d", "d1"))
	j := w.judgment()
	require.NoError(w, w.rdb.Do(w.Context(), "ACL", "SETUSER", "default", "-del", "-hlen").Err())
	_, err := w.Reap(w.Context(), j, []ReapItem{item(ReapCleared, "r", "c", "c1", "I")})
	require.ErrorIs(w, err, ErrForbidden)
	assert.EqualValues(w, 3, w.position("r").Seq)
	_, err = w.Commit(w.Context(), 0, "I", 9, 0, []Op{join("r", "e", "e1")})
	require.ErrorIs(w, err, ErrForbidden)
	assert.EqualValues(w, 4, w.position("r").Seq)
	assert.Contains(w, w.owned("I"), OwnedRef{"e", "e1", "r"}, "it ends with its server")
}

// What Redis says then is told in its own words: the client library acts on how
// they begin.
func TestStoppedInRedisWords(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	w.ok("I", join("r", "c", "c1"))
	require.NoError(w, w.rdb.Do(w.Context(), "REPLICAOF", "127.0.0.1", "1").Err())
	_, err := w.Reap(w.Context(), w.judgment(), []ReapItem{item(ReapCleared, "r", "c", "c1", "I")})
	require.True(w, redis.HasErrorPrefix(err, "READONLY "), "%v", err)
	_, err = w.Commit(w.Context(), 0, "I", 9, 0, []Op{leave("r", "c", "c1")})
	require.True(w, redis.HasErrorPrefix(err, "READONLY "), "%v", err)
}
