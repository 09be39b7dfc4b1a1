// Package callbacks runs the code of the app: guards, hooks, command handlers, encoders.
//
// Each call runs on its own goroutine, which the Runner owns. Panics are recovered and the
// time is limited. So a callback can neither end the process nor delay anything but its
// own caller. A call that ignores its context is left running when its time is over, and
// Close waits for it.
//
// The errors that a callback returns are frozen: their methods are code of the app as
// well, so they are called once, on the goroutine of the callback (see Frozen).
package callbacks
