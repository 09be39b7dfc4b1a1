package socket

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// Above QueueBytes nothing is read. For that time the peer counts as alive.
func TestReaderWaitsForSpace(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"payload": `{"id":%d,"command":"a","payload":"` + strings.Repeat("x", 600) + `"}`,
		"padding": `{"id":%d,"command":"a","payload":{}` + strings.Repeat(" ", 600) + `}`,
		"name":    `{"id":%d,"command":"a ` + strings.Repeat("x", 600) + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := runFloor(t, func(c *Config) { c.QueueBytes, c.PingInterval = 4000, time.Second })
				const n = 12
				done := make(chan struct{})
				go func() {
					defer close(done)
					for i := range n {
						_ = f.r.client.WriteMessage(websocket.TextMessage, fmt.Appendf(nil, text, i))
					}
				}()
				for range 60 {
					time.Sleep(time.Second) // no pong is read
				}
				f.r.Socket.mu.Lock()
				bytes := f.r.commands.bytes
				f.r.Socket.mu.Unlock()
				if bytes > 4000 || bytes < 3000 || f.r.Socket.ended() != nil || f.r.group.Counts().Paused != 1 {
					t.Fatalf("%d bytes wait, end %v, paused %d times", bytes, f.r.Socket.ended(), f.r.group.Counts().Paused)
				}
				seen := f.h().seen.Load()
				f.end()
				<-done
				var answers int
				for _, m := range f.r.got() {
					if m.Command != wire.PushPing {
						answers++
					}
				}
				if answers != n || seen < 60 {
					t.Errorf("%d answers, want %d; %d signs of life while nothing was read", answers, n, seen)
				}
				f.idle()
				time.Sleep(5 * time.Second) // now it is silent
				if e := f.r.end(); e.Cause != CauseSilent {
					t.Errorf("ended with %v, want silent", e)
				}
			})
		})
	}
}

func (f *floor) h() *handler { return f.handler }

// If the reader waits and no command makes progress, the connection is closed, because
// its peer may have gone.
func TestReaderWaitIsLimited(t *testing.T) {
	t.Parallel()
	for name, pings := range map[string]time.Duration{"pings": time.Second, "no pings": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := runFloor(t, func(c *Config) { c.QueueBytes, c.PingInterval = 1000, pings })
				for i := range 4 {
					go func() {
						_ = f.r.client.WriteMessage(websocket.TextMessage, fmt.Appendf(nil, `{"id":%d,"command":"a"}`, i))
					}()
					synctest.Wait()
				}
				begun := time.Now()
				e := f.r.end()
				if e.Cause != CauseSlow || e.Code != websocket.CloseTryAgainLater {
					t.Errorf("ended with %v, want slow", e)
				}
				if took := time.Since(begun); took < stopLimit || took > stopLimit+5*time.Second {
					t.Errorf("after %v", took)
				}
			})
		})
	}
}

// Unread frames say nothing about the network, so the wait of the reader is not reported
// as latency.
func TestLatencyExcludesTheReadersWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := runFloor(t, func(c *Config) { c.QueueBytes, c.LatencyInterval = 1000, time.Second })
		say := func(text string) {
			go func() { _ = f.r.client.WriteMessage(websocket.TextMessage, []byte(text)) }()
			synctest.Wait()
		}
		for i := range 4 {
			say(fmt.Sprintf(`{"id":%d,"command":"a"}`, i))
		}
		time.Sleep(1500 * time.Millisecond)
		say(`{"id":9,"command":"latency:response","payload":{}}`)
		time.Sleep(10 * time.Second)
		f.end()
		say(`{"id":9,"command":"latency:response","payload":{}}`)
		time.Sleep(time.Second)
		say(`{"id":9,"command":"latency:response","payload":{}}`)
		var latencies []string
		for _, m := range f.r.got() {
			if m.Command == wire.PushLatency {
				latencies = append(latencies, string(m.Payload))
			}
		}
		if len(latencies) != 1 || len(latencies[0]) > 3 {
			t.Errorf("got latencies %v, want one, that of the request after the wait", latencies)
		}
	})
}

// While answers are not read, only a few commands prepare a large answer at once. They do
// not close the connection.
func TestLargeAnswersAreLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := prepare(t, h, func(c *Config) { c.QueueBytes = 32 << 10 })
		var mu sync.Mutex
		gathered := 0
		h.order = func(req *wire.Request) Order { return Order{Line: req.ID} }
		h.attempt = func(ctx context.Context, req wire.Request, _ bool) Begun {
			if err := AwaitAnswerSlot(ctx); err != nil {
				return Begun{}
			}
			_ = AwaitAnswerSlot(ctx) // one call is enough
			mu.Lock()
			gathered++
			mu.Unlock()
			req.Payload = fmt.Appendf(nil, "%q", strings.Repeat("x", 20_000))
			r.echo(ctx, req)
			return Begun{}
		}
		r.start(false)
		const n = 40
		for i := range n {
			r.say(fmt.Sprintf(`{"id":%d,"command":"list"}`, i))
		}
		synctest.Wait()
		mu.Lock()
		if gathered > answerSlots || r.Socket.ended() != nil {
			t.Fatalf("%d answers gathered, end %v", gathered, r.Socket.ended())
		}
		mu.Unlock()
		r.read()
		if got := r.got(); len(got) != n {
			t.Errorf("%d answers, want %d", len(got), n)
		}
		if r.QueueBytes() != 0 || r.answers != 0 {
			t.Errorf("%d bytes, %d of answers are left", r.QueueBytes(), r.answers)
		}
		if err := AwaitAnswerSlot(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Updates still close a connection that does not read, whatever answers wait.
func TestUpdatesCloseBesideAnswers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), func(c *Config) { c.QueueBytes = 1000 }).start(false)
		for range 10 {
			if err := r.Answer(push(t, "a", strings.Repeat("x", 400))); err != nil {
				t.Fatal(err)
			}
		}
		for n := 0; ; n++ {
			if err := r.Send(push(t, "u", strings.Repeat("x", 50))); err != nil {
				if n < 4 || n > 8 {
					t.Errorf("closed after %d updates: half of the queue is theirs", n)
				}
				break
			}
		}
		if e := r.Socket.ended(); e.Cause != CauseSlow {
			t.Errorf("ended with %v", e)
		}
	})
}

// Updates alone do not block the commands of a client. A client that reads slowly in a
// busy room can still leave it.
func TestUpdatesDoNotStopCommands(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := prepare(t, h, func(c *Config) { c.QueueBytes = 64 << 10 })
		var begun atomic.Int64
		h.command = func(ctx context.Context, req wire.Request) {
			begun.Add(1)
			r.echo(ctx, req)
		}
		r.start(false)
		for i := 0; r.QueueBytes() < 40<<10; i++ { // each of another member, so that they do not coalesce
			if err := r.SendUpdate(state("r", fmt.Sprint("c", i), 1)); err != nil {
				t.Fatal(err)
			}
		}
		before := r.QueueBytes()
		for i := range 100 {
			r.say(fmt.Sprintf(`{"id":%d,"command":"leave"}`, i))
		}
		synctest.Wait()
		// The answers are limited too.
		if n, grown := begun.Load(), r.QueueBytes()-before; n < 10 || n == 100 || grown > 4<<10 || r.Socket.ended() != nil {
			t.Errorf("%d commands were begun, %d bytes more wait, end %v", n, grown, r.Socket.ended())
		}
		r.read()
		r.got()
		if n := begun.Load(); n != 100 || r.QueueBytes() != 0 {
			t.Errorf("%d commands were begun, %d bytes are left", n, r.QueueBytes())
		}
	})
}
