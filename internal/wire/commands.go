package wire

// Commands that clients send. Those with an answer are answered under the
// same name.
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

	// CommandPong and CommandLatencyResponse are signs of life; they carry an
	// id and get no answer.
	CommandPong            = "pong"
	CommandLatencyResponse = "latency:response"
)

// Pushes that servers send unasked.
const (
	PushAssignID       = "mesh/assign-id"
	PushPresenceUpdate = "mesh/presence-update"
	PushPresenceEnded  = "mesh/presence-ended"
	// PushMembershipEnded is this project's own: a guard has taken the connection
	// out of a room, and no request of the client tells it so.
	PushMembershipEnded = "mesh/membership-ended"
	PushPing            = "ping"
	PushLatencyRequest  = "latency:request"
	PushLatency         = "latency"
)

// Codes of error answers. The stock client hands them to the app as they are.
const (
	CodeNotFound    = "ENOTFOUND"    // no such command
	CodeServer      = "ESERVER"      // a handler failed
	CodeBusy        = "EBUSY"        // the connection's queue is full
	CodeUnavailable = "EUNAVAILABLE" // Redis does not answer
)

// Names of error answers: the class that the stock client's user sees.
const (
	NameError        = "Error"
	NameCommandError = "CommandError"
)

// known maps the commands of the protocol to their constants, so that
// decoding one of them allocates no string.
var known = func() map[string]string {
	all := []string{
		CommandNoop, CommandJoinRoom, CommandLeaveRoom,
		CommandSubscribePresence, CommandUnsubscribePresence,
		CommandPublishPresenceState, CommandClearPresenceState, CommandGetPresenceState,
		CommandGetConnectionMetadata, CommandGetMyConnectionMetadata,
		CommandSetMyConnectionMetadata, CommandGetRoomMetadata,
		CommandPong, CommandLatencyResponse,
	}
	m := make(map[string]string, len(all))
	for _, name := range all {
		m[name] = name
	}
	return m
}()
