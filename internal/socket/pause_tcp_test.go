package socket

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// This is the same over TCP, where flushers write.
func TestAnswerOverTCP(t *testing.T) {
	t.Parallel()
	p := tcpPausing(t)
	begun := time.Now()
	_ = p.Send(push(t, "before", nil))
	p.subscribe("r")
	p.tell("r", 1)
	p.tell("q", 1)
	p.start(true)
	var last message
	var at time.Duration
	var names []string
	for len(names) < 4 {
		for _, m := range p.poll() {
			last, at = m, time.Since(begun)
			names = append(names, text([]message{m}))
		}
	}
	if got := strings.Join(names, ", "); got != "before, answer r, q1, r1" || at < updatePause {
		t.Errorf("got %s, the last %v after %v", got, last, at)
	}
}

// Pauses begin, end and are dropped on many sockets at once. This test is for the race
// detector.
func TestStormOfPauses(t *testing.T) {
	t.Parallel()
	var all sync.WaitGroup
	first := tcpPausing(t)
	sockets := []*pausing{first}
	for range 7 {
		p := tcpPausing(t)
		p.Socket.group = first.group
		sockets = append(sockets, p)
	}
	for _, p := range sockets {
		p.start(true)
		for g := range 4 {
			all.Go(func() {
				for i := range 200 {
					room := fmt.Sprint("r", (g+i)%5)
					_ = p.SendSubscribed(room, subscribed(t, room))
					_ = p.SendUpdate(state(room, "c", uint64(i)))
					if i%7 == 0 {
						p.Unsubscribed(room)
					}
				}
			})
		}
	}
	all.Wait()
	for _, p := range sockets {
		p.Close(1000, "")
		p.end()
	}
	first.group.Wait()
	for _, p := range sockets {
		if p.pauses != nil || p.QueueBytes() != 0 {
			t.Errorf("pauses %v, %d bytes queued", p.pauses, p.QueueBytes())
		}
	}
}

// BenchmarkSubscribed measures the cost of the pause. It compares the answer to a
// subscribe request with a plain frame.
func BenchmarkSubscribed(b *testing.B) {
	f := subscribed(b, "r")
	for name, send := range map[string]func(s *Socket) error{
		"pause": func(s *Socket) error { return s.SendSubscribed("r", f) },
		"plain": func(s *Socket) error { return s.Send(f) },
	} {
		b.Run(name, func(b *testing.B) {
			server, client := tcpPair(b)
			s := NewGroup(Config{Wheel: wheel(b), WriteTimeout: 10 * time.Second}).New(server, new(handler))
			var ended sync.WaitGroup
			ended.Go(func() { _ = s.Run(b.Context()) })
			ended.Go(func() { _, _ = io.Copy(io.Discard, client.NetConn()) })
			b.ReportAllocs()
			for b.Loop() {
				for s.QueueBytes() > 1<<16 {
					time.Sleep(time.Microsecond)
				}
				if err := send(s); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			s.Cut()
			ended.Wait()
		})
	}
}

// tcpPausing returns a socket over TCP that does not run yet, in real time.
func tcpPausing(t *testing.T) *pausing {
	t.Helper()
	server, client := tcpPair(t)
	return &pausing{rig: prepareOn(t, new(handler), server, client, nil)}
}

// tcpPair returns the two ends of a WebSocket over TCP.
func tcpPair(tb testing.TB) (server, client *websocket.Conn) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	clientEnd, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	serverEnd, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	return upgrade(tb, serverEnd, clientEnd, false)
}

// poll returns the messages that the client received since the last call, in real time.
func (p *pausing) poll() []message {
	p.mu.Lock()
	defer p.mu.Unlock()
	got := p.received
	p.received = nil
	return got
}
