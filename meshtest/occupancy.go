package meshtest

import (
	"encoding/json"
	"fmt"

	"github.com/meshpresence/mesh/internal/wire"
)

// Occupancy is the numbers of a room, in the answer to [Client.SubscribeOccupancy] and in
// later updates.
type Occupancy struct {
	Room string `json:"roomName"`
	// Success is false in an answer if the server refuses the numbers of this room. Code
	// then says why: "EREFUSED", "ENOTFOUND" (the room is not tracked), "EUNAVAILABLE" ….
	// In an update it is true.
	Success     bool
	Code        string
	Connections int
	Users       int  // 0 if users are not counted
	Stale       bool // Redis does not answer, so these are the last known numbers
	Seq         uint64
	Epoch       string
}

// String returns the room and its numbers.
func (o Occupancy) String() string {
	if !o.Success {
		return fmt.Sprintf("%q refused %s", o.Room, o.Code)
	}
	text := fmt.Sprintf("%q %d/%d", o.Room, o.Connections, o.Users)
	if o.Stale {
		text += " (stale)"
	}
	return text
}

// SubscribeOccupancy asks for the numbers of rooms, 100 at most, and for their updates from
// then on. The answer has every room. Rooms of earlier calls stay subscribed to.
func (c *Client) SubscribeOccupancy(rooms ...string) map[string]Occupancy {
	c.tb.Helper()
	var answer struct{ Rooms map[string]Occupancy }
	c.ask(wire.CommandSubscribeOccupancy, occupancyRequest(rooms), &answer)
	for room, o := range answer.Rooms {
		o.Room = room
		answer.Rooms[room] = o
	}
	return answer.Rooms
}

// UnsubscribeOccupancy ends the updates of the numbers of rooms. It returns false if some
// of them were not subscribed to.
func (c *Client) UnsubscribeOccupancy(rooms ...string) (all bool) {
	c.tb.Helper()
	c.ask(wire.CommandUnsubscribeOccupancy, occupancyRequest(rooms), &all)
	return all
}

// NextOccupancy waits for the next update of numbers that no earlier call has returned, and
// returns it. It fails the test if none comes. If a guard ends a subscription, the client
// gets the push "mesh/occupancy-ended" (see [Client.NextPush]).
func (c *Client) NextOccupancy() Occupancy {
	c.tb.Helper()
	o := Occupancy{Success: true}
	if err := json.Unmarshal(c.NextPush(wire.PushOccupancy), &o); err != nil {
		c.fail("numbers: %v", err)
	}
	return o
}

func occupancyRequest(rooms []string) wire.OccupancyRequest {
	names := make([]wire.Name, len(rooms))
	for i, room := range rooms {
		names[i] = wire.Name(room)
	}
	return wire.OccupancyRequest{RoomNames: names}
}
