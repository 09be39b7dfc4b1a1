// Package admission decides how many connections a server takes: at once, per second,
// and with the file descriptors that the process may open. It also counts the requests
// and connections that a shutdown has to wait for.
package admission

import (
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/limit"
)

// ErrRate says that enough connections were taken in this second.
var ErrRate = fmt.Errorf("%w: upgrades per second", errs.Limit)

// Config configures a Gate.
type Config struct {
	// Max is the number of connections at once. Negative: no limit but that of Fit.
	Max int
	// Chosen says that the app has set Max, so that Fit does not lower it silently.
	Chosen bool
	// PerSecond is the number of connections taken per second in the long run, so that
	// a thousand clients that come back at once do not overload the server. Negative: no
	// limit.
	PerSecond int
	// Logger receives the line of Fit. Required.
	Logger *slog.Logger
}

// Gate counts requests and connections, and limits them. A request enters, may be taken
// as a connection, and leaves. All methods are safe for concurrent use.
type Gate struct {
	cfg   Config
	empty chan struct{} // closed when the gate is closed and open is 0

	mu       sync.Mutex // guards the fields below
	arrivals limit.Bucket
	max      int // connections at once; negative: no limit
	open     int // requests and connections that have entered and not left
	taken    int // those of open that are connections
	closed   bool
}

// New returns an open gate.
func New(cfg Config) *Gate {
	return &Gate{
		cfg: cfg, max: cfg.Max, empty: make(chan struct{}),
		arrivals: limit.NewBucket(time.Now(), cfg.PerSecond, 1),
	}
}

// Enter counts a request in. It returns false if the gate is closed. Otherwise Leave
// must follow.
func (g *Gate) Enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.open++
	return true
}

// HasPlace returns an error that wraps ErrLimit if no request can be taken as a connection now.
func (g *Gate) HasPlace() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.full(); err != nil {
		return err
	}
	if !g.arrivals.Has(time.Now()) {
		return ErrRate
	}
	return nil
}

// Take makes a request that has entered a connection, or returns an error if there are
// too many. If limited is set, the connection counts towards those of this second.
func (g *Gate) Take(limited bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.full(); err != nil {
		return err
	}
	if limited && !g.arrivals.Take(time.Now()) {
		return ErrRate
	}
	g.taken++
	return nil
}

// Untake takes back a limited Take whose handshake failed.
func (g *Gate) Untake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.taken--
	g.arrivals.Return()
}

// full returns an error if no further connection is allowed. The caller holds mu.
func (g *Gate) full() error {
	if g.max >= 0 && g.taken >= g.max {
		return fmt.Errorf("%w: %d connections", errs.Limit, g.max)
	}
	return nil
}

// Leave counts out a request that has entered. The argument says whether it was taken.
func (g *Gate) Leave(taken bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open--
	if taken {
		g.taken--
	}
	g.checkEmpty()
}

// Close lets no further request enter. Only the first call has an effect.
func (g *Gate) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return
	}
	g.closed = true
	g.checkEmpty()
}

// checkEmpty closes empty if it is time. That happens once, because open does not rise
// again after it. The caller holds mu and has just changed closed or open.
func (g *Gate) checkEmpty() {
	if g.closed && g.open == 0 {
		close(g.empty)
	}
}

// Empty returns a channel that is closed when the gate is closed and all requests and
// connections have left.
func (g *Gate) Empty() <-chan struct{} { return g.empty }

// Counts returns the number of requests and connections that have entered and not left,
// and how many of them are connections.
func (g *Gate) Counts() (open, taken int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open, g.taken
}

// Max returns the number of connections that are allowed at once. Negative: no limit.
func (g *Gate) Max() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.max
}

// setMax reports whether the limit was another one before.
func (g *Gate) setMax(most int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	was := g.max
	g.max = most
	return was != most
}
