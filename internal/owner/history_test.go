package owner

import (
	"strconv"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// flushed marks, among the events, that Redis lost everything.
const flushed = store.EventType('F')

// legal asserts that a history is one that subscribers can be told: joins and
// leaves of a connection in a room alternate, nothing happens to who is not
// there, no entry that has ended comes back, and states that are numbered come
// in their order, each once.
func legal(r *rig, events []told) {
	r.Helper()
	type place struct{ room, conn string }
	in := make(map[place]string)
	ended := make(map[string]bool)
	states := make(map[place]int)
	for i, e := range events {
		at := place{e.room, e.conn}
		if n, err := strconv.Atoi(strings.TrimPrefix(e.state, "s")); err == nil {
			again := e.kind == store.Joined || e.kind == store.Replaced
			require.True(r, n > states[at] || again && n == states[at], "event %d: state %d after %d", i, n, states[at])
			states[at] = n
		}
		switch e.kind {
		case flushed:
			// The numbers of batches are lost, too: one that is late may bring
			// an entry back then, which the next audit ends.
			clear(in)
			clear(ended)
			clear(states)
		case store.Joined:
			require.Empty(r, in[at], "event %d: %v is in already", i, at)
			require.False(r, ended[e.entry], "event %d: an entry has come back", i)
			in[at] = e.entry
		case store.Replaced:
			require.NotEmpty(r, in[at], "event %d: nothing to replace", i)
			require.False(r, ended[e.entry], "event %d: an entry has come back", i)
			ended[in[at]] = true
			in[at] = e.entry
		case store.Left:
			require.Equal(r, in[at], e.entry, "event %d: another one leaves", i)
			delete(in, at)
			// Reaped by another server while its join is being retried, it
			// comes back; not so where its owner ended it.
			ended[e.entry] = e.cause != reaped
		default:
			require.Equal(r, in[at], e.entry, "event %d: of who is not there", i)
		}
	}
}
