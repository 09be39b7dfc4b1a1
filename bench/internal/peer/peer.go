// Package peer holds the servers that are compared: the library, Centrifuge, and a plain
// gorilla server that answers from memory, which is the upper limit for any server here.
package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Kind names a server.
type Kind string

// The kinds.
const (
	Mesh       Kind = "mesh"       // http.Handle("/ws", srv)
	MeshOwn    Kind = "mesh own"   // the app upgrades, and its handler calls ServeConn
	MeshGo     Kind = "mesh go"    // the same on a goroutine of its own: the handler returns
	Gorilla    Kind = "gorilla"    // from memory, without Redis
	Centrifuge Kind = "centrifuge" // with its Redis broker and presence manager
)

// Config says which server to run.
type Config struct {
	Kind  Kind
	Redis string // address
	// StateInterval is that of the rule, for the library only.
	StateInterval time.Duration
	// SnapshotMembers is the library's limit; 0: its default.
	SnapshotMembers int
}

// Server is a running server.
type Server struct {
	Addr string
	web  *http.Server
	stop func(context.Context) error
}

// Start starts a server on a free port of the loopback interface.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	var handler http.Handler
	stop := func(context.Context) error { return nil }
	var err error
	switch cfg.Kind {
	case Mesh, MeshOwn, MeshGo:
		handler, stop, err = startMesh(ctx, cfg)
	case Centrifuge:
		handler, stop, err = startCentrifuge(cfg)
	case Gorilla:
		handler = newCeiling()
	default:
		err = fmt.Errorf("peer: no such kind: %q", cfg.Kind)
	}
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, stop(ctx))
	}
	mux := http.NewServeMux()
	mux.Handle("/ws", handler)
	s := &Server{Addr: ln.Addr().String(), web: &http.Server{Handler: mux}, stop: stop}
	go func() { _ = s.web.Serve(ln) }() // ends with Stop
	return s, nil
}

// Stop ends the server.
func (s *Server) Stop(ctx context.Context) error {
	return errors.Join(s.stop(ctx), s.web.Close())
}

// Memory is the memory of this process, in bytes, after a collection.
type Memory struct {
	RSS, Heap, Stacks int
	Goroutines        int
	CPU               float64 // seconds of processor time used so far
}

// ReadMemory collects garbage, returns free memory to the system, and measures.
func ReadMemory() (Memory, error) {
	debug.FreeOSMemory()
	debug.FreeOSMemory()
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return Memory{}, err
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	out := Memory{CPU: ProcessorTime(), Heap: int(m.HeapAlloc), Stacks: int(m.StackInuse), Goroutines: runtime.NumGoroutine()}
	if f := strings.Fields(string(statm)); len(f) > 1 {
		pages, _ := strconv.Atoi(f[1])
		out.RSS = pages * os.Getpagesize()
	}
	return out, nil
}

// ProcessorTime returns the processor time of this process so far, in seconds. It is 0 if
// the system does not report it.
func ProcessorTime() float64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}
