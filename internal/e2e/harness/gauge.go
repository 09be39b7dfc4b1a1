package harness

import (
	"encoding/json"
	"net"
	"net/http"
	"runtime"
	"sync"
	"time"

	"github.com/meshpresence/mesh"
)

// Attacks go over TCP to a server in a process of its own, so that its heap does not
// contain the memory of the attackers. Two neighbours use the server at the same time.

// Gauged is the resource usage of a server process. Bytes is the live memory of heap
// and stacks. It contains garbage only if it was made since a collection just before.
type Gauged struct {
	Bytes, Peak int64
	Goroutines  int
	Stats       mesh.Stats
}

// gauge is a server that reports its resource usage.
type gauge struct {
	srv *mesh.Server

	mu   sync.Mutex // guards peak
	peak int64
}

// sampleEvery is the interval at which a gauged server measures its memory. Each
// measurement costs a garbage collection. Memory that is held for less time may be
// missed.
const sampleEvery = 100 * time.Millisecond

func newGauge(srv *mesh.Server) *gauge {
	g := &gauge{srv: srv}
	go func() { // ends with the process
		for range time.Tick(sampleEvery) {
			g.sample(false)
		}
	}()
	return g
}

// sample measures the memory. With reset, the peak starts again from now.
func (g *gauge) sample(reset bool) (now, most int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	now = int64(m.HeapAlloc + m.StackInuse)
	g.peak = max(g.peak, now)
	if reset {
		g.peak = now
	}
	return now, g.peak
}

func (g *gauge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/gauge" {
		g.srv.ServeHTTP(w, r)
		return
	}
	now, peak := g.sample(r.URL.RawQuery == "reset")
	_ = json.NewEncoder(w).Encode(Gauged{now, peak, runtime.NumGoroutine(), g.srv.Stats()})
}

// buffered is a listener whose connections have small buffers in the kernel, so that a
// client that does not read is noticed early.
type buffered struct {
	net.Listener
	bytes int
}

func (l buffered) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if tcp, ok := c.(*net.TCPConn); ok && l.bytes > 0 {
		_ = tcp.SetWriteBuffer(l.bytes)
	}
	return c, err
}
