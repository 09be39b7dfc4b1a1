package wire

// The codes of error answers. Clients get them in the field code, and
// docs/wire-protocol.md describes them. Commands of the app may use other codes.
const (
	CodeInvalid     = "EINVALID"
	CodeTooLarge    = "ETOOLARGE"
	CodeNotFound    = "ENOTFOUND"
	CodeRefused     = "EREFUSED"
	CodeExists      = "EEXISTS"
	CodeLimit       = "ELIMIT"
	CodeFull        = "EFULL"
	CodeBusy        = "EBUSY"
	CodeUnavailable = "EUNAVAILABLE"
	CodeConflict    = "ECONFLICT"
	CodeTimeout     = "ETIMEOUT"
	CodeClosed      = "ECLOSED"
	CodeServer      = "ESERVER"
)

// The names of error answers. The user of the stock client sees them as classes.
const (
	NameError        = "Error" // for a plain error of the app's code
	NameCommandError = "CommandError"
)

// MaxCloseReason is the number of bytes of a reason that fit into a close frame.
const MaxCloseReason = 123
