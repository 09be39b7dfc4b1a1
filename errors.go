package mesh

import (
	"errors"
	"fmt"
	"net/http"
)

// The errors of this package. Every error that it returns wraps one of them,
// unless it comes from one of the app's own callbacks, or says why a payload
// does not encode to JSON or what Shutdown could not end in time; test with
// [errors.Is]. If the caller cancels the context of a method that waits, the
// error wraps context.Canceled and the context's cause, and not [ErrUnavailable];
// if its deadline passes while Redis does not answer, it wraps both
// [ErrUnavailable] and context.DeadlineExceeded. An [ErrUnavailable] may also wrap
// context.DeadlineExceeded if only a time limit of this package has passed: ask
// ctx.Err(). A method that takes a room or a
// connection id returns [ErrInvalidRoom] or [ErrInvalidConnectionID] for a bad
// one. A method that needs Redis returns [ErrNotStarted] before Start and
// [ErrClosed] after Shutdown.
var (
	// ErrInvalidRoom says that a room name is empty, longer than
	// Limits.RoomNameBytes, not valid UTF-8, or holds control characters.
	ErrInvalidRoom = errors.New("mesh: invalid room name")
	// ErrInvalidConnectionID says that a connection id is empty, too long, not
	// valid UTF-8, or holds a colon, white space or control characters.
	ErrInvalidConnectionID = errors.New("mesh: invalid connection id")
	// ErrInvalidOptions says that an option is out of its documented range (the
	// message names the field), or, from Start, that it does not fit the Redis or
	// the process; that a context, function or WebSocket is nil; or that a close
	// frame cannot carry a code or reason.
	ErrInvalidOptions = errors.New("mesh: invalid options")
	// ErrInvalidPattern says that a Pattern names no room: it is the zero
	// Pattern, or an exact name that no room can have.
	ErrInvalidPattern = errors.New("mesh: invalid pattern")
	// ErrInvalidState says that a presence state is not a JSON object, or that
	// its expiry is out of range.
	ErrInvalidState = errors.New("mesh: invalid presence state")
	// ErrInvalidMetadata says that metadata is not valid JSON, or that the
	// strategy to merge it is unknown.
	ErrInvalidMetadata = errors.New("mesh: invalid metadata")
	// ErrNotTracked says that no TrackPresence rule matches the room.
	ErrNotTracked = errors.New("mesh: room is not tracked")
	// ErrNotPresent says that the connection is not in the room.
	ErrNotPresent = errors.New("mesh: connection is not in the room")
	// ErrUnknownConnection says that no connection of that id is known: on
	// this server, or for reads of metadata on any.
	ErrUnknownConnection = errors.New("mesh: unknown connection")
	// ErrConnectionExists says that a connection of that id is registered
	// already.
	ErrConnectionExists = errors.New("mesh: connection exists already")
	// ErrRefused says that a guard or a hook said no, failed, or did not
	// answer in time.
	ErrRefused = errors.New("mesh: refused")
	// ErrUnavailable says that Redis does not answer, or refuses to write: it
	// is out of memory, read-only, loading. What was asked for may or may not
	// have happened, unless the method says more.
	ErrUnavailable = errors.New("mesh: redis is unavailable")
	// ErrTooLarge says that a value is larger than a limit of Options.Limits
	// allows.
	ErrTooLarge = errors.New("mesh: too large")
	// ErrLimit says that a limit of Options.Limits on how many has been
	// reached.
	ErrLimit = errors.New("mesh: limit reached")
	// ErrBusy says that too much is under way already; the same request may
	// succeed a moment later.
	ErrBusy = errors.New("mesh: busy")
	// ErrClosed says that the server has been shut down or is draining, or
	// that the connection has ended.
	ErrClosed = errors.New("mesh: closed")
	// ErrNotStarted says that the server or manager has not been started yet.
	ErrNotStarted = errors.New("mesh: not started")
	// ErrIncompatible says that the keys under Options.Prefix were written by
	// a newer version of this package, by servers with another kind of Redis
	// client or another number of Options.Buckets, or by other software. The
	// message says which. Choose another prefix, or remove those keys.
	ErrIncompatible = errors.New("mesh: incompatible data in redis")
	// ErrConflict says that others changed the same value at the same time,
	// again and again, or that a connection of the same id has joined the room
	// on another server and taken this one's place.
	ErrConflict = errors.New("mesh: conflicting changes")
	// ErrSlowConsumer says that a subscriber did not keep up and its queue
	// overflowed, so that it was ended.
	ErrSlowConsumer = errors.New("mesh: slow consumer")
	// ErrInvalidCommand says that a command's name is empty or one of the
	// protocol's own.
	ErrInvalidCommand = errors.New("mesh: invalid command name")
	// ErrInvalidMessage says that a message of the app's own is neither text nor
	// binary, or a text that is not valid UTF-8.
	ErrInvalidMessage = errors.New("mesh: invalid message")
	// ErrCommandExists says that a command of that name has been registered
	// already.
	ErrCommandExists = errors.New("mesh: command exists already")
)

// Codes that a client finds in the field code of an error answer.
const (
	codeServer      = "ESERVER"
	codeInvalid     = "EINVALID"
	codeNotFound    = "ENOTFOUND"
	codeRefused     = "EREFUSED"
	codeUnavailable = "EUNAVAILABLE"
	codeTooLarge    = "ETOOLARGE"
	codeLimit       = "ELIMIT"
	codeBusy        = "EBUSY"
	codeClosed      = "ECLOSED"
	codeConflict    = "ECONFLICT"
	codeExists      = "EEXISTS"
	codeTimeout     = "ETIMEOUT"

	nameCommandError = "CommandError"
	nameError        = "Error"

	textInternal = "Internal error"
)

// CommandError is an error whose answer to the client the app's command
// handler chose itself: {"error": Message, "code": Code, "name": Name}. Of other
// errors of a handler see [CommandHandler].
type CommandError struct {
	// Code is for programs. Defaults to "ESERVER".
	Code string
	// Name is the error's class. Defaults to "CommandError".
	Name string
	// Message is for people. Defaults to "Internal error".
	Message string
}

// Error returns the message.
func (e *CommandError) Error() string {
	if e == nil || e.Message == "" {
		return textInternal
	}
	return e.Message
}

// wire is what the client is told.
func (e *CommandError) wire() (message, code, name string) {
	code, name = codeServer, nameCommandError
	if e != nil && e.Code != "" {
		code = e.Code
	}
	if e != nil && e.Name != "" {
		name = e.Name
	}
	return e.Error(), code, name
}

// ProgressError says how far a call got that did not get through.
type ProgressError struct {
	// Done is how many connections it has dealt with. There may be a few more,
	// of which the answer did not come in time.
	Done int
	// Err says why it ended: it wraps the context's error, or one of this
	// package's.
	Err error
}

// Error says why the call ended, and how far it got.
func (e *ProgressError) Error() string {
	return fmt.Sprintf("mesh: ended after %d connections: %v", e.Done, e.Err)
}

// Unwrap returns Err.
func (e *ProgressError) Unwrap() error { return e.Err }

// Refusal is the error with which the authentication hook chooses what the
// client is told. Whatever other error the hook returns, the client gets a
// bare 401 and none of its text. A Refusal is an [ErrRefused].
type Refusal struct {
	// Status is the HTTP status, 400 to 599. Defaults to 401; a value out of
	// range refuses with 401 all the same.
	Status int
	// Message is the body of the answer. Defaults to the status's own text
	// ("Unauthorized" for 401).
	Message string
}

// Refuse returns a *Refusal for Options.Authenticate to return.
func Refuse(status int, message string) error {
	return &Refusal{Status: status, Message: message}
}

// Error returns what the client is told, as text.
func (r *Refusal) Error() string {
	_, message := r.response()
	return "mesh: refused: " + message
}

// Unwrap returns [ErrRefused].
func (r *Refusal) Unwrap() error { return ErrRefused }

// response is what the client is told, with the defaults filled in.
func (r *Refusal) response() (status int, message string) {
	status = http.StatusUnauthorized
	if r != nil && r.Status >= 400 && r.Status <= 599 {
		status = r.Status
	}
	if r != nil {
		message = r.Message
	}
	if message == "" {
		message = http.StatusText(status)
	}
	if message == "" {
		message = http.StatusText(http.StatusUnauthorized)
	}
	return status, message
}
