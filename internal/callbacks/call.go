package callbacks

import (
	"context"
	"sync"
	"time"
)

// Events are functions that are called about a callback. They may be nil and must not
// block.
type Events struct {
	// Ended is called when the callback has returned. If the callback was in time, this
	// is before the call settles.
	Ended func()
	// Late is called if the call settles without the callback. The callback may have
	// returned at the same moment.
	Late func()
}

// Call is one run of a callback. It settles when the callback returns, when its time is
// over, or when its context ends.
type Call struct {
	name    string
	settled chan struct{} // closed when err and at are final
	err     error         // read only after settled
	at      time.Time     // when the call settled; read only after settled
	once    sync.Once
	// cancel ends the context of the callback, and so settles the call. It is nil if
	// the callback was never called.
	cancel context.CancelCauseFunc
	// giveUp settles the call without the callback.
	giveUp    func(why error)
	goroutine uint64 // guarded by Runner.mu; 0: not begun
	detached  bool   // guarded by Runner.mu, see Detach
}

// Settled is closed when the outcome is final.
func (k *Call) Settled() <-chan struct{} { return k.settled }

// Done reports whether the outcome is final.
func (k *Call) Done() bool {
	select {
	case <-k.settled:
		return true
	default:
		return false
	}
}

// Err returns the outcome. It must not be called before the call has settled.
func (k *Call) Err() error { return k.err }

// SettledAt returns the time at which the call settled. It must not be called before.
func (k *Call) SettledAt() time.Time { return k.at }

// Cancel ends the context of the callback with a cause. It must not be called if the
// callback was not called.
func (k *Call) Cancel(cause error) { k.cancel(cause) }

// Called reports whether the callback was called.
func (k *Call) Called() bool { return k.cancel != nil }

// settle sets the outcome. Only the first call does that, and returns true. It calls count
// (nil: none) before anything that waits for the call goes on.
func (k *Call) settle(err error, count func()) (first bool) {
	k.once.Do(func() {
		first, k.err, k.at = true, err, time.Now()
		if count != nil {
			count()
		}
		close(k.settled)
	})
	return first
}
