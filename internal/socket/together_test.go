package socket

import (
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/gorilla/websocket"
)

// writes counts the writes of a network connection.
type writes struct {
	net.Conn
	n, most atomic.Int64
}

func (w *writes) Write(p []byte) (int, error) {
	w.n.Add(1)
	w.most.Store(max(w.most.Load(), int64(len(p))))
	return w.Conn.Write(p)
}

// Small frames share writes, large ones do not, and the client sees no difference,
// compressed or not.
func TestSmallFramesAreWrittenTogether(t *testing.T) {
	t.Parallel()
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprint("compressed=", compress), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				serverEnd, clientEnd := net.Pipe()
				counted := &writes{Conn: serverEnd}
				server, client := upgrade(t, counted, clientEnd, compress)
				r := prepareOn(t, new(handler), server, client, nil)
				counted.n.Store(0)
				counted.most.Store(0)
				large := strings.Repeat("large ", 2000)
				var want []string
				for i := range 300 {
					if err := r.Send(push(t, "small", i)); err != nil {
						t.Fatal(err)
					}
					want = append(want, fmt.Sprint(i))
					if i == 100 {
						if err := r.SendMessage(websocket.TextMessage, []byte(`{"command":"large","payload":"`+large+`"}`)); err != nil {
							t.Fatal(err)
						}
						want = append(want, `"`+large+`"`)
					}
				}
				r.start(true)
				got := r.got()
				if len(got) != len(want) {
					t.Fatalf("%d frames, want %d", len(got), len(want))
				}
				for i, m := range got {
					if string(m.Payload) != want[i] {
						t.Fatalf("frame %d is %.40s, want %.40s", i, m.Payload, want[i])
					}
				}
				if n := counted.n.Load(); n > 10 {
					t.Errorf("%d writes for %d frames", n, len(want))
				}
				if most := counted.most.Load(); most > togetherBytes {
					t.Errorf("a write of %d bytes, at most %d are to go together", most, togetherBytes)
				}
				if r.QueueBytes() != 0 {
					t.Errorf("%d bytes still queued", r.QueueBytes())
				}
			})
		})
	}
}

// A client that does not read for a while is not closed because of states of one member,
// even with a small queue. They coalesce, except for the few that are being written.
func TestFramesBeingWrittenLeaveSpace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const limit = 8000
		r := prepare(t, new(handler), func(c *Config) { c.QueueBytes = limit })
		seq := uint64(0)
		send := func() {
			t.Helper()
			seq++
			if err := r.SendUpdate(state("r", "c", seq)); err != nil {
				t.Fatalf("state %d: %v", seq, err)
			}
		}
		send()
		for size := r.QueueBytes(); r.QueueBytes()+size < limit; {
			send()
		}
		r.start(false)  // the queue is full and accepts no frame without coalescing
		synctest.Wait() // the writer is stuck with the frames that it has taken
		for range 1000 {
			send()
		}
		r.read()
		if got := r.got(); len(got) == 0 || r.QueueBytes() != 0 {
			t.Errorf("%d frames came, %d bytes still queued", len(got), r.QueueBytes())
		}
	})
}
