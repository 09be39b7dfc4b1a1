package meshtest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

// Member is a connection in a list of members.
type Member struct {
	ID           string          `json:"id"`
	UserID       string          `json:"userId"`   // "": none, or users are not counted
	Metadata     json.RawMessage `json:"metadata"` // nil: none
	Disconnected bool            `json:"disconnected"`
	JoinedAt     time.Time       `json:"-"` // by Redis's clock; zero: not known yet
}

// String returns the id and the metadata.
func (m Member) String() string {
	text := m.ID
	if m.Metadata != nil {
		text += " " + string(m.Metadata)
	}
	if m.Disconnected {
		text += " (disconnected)"
	}
	return text
}

// Snapshot is the answer to [Client.Join], [Client.Subscribe], [Client.State] and
// [Client.ListPresence].
type Snapshot struct {
	// Success is false if the server refused: a guard refused, the room is full, or it
	// is not tracked.
	Success bool
	// Code, Of and Max are set if a join is refused: "EREFUSED", or "EFULL" with the
	// number that is bounded ("users" or "connections") and its bound.
	Code string
	Of   string
	Max  int
	// Level is the level of the connection. Only the answer to a subscribe has it.
	Level int
	// Next is the cursor of the next page of a list. It is "" on the last page.
	Next string
	// Restart says that the cursor of a list is not valid any more, so that this is a first
	// page.
	Restart bool
	// Present lists the members of the room, in no particular order. It is empty in the
	// answer to a join if the client may be in the room but not see it.
	Present []Member
	// States holds the states of the members by connection id. The answer to a join has
	// none.
	States map[string]json.RawMessage
	// Total is the number of members of the room. The answers to a join and to State have
	// it only if Present lists only some of them, and otherwise it is 0.
	Total int
	// Connections is the number of members of the room in the answer to a join.
	Connections int
	// Users is the number of users in the answers to a join, a subscription and a list. It is
	// 0 if users are not counted.
	Users int
	// Stale says that Redis did not answer, so that this is the last known state.
	Stale bool
	Seq   uint64
	Epoch string
}

// IDs returns the ids of the members in Present, sorted.
func (s Snapshot) IDs() []string {
	ids := make([]string, len(s.Present))
	for i, m := range s.Present {
		ids[i] = m.ID
	}
	slices.Sort(ids)
	return ids
}

// Has reports whether Present lists a connection.
func (s Snapshot) Has(connectionID string) bool {
	return slices.ContainsFunc(s.Present, func(m Member) bool { return m.ID == connectionID })
}

// String returns the answer as text, with metadata and states.
func (s Snapshot) String() string {
	if !s.Success {
		return strings.TrimSpace("refused " + s.Code)
	}
	present := make([]string, len(s.Present))
	for i, m := range s.Present {
		present[i] = m.String()
	}
	slices.Sort(present)
	var text strings.Builder
	text.WriteString(fmt.Sprintf("present %v", present))
	for _, id := range slices.Sorted(maps.Keys(s.States)) {
		text.WriteString(fmt.Sprintf(", state of %s %s", id, s.States[id]))
	}
	if s.Total > len(s.Present) {
		text.WriteString(fmt.Sprintf(", %d in all", s.Total))
	}
	if s.Stale {
		text.WriteString(", stale")
	}
	return text.String()
}

// StateOptions say how a state is published. With the zero value the state lasts until it
// is replaced or cleared or its connection leaves, and all subscribers receive it.
type StateOptions struct {
	// ExpireAfter is the lifetime of the state, in whole milliseconds.
	ExpireAfter time.Duration
	// Silent stores the state without an update to subscribers.
	Silent bool
	// Patch merges the top-level keys into the present state. null removes a key.
	// ExpireAfter applies to these keys only.
	Patch bool
}

// Join joins a room. The answer lists the client too, if it may see the room. With
// [WithReplaces] the client takes the place of its last connection.
func (c *Client) Join(room string) Snapshot {
	c.tb.Helper()
	s, _ := c.askSnapshot(wire.CommandJoinRoom, wire.JoinRequest{RoomName: wire.Name(room), Replaces: wire.Name(c.replaces)})
	return s
}

// askSnapshot also reports whether the command was answered.
func (c *Client) askSnapshot(command string, payload any) (s Snapshot, ok bool) {
	c.tb.Helper()
	var answer struct {
		Snapshot
		Present []wire.Member
	}
	ok = c.ask(command, payload, &answer)
	s = answer.Snapshot
	s.Present = make([]Member, len(answer.Present))
	for i, m := range answer.Present {
		s.Present[i] = Member{
			ID: m.ID, UserID: m.UserID, Metadata: orNil(m.Metadata), Disconnected: m.Disconnected, JoinedAt: timeOf(m.JoinedAt),
		}
	}
	return s, ok
}

// timeOf returns the time of unix ms, or the zero time for 0.
func timeOf(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// orNil returns nil for JSON's null.
func orNil(data json.RawMessage) json.RawMessage {
	if string(data) == "null" {
		return nil
	}
	return data
}

// Leave leaves a room. It does nothing if the client is not in the room.
func (c *Client) Leave(room string) {
	c.tb.Helper()
	var answer wire.Success
	if c.ask(wire.CommandLeaveRoom, inRoom(room), &answer) && !answer.Success {
		c.fail("cannot leave %q", room)
	}
}

// Subscribe asks for the members of a room and for updates from then on. If the server
// refuses, Success is false and no updates come.
func (c *Client) Subscribe(room string) Snapshot {
	c.tb.Helper()
	s, ok := c.askSnapshot(wire.CommandSubscribePresence, inRoom(room))
	if ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.rooms[room] = s.Success
	}
	return s
}

// Unsubscribe ends the updates of a room, and reports whether there was a subscription.
// At level 2 (see [WithLevel]) it fails the test if there was none.
func (c *Client) Unsubscribe(room string) (was bool) {
	c.tb.Helper()
	if c.ask(wire.CommandUnsubscribePresence, inRoom(room), &was) {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.rooms, room)
	}
	return was
}

// PublishState publishes a state in a room that the client is in. The state is any value
// that encodes to a JSON object. PublishState returns false if the client is not in the
// room or may not see it, the room is not tracked, the state is too large or not an
// object, or Redis does not answer. At level 2 (see [WithLevel]) it fails the test in
// these cases. [Client.Call] returns the error.
func (c *Client) PublishState(room string, state any, opts StateOptions) (done bool) {
	c.tb.Helper()
	data, err := json.Marshal(state)
	if err != nil {
		c.fail("state: %v", err)
		return false
	}
	req := wire.PublishStateRequest{RoomName: wire.Name(room), State: data, Silent: opts.Silent, Patch: opts.Patch}
	if opts.ExpireAfter != 0 {
		ms := float64(opts.ExpireAfter) / float64(time.Millisecond)
		req.ExpireAfter = &ms
	}
	c.ask(wire.CommandPublishPresenceState, req, &done)
	return done
}

// ClearState ends the client's state in a room. Its result is that of
// [Client.PublishState].
func (c *Client) ClearState(room string) (done bool) {
	c.tb.Helper()
	c.ask(wire.CommandClearPresenceState, inRoom(room), &done)
	return done
}

// State asks for the members of a room and their states, without a subscription. The
// members in the answer have no metadata.
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

// ListPresence asks for a page of the members of a room and their states. The cursor is
// "" for the first page, and then the Next of the page before. limit is the number of
// members, 1 to 1,000; 0 means 100. If the server refuses, Success is false. A cursor that
// is none, and a wrong limit, are error answers and fail the test.
func (c *Client) ListPresence(room, cursor string, limit int) Snapshot {
	c.tb.Helper()
	req := wire.ListPresenceRequest{RoomName: wire.Name(room), Cursor: wire.Name(cursor)}
	if limit != 0 {
		most := float64(limit)
		req.Limit = &most
	}
	s, _ := c.askSnapshot(wire.CommandListPresence, req)
	return s
}

// Metadata asks for the client's own metadata. It is nil if the client has none.
func (c *Client) Metadata() json.RawMessage {
	c.tb.Helper()
	return c.askMetadata(wire.CommandGetMyConnectionMetadata, struct{}{})
}

// MetadataOf asks for a connection's metadata. It is nil if the connection has none or
// shares no room with the client.
func (c *Client) MetadataOf(connectionID string) json.RawMessage {
	c.tb.Helper()
	return c.askMetadata(wire.CommandGetConnectionMetadata, wire.GetMetadataRequest{ConnectionID: wire.Name(connectionID)})
}

// RoomMetadata asks for a room's metadata. It is nil if the room has none or the client
// may not see the room.
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

// SetMetadata sets the client's own metadata to any value that encodes to JSON. The
// strategy is "replace", "merge" or "deepMerge" (a mesh.Strategy, as a string). "" means
// "replace". A server without Options.ClientMetadata refuses it, and that function may
// refuse it too. A refusal is an error answer and fails the test. To examine the error,
// send "mesh/set-my-connection-metadata" with [Client.Call].
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
