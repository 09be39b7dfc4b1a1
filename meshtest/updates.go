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

// Update is one change in a room, as a subscriber receives it.
type Update struct {
	// Type is "join", "leave" or "state", and at level 2 (see [WithLevel]) also
	// "metadata", "disconnect" or "reconnect".
	Type         string
	ConnectionID string // the connection that changed
	Room         string
	Time         time.Time       // by Redis's clock
	Metadata     json.RawMessage // of the connection, in a join or metadata; nil: none
	State        json.RawMessage // in a state: the object, or nil if the state has ended

	// These are set in a join and a leave, and the user and the numbers also in a
	// metadata update that gives the connection its user. Users is 0 if users are not
	// counted.
	UserID          string // "": none
	UserConnections int    // of the user, after the update
	Connections     int    // of the room, after the update
	Users           int
	JoinedAt        time.Time // by Redis's clock

	Reason   string // in a leave or disconnect
	Replaces string // in a join: the connection whose place it took; "": none
	Seq      uint64
	Epoch    string
	Repair   bool // the update corrects something that the server had missed
}

// String returns the type, the connection, the room and the state, metadata or reason.
func (u Update) String() string {
	text := fmt.Sprintf("%s of %s in %q", u.Type, u.ConnectionID, u.Room)
	switch {
	case u.Type == wire.UpdateState && u.State == nil:
		text += " null"
	case u.Type == wire.UpdateState:
		text += " " + string(u.State)
	case u.Metadata != nil:
		text += " " + string(u.Metadata)
	case u.Reason != "":
		text += " (" + u.Reason + ")"
	}
	if u.Repair {
		text += " (repair)"
	}
	return text
}

// Frame is a message of the server as a client receives it: the answer to a request, or a
// push.
type Frame struct {
	ID      *int64          `json:"id"` // of the request that it answers; nil: it is a push
	Command string          `json:"command"`
	Payload json.RawMessage `json:"payload"`
}

// Update returns the update in a frame. ok is false if the frame is another one.
func (f Frame) Update() (u Update, ok bool) {
	var w struct {
		Type            string          `json:"type"`
		ConnectionID    string          `json:"connectionId"`
		RoomName        string          `json:"roomName"`
		Timestamp       int64           `json:"timestamp"`
		Metadata        json.RawMessage `json:"metadata"`
		State           json.RawMessage `json:"state"`
		UserID          string          `json:"userId"`
		UserConnections int             `json:"userConnections"`
		Connections     int             `json:"connections"`
		Users           int             `json:"users"`
		JoinedAt        int64           `json:"joinedAt"`
		Reason          string          `json:"reason"`
		Replaces        string          `json:"replaces"`
		Seq             uint64          `json:"seq"`
		Epoch           string          `json:"epoch"`
		Repair          bool            `json:"repair"`
	}
	if f.ID != nil || f.Command != wire.PushPresenceUpdate || json.Unmarshal(f.Payload, &w) != nil {
		return Update{}, false
	}
	return Update{
		Type: w.Type, ConnectionID: w.ConnectionID, Room: w.RoomName, Time: time.UnixMilli(w.Timestamp),
		Metadata: orNil(w.Metadata), State: orNil(w.State), UserID: w.UserID, UserConnections: w.UserConnections,
		Connections: w.Connections, Users: w.Users, JoinedAt: timeOf(w.JoinedAt), Reason: w.Reason, Replaces: w.Replaces,
		Seq: w.Seq, Epoch: w.Epoch, Repair: w.Repair,
	}, true
}

// NextUpdate waits for the next update that no earlier call has returned, and returns it.
// It fails the test if none comes. Updates of one room come in order. Updates of
// different rooms come in any order.
func (c *Client) NextUpdate() (u Update) {
	c.tb.Helper()
	if !c.await(c.timeout, func() bool { return c.takeUpdate(&u) }) {
		c.fail("no update within %v%s", c.timeout, c.diagnosis())
	}
	return u
}

// ExpectUpdate is [Client.NextUpdate], but fails the test if the next update has another
// type, connection or room.
func (c *Client) ExpectUpdate(kind, room, connectionID string) Update {
	c.tb.Helper()
	want := Update{Type: kind, Room: room, ConnectionID: connectionID}
	var u Update
	switch {
	case !c.await(c.timeout, func() bool { return c.takeUpdate(&u) }):
		c.fail("no update within %v, want %v%s", c.timeout, want, c.diagnosis())
	case u.Type != kind || u.Room != room || u.ConnectionID != connectionID:
		c.fail("got %v, want %v", u, want)
	}
	return u
}

// AwaitUpdate waits for an update that match accepts, and returns it. It discards the
// updates before it. It fails the test if none comes.
func (c *Client) AwaitUpdate(match func(u Update) bool) (u Update) {
	c.tb.Helper()
	var others []Update
	end := time.Now().Add(c.timeout)
	for c.await(time.Until(end), func() bool { return c.takeUpdate(&u) }) {
		if match(u) { // without mu, because match may call ID
			return u
		}
		others = append(others, u)
	}
	c.fail("no such update within %v, but %s%s", c.timeout, list(others), c.diagnosis())
	return Update{}
}

// NoUpdate fails the test if there is an update that no call has returned, or if one
// comes within d. In a synctest bubble that includes updates that are due after exactly
// d.
func (c *Client) NoUpdate(d time.Duration) {
	c.tb.Helper()
	c.await(d, func() bool { return len(c.updates) > 0 })
	if got := c.Updates(); len(got) > 0 {
		c.fail("no update should come, but %s", list(got))
	} else if end := c.ended(); end != nil {
		c.fail("no update can come: %s", end.text())
	}
}

// Updates returns the received updates that no earlier call has returned. It does not
// wait for more, except in a synctest bubble for those that are due now.
func (c *Client) Updates() []Update {
	yield()
	c.mu.Lock()
	defer c.mu.Unlock()
	got := c.updates
	c.updates = nil
	return got
}

// NextPush waits for the next push of that command that no earlier call has returned, and
// returns its payload. Pushes are messages that the app sends with Connection.Send,
// ConnectionManager.Send and RoomManager.Send. It fails the test if none comes. The order
// between pushes of different commands is not kept.
func (c *Client) NextPush(command string) (payload json.RawMessage) {
	c.tb.Helper()
	if !c.await(c.timeout, func() bool { return c.takePush(command, &payload, nil) }) {
		c.fail("no push %q within %v, but %s%s", command, c.timeout, c.otherPushes(), c.diagnosis())
	}
	return payload
}

// NoPush fails the test if there is a push of that command that no call has returned, or
// if one comes within d.
func (c *Client) NoPush(command string, d time.Duration) {
	c.tb.Helper()
	var got json.RawMessage
	came := c.await(d, func() bool { return c.takePush(command, &got, nil) })
	yield()
	c.mu.Lock()
	came = came || c.takePush(command, &got, nil)
	c.mu.Unlock()
	if came {
		c.fail("no push %q should come, but %s", command, got)
	} else if end := c.ended(); end != nil {
		c.fail("no push can come: %s", end.text())
	}
}

// AwaitEnded waits until the server says that the client's subscription of a room has
// ended, because a guard now refuses it.
func (c *Client) AwaitEnded(room string) {
	c.tb.Helper()
	ofRoom := func(payload json.RawMessage) bool {
		var ended wire.Ended
		return json.Unmarshal(payload, &ended) == nil && ended.RoomName == room
	}
	var payload json.RawMessage
	if !c.await(c.timeout, func() bool { return c.takePush(wire.PushPresenceEnded, &payload, ofRoom) }) {
		c.fail("the subscription of %q has not ended within %v, but %s%s", room, c.timeout, c.otherPushes(), c.diagnosis())
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.rooms, room)
}

// Stale is the push with which a server says that it is without Redis, so that no updates
// come, or that it has Redis back.
type Stale struct {
	// Stale is false if the server has Redis back, and the client has all updates.
	Stale bool `json:"stale"`
	// Rooms are the rooms that are stale. Empty means all rooms of the client.
	Rooms []string `json:"roomNames"`
}

// NextStale waits for the next [Stale] that no earlier call has returned, and returns it.
// It fails the test if none comes.
func (c *Client) NextStale() (s Stale) {
	c.tb.Helper()
	if payload := c.NextPush(wire.PushPresenceStale); payload != nil {
		_ = json.Unmarshal(payload, &s) // the server encodes it
	}
	return s
}

// takeUpdate takes the oldest update. c.mu is held.
func (c *Client) takeUpdate(u *Update) bool {
	if len(c.updates) == 0 {
		return false
	}
	*u, c.updates = c.updates[0], c.updates[1:]
	return true
}

// takePush takes the oldest push of a command whose payload match accepts. A nil match
// accepts any. c.mu is held.
func (c *Client) takePush(command string, payload *json.RawMessage, match func(json.RawMessage) bool) bool {
	i := slices.IndexFunc(c.pushes, func(p push) bool {
		return p.command == command && (match == nil || match(p.payload))
	})
	if i < 0 {
		return false
	}
	*payload = c.pushes[i].payload
	c.pushes = slices.Delete(c.pushes, i, i+1)
	return true
}

// diagnosis says why nothing may come: the connection has ended, or the subscriptions.
func (c *Client) diagnosis() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end != nil {
		return "; " + c.end.text()
	}
	rooms := slices.Sorted(maps.Keys(c.rooms))
	for i, room := range rooms {
		rooms[i] = fmt.Sprintf("%q", room)
		if !c.rooms[room] {
			rooms[i] += " (refused)"
		}
	}
	if len(rooms) == 0 {
		return "; it is subscribed to nothing"
	}
	return "; it subscribed to " + strings.Join(rooms, ", ")
}

func (c *Client) otherPushes() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	names := make([]string, len(c.pushes))
	for i, p := range c.pushes {
		names[i] = p.command + " " + string(p.payload)
	}
	return list(names)
}

// maxListed limits the number of items in a failure message.
const maxListed = 20

// list describes the last items for a failure message.
func list[T any](items []T) string {
	if len(items) == 0 {
		return "nothing came"
	}
	left := max(0, len(items)-maxListed)
	items = items[left:]
	texts := make([]string, len(items))
	for i, item := range items {
		texts[i] = fmt.Sprint(item)
	}
	text := strings.Join(texts, "; ")
	if left > 0 {
		text = fmt.Sprintf("%d others, then %s", left, text)
	}
	return "there came: " + text
}

// yield lets everything happen first that is due now. In a synctest bubble, time moves on
// only when all goroutines wait.
func yield() { time.Sleep(time.Nanosecond) }
