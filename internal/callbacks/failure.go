package callbacks

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
)

// PanicError says that a callback panicked, or ended its goroutine with runtime.Goexit.
// Its text never goes to a client.
type PanicError struct {
	Name  string // of the callback
	Value any
	Stack []byte
}

// newPanicError must be called where the app's code is recovered. It prints the value
// once, because the value may have methods of the app.
func newPanicError(name string, value any) *PanicError {
	return &PanicError{Name: name, Value: limit.Shorten(fmt.Sprint(value)), Stack: debug.Stack()}
}

func (e *PanicError) Error() string { return fmt.Sprintf("mesh: %s panicked: %v", e.Name, e.Value) }

// TimeoutError says that a callback did not return in time. It is a
// context.DeadlineExceeded.
type TimeoutError struct {
	Name  string // of the callback
	After time.Duration
}

func (e *TimeoutError) Error() string {
	return fmt.Sprintf("mesh: %s did not return within %v", e.Name, e.After)
}

func (e *TimeoutError) Unwrap() error { return context.DeadlineExceeded }
