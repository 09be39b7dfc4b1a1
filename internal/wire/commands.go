package wire

import "strings"

// Commands that clients send. An answer has the name of its command.
const (
	CommandNoop                    = "mesh/noop"
	CommandJoinRoom                = "mesh/join-room"
	CommandLeaveRoom               = "mesh/leave-room"
	CommandSubscribePresence       = "mesh/subscribe-presence"
	CommandUnsubscribePresence     = "mesh/unsubscribe-presence"
	CommandPublishPresenceState    = "mesh/publish-presence-state"
	CommandClearPresenceState      = "mesh/clear-presence-state"
	CommandGetPresenceState        = "mesh/get-presence-state"
	CommandGetConnectionMetadata   = "mesh/get-connection-metadata"
	CommandGetMyConnectionMetadata = "mesh/get-my-connection-metadata"
	CommandSetMyConnectionMetadata = "mesh/set-my-connection-metadata"
	CommandGetRoomMetadata         = "mesh/get-room-metadata"
	CommandListPresence            = "mesh/list-presence"
	CommandSubscribeOccupancy      = "mesh/subscribe-occupancy"
	CommandUnsubscribeOccupancy    = "mesh/unsubscribe-occupancy"

	// CommandPong and CommandLatencyResponse are signs of life. They have an id and get
	// no answer.
	CommandPong            = "pong"
	CommandLatencyResponse = "latency:response"
)

// Pushes of the server.
const (
	PushAssignID       = "mesh/assign-id"
	PushPresenceUpdate = "mesh/presence-update"
	PushPresenceEnded  = "mesh/presence-ended"
	// PushMembershipEnded is an extension of this project. The server sends it if a
	// join guard has ended the membership of the connection in a room.
	PushMembershipEnded = "mesh/membership-ended"
	// PushRoomJoined and PushRoomLeft tell a client that the app has added it to a room,
	// or has removed it.
	PushRoomJoined = "mesh/room-joined"
	PushRoomLeft   = "mesh/room-left"
	// PushPresenceStale tells a client that its server is without Redis, or has it back.
	PushPresenceStale  = "mesh/presence-stale"
	PushOccupancy      = "mesh/occupancy"
	PushOccupancyEnded = "mesh/occupancy-ended"
	PushPing           = "ping"
	PushLatencyRequest = "latency:request"
	PushLatency        = "latency"
)

// knownCommands maps the commands of the protocol to their constants, so that decoding one of
// them does not allocate a string.
var knownCommands = func() map[string]string {
	all := []string{
		CommandNoop, CommandJoinRoom, CommandLeaveRoom,
		CommandSubscribePresence, CommandUnsubscribePresence,
		CommandPublishPresenceState, CommandClearPresenceState, CommandGetPresenceState,
		CommandGetConnectionMetadata, CommandGetMyConnectionMetadata,
		CommandSetMyConnectionMetadata, CommandGetRoomMetadata,
		CommandListPresence, CommandSubscribeOccupancy, CommandUnsubscribeOccupancy,
		CommandPong, CommandLatencyResponse,
	}
	m := make(map[string]string, len(all))
	for _, name := range all {
		m[name] = name
	}
	return m
}()

// IsReserved reports whether a command is one of the protocol's own or empty, so that an
// app can neither send nor handle it.
func IsReserved(name string) bool {
	switch name {
	case "", CommandPong, CommandLatencyResponse, PushPing, PushLatency, PushLatencyRequest:
		return true
	}
	return strings.HasPrefix(name, "mesh/")
}
