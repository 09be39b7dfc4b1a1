package mesh

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// The errors of this package. Every returned error wraps one of them, with three
// exceptions: errors of the app's own callbacks, errors of encoding a payload to JSON,
// and the error with which Shutdown lists what it could not end in time. Test with
// [errors.Is].
//
// If the caller cancels the context of a method that waits, the error wraps
// context.Canceled and the cause of the context, and not [ErrUnavailable]. If the
// deadline of the context passes while Redis does not answer, the error wraps both
// [ErrUnavailable] and context.DeadlineExceeded. An [ErrUnavailable] may also wrap
// context.DeadlineExceeded if only a time limit of this package has passed. Call
// ctx.Err() to tell the two cases apart.
//
// A method that takes a room or a connection id returns [ErrInvalidRoom] or
// [ErrInvalidConnectionID] if it is invalid. A method that needs Redis returns
// [ErrNotStarted] before Start and [ErrClosed] after Shutdown.
var (
	// ErrInvalidRoom means that a room name is empty, is longer than
	// Limits.RoomNameBytes, is not valid UTF-8, or contains control characters.
	ErrInvalidRoom = errs.InvalidRoom
	// ErrInvalidConnectionID means that a connection id is empty, too long, not valid
	// UTF-8, or contains a colon, white space or control characters.
	ErrInvalidConnectionID = errs.InvalidConnectionID
	// ErrInvalidOptions means that an option is out of its documented range (the
	// message names the field), or, from Start, that it does not fit the Redis or the
	// process. It also means that a context, function or WebSocket is nil, or that a
	// close frame cannot carry a code or reason.
	ErrInvalidOptions = errs.InvalidOptions
	// ErrInvalidPattern means that a Pattern matches no room: it is the zero Pattern,
	// or an exact name that no room can have.
	ErrInvalidPattern = errs.InvalidPattern
	// ErrInvalidState means that a presence state is not a JSON object, or that its
	// expiry is out of range.
	ErrInvalidState = errs.InvalidState
	// ErrInvalidMetadata means that metadata is not valid JSON, or that the strategy to
	// merge it is unknown.
	ErrInvalidMetadata = errs.InvalidMetadata
	// ErrNotTracked means that no TrackPresence rule matches the room.
	ErrNotTracked = errs.NotTracked
	// ErrNotPresent means that the connection is not in the room.
	ErrNotPresent = errs.NotPresent
	// ErrUnknownConnection means that this server has no connection with that id, or,
	// for reads of metadata, that no server has one.
	ErrUnknownConnection = errs.UnknownConnection
	// ErrConnectionExists means that a connection with that id is already registered.
	ErrConnectionExists = errs.ConnectionExists
	// ErrRefused means that a guard or a hook refused, failed, or did not return in
	// time.
	ErrRefused = errs.Refused
	// ErrUnavailable means that Redis does not answer or rejects writes: it is out of
	// memory, read-only or loading. The requested change may or may not have happened,
	// unless the method says more.
	ErrUnavailable = errs.Unavailable
	// ErrTooLarge means that a value is larger than a limit in Options.Limits.
	ErrTooLarge = errs.TooLarge
	// ErrLimit means that a limit on a number of things in Options.Limits has been
	// reached.
	ErrLimit = errs.Limit
	// ErrFull means that a room has as many connections or users as its rule allows. The
	// message says which.
	ErrFull = errs.Full
	// ErrInvalidUser means that a user id is empty, too long, not valid UTF-8, or contains
	// control characters or U+FFFD.
	ErrInvalidUser = errs.InvalidUser
	// ErrUsersOff means that there are no users, because Options.UserID is not set.
	ErrUsersOff = errs.UsersOff
	// ErrBusy means that the guards of a rule cannot be asked, because too many of their
	// calls hang. The same request may succeed a moment later.
	ErrBusy = errs.Busy
	// ErrClosed means that the server has been shut down or is draining, or that the
	// connection has ended.
	ErrClosed = errs.Closed
	// ErrNotStarted means that the server or manager has not been started yet.
	ErrNotStarted = errs.NotStarted
	// ErrIncompatible means that the keys under Options.Prefix were written by a newer
	// version of this package, by servers with another kind of Redis client or another
	// number of Options.Buckets, or by other software. The message says which. Choose
	// another prefix, or remove those keys.
	ErrIncompatible = errs.Incompatible
	// ErrConflict means that other callers changed the same value at the same time,
	// many times in a row, or that a connection with the same id has joined the room on
	// another server and has taken the place of this one.
	ErrConflict = errs.Conflict
	// ErrSlowConsumer means that a subscription ended because its subscriber did not
	// keep up and its queue overflowed.
	ErrSlowConsumer = errs.SlowConsumer
	// ErrInvalidCommand means that a command's name is empty or is one of the
	// protocol's own.
	ErrInvalidCommand = errs.InvalidCommand
	// ErrInvalidMessage means that a message of the app is neither text nor binary, or
	// is text that is not valid UTF-8.
	ErrInvalidMessage = errs.InvalidMessage
	// ErrCommandExists means that a command with that name is already registered.
	ErrCommandExists = errs.CommandExists
)

// textInternal is the text of an error that is private or has none.
const textInternal = "Internal error"

// CommandError is an error of a command handler that chooses its own answer to the
// client: {"error": Message, "code": Code, "name": Name}. [CommandHandler] describes
// how other errors are answered.
type CommandError struct {
	// Code is for programs. Defaults to "ESERVER".
	Code string
	// Name is the class of the error. Defaults to "CommandError".
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

// wire returns the fields of the error answer.
func (e *CommandError) wire() (message, code, name string) {
	code, name = wire.CodeServer, wire.NameCommandError
	if e != nil && e.Code != "" {
		code = e.Code
	}
	if e != nil && e.Name != "" {
		name = e.Name
	}
	return e.Error(), code, name
}

// errPayload returns the error for a payload of the wrong shape. err wraps
// wire.ErrPayload and is written for the client.
func errPayload(err error) error {
	return &CommandError{Code: wire.CodeInvalid, Message: strings.TrimPrefix(err.Error(), "mesh: ")}
}

// Refusal is an error with which Options.Authenticate chooses the answer to a client.
// For any other error of the hook, the client gets a bare 401, or 500 for an outage
// (see Options.Authenticate), and none of its text. A Refusal is an [ErrRefused].
type Refusal struct {
	// Status is the HTTP status, 400 to 599. Defaults to 401. A value out of range also
	// refuses with 401.
	Status int
	// Message is the body of the answer. Defaults to the text of the status
	// ("Unauthorized" for 401).
	Message string
}

// Refuse returns a *Refusal for Options.Authenticate to return.
func Refuse(status int, message string) error {
	return &Refusal{Status: status, Message: message}
}

// Error returns the text that the client gets.
func (r *Refusal) Error() string {
	_, message := r.response()
	return "mesh: refused: " + message
}

// Unwrap returns [ErrRefused].
func (r *Refusal) Unwrap() error { return ErrRefused }

// response returns the status and text for the client, with the defaults filled in.
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

// isAnswer reports whether a callback has chosen the answer to the client by its error.
func isAnswer(err error) bool { return errs.Has[*CommandError](err) }

// typedErrors returns copies of the errors of this package that err wraps and that carry
// data.
func typedErrors(err error) (all []error) {
	if c, ok := errors.AsType[*CommandError](err); ok {
		if c != nil {
			c = &CommandError{Code: c.Code, Name: c.Name, Message: c.Message}
		}
		all = append(all, c)
	}
	if r, ok := errors.AsType[*Refusal](err); ok {
		if r != nil {
			r = &Refusal{Status: r.Status, Message: r.Message}
		}
		all = append(all, r)
	}
	return all
}

// checkContext returns an error for a nil context, which would otherwise panic after
// half of the work.
func checkContext(ctx context.Context) error {
	if ctx == nil {
		return fmt.Errorf("%w: nil context", ErrInvalidOptions)
	}
	return nil
}

// errorFor is storeError for a caller that waited with ctx. If the caller has cancelled
// ctx, the error says so, because Redis has not failed.
func errorFor(ctx context.Context, err error) error {
	if full, ok := errors.AsType[*local.FullError](err); ok && !errors.Is(err, ErrFull) {
		return fullError{full}
	}
	out := storeError(err)
	if errors.Is(ctx.Err(), context.Canceled) && (errors.Is(err, context.Canceled) || errors.Is(out, ErrUnavailable)) {
		return errs.Ended(ctx)
	}
	return out
}

// fullError is an ErrFull that says which bound the room has reached.
type fullError struct{ *local.FullError }

func (e fullError) Error() string { return fmt.Sprintf("%v: %d %s", ErrFull, e.Max, e.Of) }

func (e fullError) Unwrap() []error { return []error{ErrFull, e.FullError} }

// wireErrors lists the code and text that a client gets for an error. The first match
// wins, so that an error that also wraps one of Redis is reported as unavailable. An
// empty text means the text of the error itself, which is about the client's own
// request.
var wireErrors = []struct {
	is   error
	code string
	text string
}{
	{store.ErrFull, wire.CodeUnavailable, "Temporarily unavailable: storage is full"},
	{ErrUnavailable, wire.CodeUnavailable, "Temporarily unavailable"},
	{store.ErrUnavailable, wire.CodeUnavailable, "Temporarily unavailable"},
	{store.ErrFenced, wire.CodeUnavailable, "Temporarily unavailable"},
	{store.ErrLate, wire.CodeUnavailable, "Temporarily unavailable"},
	{store.ErrClock, wire.CodeUnavailable, "Temporarily unavailable"},
	{ErrIncompatible, wire.CodeUnavailable, "Temporarily unavailable"},
	{ErrNotStarted, wire.CodeUnavailable, "Temporarily unavailable"},
	{ErrClosed, wire.CodeClosed, "Closed"},
	{ErrBusy, wire.CodeBusy, "Busy"},
	{ErrSlowConsumer, wire.CodeBusy, "Too slow"},
	{ErrRefused, wire.CodeRefused, "Refused"},
	{ErrConflict, wire.CodeConflict, "Conflicting changes"},
	{ErrConnectionExists, wire.CodeExists, "Connection exists already"},
	{ErrNotTracked, wire.CodeNotFound, "Room is not tracked"},
	{ErrNotPresent, wire.CodeNotFound, "Not in the room"},
	{ErrUnknownConnection, wire.CodeNotFound, "Unknown connection"},
	{ErrTooLarge, wire.CodeTooLarge, ""},
	{ErrLimit, wire.CodeLimit, ""},
	{ErrFull, wire.CodeFull, ""},
	{ErrUsersOff, wire.CodeNotFound, "Users are not tracked"},
	{ErrInvalidUser, wire.CodeInvalid, ""},
	{ErrInvalidRoom, wire.CodeInvalid, ""},
	{ErrInvalidConnectionID, wire.CodeInvalid, ""},
	{ErrInvalidState, wire.CodeInvalid, ""},
	{ErrInvalidMetadata, wire.CodeInvalid, ""},
}

// wireError returns the fields error, code and name of the error answer for err. It
// never contains text of Redis, of the network, of a panic or of Go's type system. The
// text of a plain error of the app is sent.
func wireError(err error) (message, code, name string) {
	if err == nil {
		return textInternal, wire.CodeServer, wire.NameError
	}
	if ce, ok := errors.AsType[*CommandError](err); ok {
		return ce.wire()
	}
	if r, ok := errors.AsType[*Refusal](err); ok {
		_, message = r.response()
		return message, wire.CodeRefused, wire.NameCommandError
	}
	for _, w := range wireErrors {
		if !errors.Is(err, w.is) {
			continue
		}
		if message = w.text; message == "" {
			message = publicText(err, w.is)
		}
		return message, w.code, wire.NameCommandError
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "Timed out", wire.CodeTimeout, wire.NameCommandError
	}
	if errors.Is(err, context.Canceled) {
		return "Closed", wire.CodeClosed, wire.NameCommandError
	}
	if callbacks.IsPrivate(err) {
		return textInternal, wire.CodeServer, wire.NameError
	}
	return callbacks.ClientText(err), wire.CodeServer, wire.NameError
}

// publicText returns the text of err, or that of the sentinel if the text of err is
// private.
func publicText(err, sentinel error) string {
	text := sentinel.Error()
	if !callbacks.IsPrivate(err) {
		text = callbacks.ClientText(err)
	}
	return strings.ReplaceAll(strings.TrimPrefix(text, "mesh: "), ": mesh: ", ": ")
}

// storeError turns an error of an internal package into one of this package.
func storeError(err error) error {
	if err == nil {
		return nil
	}
	for inner, outer := range errorMap {
		if errors.Is(err, inner) {
			if errors.Is(err, outer) {
				return err // already converted
			}
			return layerlessError{fmt.Errorf("%w: %w", outer, err)}
		}
	}
	return err
}

// layerlessError hides the names of internal packages in the text of an error, and the
// repeated statement that Redis is unavailable.
type layerlessError struct{ err error }

func (e layerlessError) Error() string {
	return strings.TrimPrefix(tidyText.Replace(e.err.Error()), "store: ")
}

func (e layerlessError) Unwrap() error { return e.err }

var tidyText = strings.NewReplacer(
	": "+store.ErrUnavailable.Error(), "",
	store.ErrUnavailable.Error()+": ", "",
	": store: ", ": ",
	": local: ", ": ",
)

var errorMap = map[error]error{
	store.ErrUnavailable:    ErrUnavailable,
	store.ErrFenced:         ErrUnavailable,
	store.ErrLate:           ErrUnavailable,
	store.ErrClock:          ErrUnavailable,
	local.ErrUnavailable:    ErrUnavailable,
	local.ErrClosed:         ErrClosed,
	local.ErrExists:         ErrConnectionExists,
	local.ErrNotPresent:     ErrNotPresent,
	local.ErrTooMany:        ErrLimit,
	local.ErrOwnedElsewhere: ErrConflict,
	hub.ErrStopped:          ErrClosed,
	socket.ErrClosed:        ErrClosed,
}
