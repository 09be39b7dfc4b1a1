package harness

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// ViewOf decodes an answer.
func (c *StockClient) ViewOf(call *StockCall) View {
	c.t.Helper()
	var v View
	require.NoError(c.t, json.Unmarshal(c.Wait(call).Payload, &v))
	return v
}

// StaleOK checks that a call was answered with a stale success, and returns it.
func (c *StockClient) StaleOK(call *StockCall) View {
	c.t.Helper()
	a := c.Wait(call)
	require.True(c.t, a.Ok(), "%s %s: %s", call.command, call.room, a.Payload)
	v := c.ViewOf(call)
	require.True(c.t, v.Stale, "%s %s: %s", call.command, call.room, a.Payload)
	return v
}

// Sees returns the members of a room as the app sees them after the answer to its
// subscription and all updates. It fails if an update does not fit.
func (c *StockClient) Sees(first View, room string) MemberStates {
	c.t.Helper()
	now := MemberStates{}
	for _, id := range first.IDs(c.t) {
		now[id] = string(first.States[id])
	}
	for _, u := range c.Got(room) {
		require.NoError(c.t, now.Apply(u), "%v, repair %v", u, u.Repair)
	}
	require.Empty(c.t, c.Lost(room))
	return now
}

// JoinsOf returns how often the app saw the join of a connection.
func (c *StockClient) JoinsOf(first View, room, id string) int {
	c.t.Helper()
	n := 0
	if slices.Contains(first.IDs(c.t), id) {
		n++
	}
	for _, u := range c.Got(room) {
		if u.Type == "join" && u.ConnectionID == id {
			n++
		}
	}
	return n
}

// AllOK fails unless all calls succeeded.
func (c *StockClient) AllOK(calls ...*StockCall) {
	c.t.Helper()
	for _, call := range calls {
		a := c.Wait(call)
		require.True(c.t, a.Ok(), "%s %s: %s", call.command, call.room, a.Payload)
	}
}

// SlowGuards starts a server whose guards take 100 ms, or hang in the room "hangs".
func (w *World) SlowGuards(setup ...func(*mesh.Options)) *Server {
	s := w.Server(setup...)
	guard := func(ctx context.Context, _ mesh.Member, room string) (bool, error) {
		if room == "hangs" {
			<-ctx.Done()
			return false, ctx.Err()
		}
		time.Sleep(100 * time.Millisecond)
		return true, nil
	}
	s.Track(".*", mesh.PresenceOptions{Guard: guard, JoinGuard: guard})
	return s
}

// View returns a client's view of a room, state by connection id: its last answer to a
// subscribe request with the later updates that its app received. It is nil if there is
// no answer. With all, the view also contains the updates that the app lost.
func (c *StockClient) View(room string, all bool) map[string]string {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	updates := c.updates[room]
	if all {
		updates = slices.Concat(c.dropped[room], updates)
		slices.SortStableFunc(updates, func(a, b Update) int { return cmp.Compare(a.Seq, b.Seq) })
	}
	var v struct {
		Success bool
		Present []struct{ ID string }
		States  map[string]json.RawMessage
		Seq     uint64
		Epoch   string
	}
	for _, a := range c.answers["mesh/subscribe-presence"] {
		if a.Room == room {
			_ = json.Unmarshal(a.Payload, &v) // an error object leaves Success false
		}
	}
	if !v.Success {
		return nil
	}
	view := make(map[string]string)
	for _, m := range v.Present {
		view[m.ID] = string(v.States[m.ID])
	}
	for _, u := range updates {
		switch {
		case u.Seq <= v.Seq && u.Epoch == v.Epoch && !u.Repair: // of an earlier subscription
		case u.Type == "leave":
			delete(view, u.ConnectionID)
		case u.Type == "join", string(u.State) == "null":
			view[u.ConnectionID] = ""
		default:
			view[u.ConnectionID] = string(u.State)
		}
	}
	return view
}

// Truth returns the members of a room in Redis, in the same form as View.
func (s *Server) Truth(room string) map[string]string {
	s.W.T.Helper()
	members, err := s.Presence().Members(s.W.T.Context(), room)
	require.NoError(s.W.T, err)
	truth := make(map[string]string)
	for _, m := range members {
		truth[m.ID] = string(m.State)
	}
	return truth
}
