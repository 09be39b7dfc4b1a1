package harness

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// World is one Redis or Redis Cluster, and the servers on it, for one test.
type World struct {
	T       *testing.T
	Virtual bool            // in a synctest bubble, with Redis in this process
	Mem     *meshtest.Redis // Redis in this process, sometimes without virtual time
	Real    *redistest.Server
	Watched *redistest.Sentinel // Sentinel, instead of Real
	Cluster *redistest.Cluster  // instead of Real
	Prefix  string              // Options.Prefix; empty: the default

	As  func() redis.UniversalClient // client of the servers, if they need another one than tests
	URL string                       // address of that client, for servers in other processes
	CA  string                       // file of the authority that signed the certificate of URL
}

// Client returns a new Redis client, closed at the end of the test.
func (w *World) Client() redis.UniversalClient {
	w.T.Helper()
	switch {
	case w.Mem != nil:
		c := w.Mem.Client()
		w.T.Cleanup(func() { _ = c.Close() })
		return c
	case w.Cluster != nil:
		return w.Cluster.Client(w.T)
	}
	if w.Watched != nil {
		return w.Watched.Client(w.T)
	}
	return w.Real.Client(w.T)
}

// Options returns the options of a server in this world.
func (w *World) Options() mesh.Options {
	w.T.Helper()
	if w.As != nil {
		return mesh.Options{Redis: w.As(), Prefix: w.KeyPrefix()}
	}
	return mesh.Options{Redis: w.Client(), Prefix: w.KeyPrefix()}
}

// Sleep lets time pass. In virtual time it returns after everything that is due has
// happened.
func (w *World) Sleep(d time.Duration) {
	time.Sleep(d)
	if w.Virtual {
		synctest.Wait()
	}
}

// Eventually waits until ok returns true. In virtual time, within is the exact limit. In
// real time, Unhurried extends it.
func (w *World) Eventually(within time.Duration, ok func() bool, format string, args ...any) {
	w.T.Helper()
	within = w.Unhurried(within)
	for end := time.Now().Add(within); !ok(); {
		if time.Now().After(end) {
			require.FailNow(w.T, "timeout after "+within.String(), fmt.Sprintf(format, args...))
		}
		w.Sleep(5 * time.Millisecond)
	}
}

// MachineShare is added to every limit in real time, for busy machines.
const MachineShare = 2 * time.Minute

// Unhurried returns the limit for something that takes d on an idle machine: d in
// virtual time, more in real time.
func (w *World) Unhurried(d time.Duration) time.Duration {
	if w.Virtual {
		return d
	}
	return d + MachineShare
}

// Away makes Redis answer nothing, until Back.
func (w *World) Away() {
	if w.Virtual {
		w.Mem.Hang()
	} else {
		w.Real.Pause()
	}
}

func (w *World) Back() {
	if w.Virtual {
		w.Mem.Resume()
	} else {
		w.Real.Resume()
	}
}
