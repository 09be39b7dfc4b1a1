package meshtest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

// Member is a connection in a list of who is present.
type Member struct {
	ID       string          `json:"id"`
	Metadata json.RawMessage `json:"metadata"` // nil: none
}

// String returns the id and the metadata.
func (m Member) String() string {
	if m.Metadata == nil {
		return m.ID
	}
	return m.ID + " " + string(m.Metadata)
}

// Snapshot is the answer to [Client.Join], [Client.Subscribe] and
// [Client.State].
type Snapshot struct {
	// Success is false where the server refused: a guard said no, or the room
	// is not tracked.
	Success bool
	// Present are who is in the room, in no particular order. It is empty in
	// the answer to a join of a room that the client may be in but not see.
	Present []Member
	// States are what those in the room have published, by connection id. The
	// answer to a join has none.
	States map[string]json.RawMessage
	// Total is how many are in the room, where Present are only some of them;
	// otherwise 0.
	Total int
	// Stale says that Redis did not answer: this is what was known last.
	Stale bool
	Seq   uint64
	Epoch string
}

// IDs returns the ids of those present, sorted.
func (s Snapshot) IDs() []string {
	ids := make([]string, len(s.Present))
	for i, m := range s.Present {
		ids[i] = m.ID
	}
	slices.Sort(ids)
	return ids
}

// Has reports whether a connection is present.
func (s Snapshot) Has(connectionID string) bool {
	return slices.ContainsFunc(s.Present, func(m Member) bool { return m.ID == connectionID })
}

// String returns what an answer says, with metadata and states as text.
func (s Snapshot) String() string {
	if !s.Success {
		return "refused"
	}
	present := make([]string, len(s.Present))
	for i, m := range s.Present {
		present[i] = m.String()
	}
	slices.Sort(present)
	text := fmt.Sprintf("present %v", present)
	for _, id := range slices.Sorted(maps.Keys(s.States)) {
		text += fmt.Sprintf(", state of %s %s", id, s.States[id])
	}
	if s.Total > 0 {
		text += fmt.Sprintf(", %d in all", s.Total)
	}
	if s.Stale {
		text += ", stale"
	}
	return text
}

// StateOptions say how a state is published. The zero value: until it is
// replaced, cleared, or its connection leaves; and everybody is told.
type StateOptions struct {
	// ExpireAfter is how long the state lives, in steps of a millisecond.
	ExpireAfter time.Duration
	// Silent stores the state without telling anybody.
	Silent bool
}

// Join enters a room. The answer lists the client too, where it may see the
// room.
func (c *Client) Join(room string) Snapshot {
	c.tb.Helper()
	s, _ := c.askSnapshot(wire.CommandJoinRoom, room)
	return s
}

// askSnapshot reports too whether it was answered.
func (c *Client) askSnapshot(command, room string) (s Snapshot, ok bool) {
	c.tb.Helper()
	ok = c.ask(command, inRoom(room), &s)
	for i := range s.Present {
		s.Present[i].Metadata = orNil(s.Present[i].Metadata)
	}
	return s, ok
}

// orNil returns nil for JSON's null.
func orNil(data json.RawMessage) json.RawMessage {
	if string(data) == "null" {
		return nil
	}
	return data
}

// Leave leaves a room; it does no harm where the client is not in.
func (c *Client) Leave(room string) {
	c.tb.Helper()
	var answer wire.Success
	if c.ask(wire.CommandLeaveRoom, inRoom(room), &answer) && !answer.Success {
		c.fail("cannot leave %q", room)
	}
}

// Subscribe asks for who is in a room and for updates from then on. Where it
// is refused, Success is false and nothing comes.
func (c *Client) Subscribe(room string) Snapshot {
	c.tb.Helper()
	s, ok := c.askSnapshot(wire.CommandSubscribePresence, room)
	if ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.rooms[room] = s.Success
	}
	return s
}

// Unsubscribe ends the updates about a room, and reports whether there was a
// subscription.
func (c *Client) Unsubscribe(room string) (was bool) {
	c.tb.Helper()
	if c.ask(wire.CommandUnsubscribePresence, inRoom(room), &was) {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.rooms, room)
	}
	return was
}

// PublishState publishes a state, whatever encodes to a JSON object, in a room
// that the client is in. It reports whether that was done: not where the
// client is not in the room or may not see it, or the room is not tracked.
func (c *Client) PublishState(room string, state any, opts StateOptions) (done bool) {
	c.tb.Helper()
	data, err := json.Marshal(state)
	if err != nil {
		c.fail("state: %v", err)
		return false
	}
	req := wire.PublishStateRequest{RoomName: wire.Name(room), State: data, Silent: opts.Silent}
	if opts.ExpireAfter != 0 {
		ms := float64(opts.ExpireAfter) / float64(time.Millisecond)
		req.ExpireAfter = &ms
	}
	c.ask(wire.CommandPublishPresenceState, req, &done)
	return done
}

// ClearState ends the client's state in a room, and reports whether that was
// done, as [Client.PublishState] does.
func (c *Client) ClearState(room string) (done bool) {
	c.tb.Helper()
	c.ask(wire.CommandClearPresenceState, inRoom(room), &done)
	return done
}

// State asks for who is in a room and their states, without a subscription.
// The members in the answer have no metadata.
func (c *Client) State(room string) Snapshot {
	c.tb.Helper()
	var answer struct {
		Snapshot
		Present []string
	}
	c.ask(wire.CommandGetPresenceState, inRoom(room), &answer)
	s := answer.Snapshot
	s.Present = make([]Member, len(answer.Present))
	for i, id := range answer.Present {
		s.Present[i].ID = id
	}
	return s
}

// Metadata asks for the client's own metadata, nil where it has none.
func (c *Client) Metadata() json.RawMessage {
	c.tb.Helper()
	return c.askMetadata(wire.CommandGetMyConnectionMetadata, struct{}{})
}

// MetadataOf asks for a connection's metadata, nil where it has none or the
// client has no room in common with it.
func (c *Client) MetadataOf(connectionID string) json.RawMessage {
	c.tb.Helper()
	return c.askMetadata(wire.CommandGetConnectionMetadata, wire.GetMetadataRequest{ConnectionID: wire.Name(connectionID)})
}

// RoomMetadata asks for a room's metadata, nil where it has none or the
// client may not see the room.
func (c *Client) RoomMetadata(room string) json.RawMessage {
	c.tb.Helper()
	return c.askMetadata(wire.CommandGetRoomMetadata, inRoom(room))
}

func (c *Client) askMetadata(command string, payload any) json.RawMessage {
	c.tb.Helper()
	var answer wire.Metadata
	c.ask(command, payload, &answer)
	return orNil(answer.Metadata)
}

// SetMetadata sets the client's own metadata, whatever encodes to JSON. The
// strategy is "replace", "merge" or "deepMerge" (a mesh.Strategy, as a string);
// "" is "replace". A server without Options.ClientMetadata refuses it,
// and so may that function: that is an error answer, which fails the test. To
// look at it call "mesh/set-my-connection-metadata" by [Client.Call].
func (c *Client) SetMetadata(metadata any, strategy string) {
	c.tb.Helper()
	data, err := json.Marshal(metadata)
	if err != nil {
		c.fail("metadata: %v", err)
		return
	}
	req := wire.SetMetadataRequest{Metadata: data}
	req.Options.Strategy = wire.Strategy(strategy)
	var answer wire.Success
	if c.ask(wire.CommandSetMyConnectionMetadata, req, &answer) && !answer.Success {
		c.fail("metadata not set")
	}
}
