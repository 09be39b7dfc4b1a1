package local

import (
	"strconv"
	"strings"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// dataLost marks, among the events, that Redis lost everything.
const dataLost = store.EventType('F')

// requireLegal asserts that subscribers can be told this history: joins and leaves of a
// connection in a room alternate, nothing happens to a connection outside the room, no
// ended entry comes back, and numbered states come in their order, each once.
func requireLegal(r *rig, events []event) {
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
		case dataLost:
			// The numbers of batches are lost too. A late batch may then bring an entry
			// back, which the next reconciling ends.
			clear(in)
			clear(ended)
			clear(states)
		case store.Joined:
			if e.back {
				require.NotEmpty(r, in[at], "event %d: no place to return to", i)
				ended[in[at]] = true
				in[at] = ""
			}
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
			// An entry that another server cleaned up during a retry of its join may come
			// back. An entry that its owner ended may not.
			ended[e.entry] = e.cause != causeCleanedUp && e.cause != store.CauseReplaced
		default:
			require.Equal(r, in[at], e.entry, "event %d: of who is not there", i)
		}
	}
}
