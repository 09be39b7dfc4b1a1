package callbacks

import "errors"

// The names of the callbacks.
const (
	Authenticate  = "Authenticate"
	Metadata      = "ClientMetadata"
	Connection    = "OnConnection"
	Disconnection = "OnDisconnection"
	Command       = "command"
	Foreign       = "Foreign"
	Encode        = "MarshalJSON"
	Guard         = "guard"
	JoinGuard     = "join guard"
)

// answersClient holds the callbacks whose errors are answers to the client. Such an error
// is not a failure of the app.
var answersClient = map[string]bool{Authenticate: true, Metadata: true, Command: true, Encode: true}

var (
	// ErrNotEncoded says that the result of a command does not encode to JSON.
	ErrNotEncoded = errors.New("mesh: the result does not encode to JSON")
	// ErrCanceled is the cause with which a caller cancels a call whose result it does
	// not need any more.
	ErrCanceled = errors.New("mesh: the question was called off")

	// errPrivate marks a frozen error whose text must not reach a client.
	errPrivate = errors.New("mesh: private")
	// errContextEnded stands for the cause with which the context of a callback ended.
	// The cause may be an error of the app, whose methods must not be called on
	// goroutines that do not recover panics.
	errContextEnded = errors.New("mesh: the context of a callback ended")
	// errGoexit is the value of a PanicError if the callback called runtime.Goexit.
	errGoexit = errors.New("runtime.Goexit was called")
)
