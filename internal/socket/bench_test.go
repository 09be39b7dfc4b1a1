package socket

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// sink is a network connection that counts writes, and otherwise costs nothing.
type sink struct {
	net.Conn
	written *sync.WaitGroup // nil: do not count
}

func (s *sink) Write(p []byte) (int, error) {
	if s.written == nil {
		return s.Conn.Write(p)
	}
	s.written.Done()
	return len(p), nil
}

func (s *sink) SetWriteDeadline(time.Time) error { return nil }

const fanOut = 200

// sinks returns connections whose writes are counted in written.
func sinks(b *testing.B, written *sync.WaitGroup) []*websocket.Conn {
	conns := make([]*websocket.Conn, fanOut)
	for i := range conns {
		serverEnd, clientEnd := net.Pipe()
		end := &sink{Conn: serverEnd}
		conns[i], _ = upgrade(b, end, clientEnd, false)
		end.written = written
		b.Cleanup(func() { _ = clientEnd.Close() })
	}
	return conns
}

// BenchmarkFanOut queues one update for 200 sockets and waits until all have written it.
func BenchmarkFanOut(b *testing.B) {
	var written, ended sync.WaitGroup
	w := wheel(b)
	sockets := make([]*Socket, fanOut)
	for i, conn := range sinks(b, &written) {
		s := NewGroup(Config{Wheel: w, QueueBytes: 1 << 18, WriteTimeout: 10 * time.Second}).New(conn, new(handler))
		ended.Go(func() { _ = s.Run(b.Context()) })
		sockets[i] = s
	}
	b.ReportAllocs()
	for b.Loop() {
		written.Add(fanOut)
		u := state("room", "connection", 1)
		for _, s := range sockets {
			if err := s.SendUpdate(u); err != nil {
				b.Fatal(err)
			}
		}
		written.Wait()
	}
	b.StopTimer()
	written.Add(fanOut) // their close frames
	for _, s := range sockets {
		s.Close(1000, "")
	}
	written.Wait()
	for _, s := range sockets {
		s.closeNet()
	}
	ended.Wait()
}

// BenchmarkPlainLoop writes the same in a loop without sockets, to measure the cost of
// queueing.
func BenchmarkPlainLoop(b *testing.B) {
	var written sync.WaitGroup
	conns := sinks(b, &written)
	b.ReportAllocs()
	for b.Loop() {
		written.Add(fanOut)
		p, err := state("room", "connection", 1).Frame().Prepared()
		if err != nil {
			b.Fatal(err)
		}
		for _, conn := range conns {
			_ = conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
			if err := conn.WritePreparedMessage(p); err != nil {
				b.Fatal(err)
			}
		}
		written.Wait()
	}
}

// BenchmarkSlowQueue queues states for a connection that reads nothing, so that each
// replaces an older one.
func BenchmarkSlowQueue(b *testing.B) {
	var q queue
	updates := make([]*wire.Update, 1000)
	for i := range updates {
		updates[i] = state("room", fmt.Sprint(i), uint64(i))
		q.push(&item{update: updates[i]})
	}
	q.coalesce()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		q.push(&item{update: updates[i%len(updates)]})
		i++
	}
}

// BenchmarkCommand reads, executes and answers one command.
func BenchmarkCommand(b *testing.B) {
	serverEnd, clientEnd := net.Pipe()
	server, client := upgrade(b, serverEnd, clientEnd, false)
	h := new(handler)
	s := NewGroup(Config{Wheel: wheel(b), FrameBytes: 1 << 16, QueueBytes: 1 << 18}).New(server, h)
	h.command = func(_ context.Context, req wire.Request) {
		f, err := wire.Answer(req.ID, req.Command, true)
		if err != nil {
			b.Error(err)
			return
		}
		_ = s.Send(f) // fails when the connection ends
	}
	var ended sync.WaitGroup
	ended.Go(func() { _ = s.Run(b.Context()) })
	request := []byte(`{"id":17,"command":"mesh/leave-room","payload":{"roomName":"lobby"}}`)
	b.ReportAllocs()
	for b.Loop() {
		if err := client.WriteMessage(websocket.TextMessage, request); err != nil {
			b.Fatal(err)
		}
		if _, _, err := client.ReadMessage(); err != nil {
			b.Fatal(err)
		}
	}
	_ = client.Close()
	ended.Wait()
}

// BenchmarkCounts goes through the queues of 100,000 sockets.
func BenchmarkCounts(b *testing.B) {
	var stats Stats
	for i := range 100_000 {
		s := new(Socket)
		s.bytes.Store(int64(i))
		stats.enter(s)
	}
	for b.Loop() {
		if c := stats.Counts(); c.Longest != 99_999 {
			b.Fatal(c.Longest)
		}
	}
}
