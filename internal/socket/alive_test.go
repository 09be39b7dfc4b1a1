package socket

import (
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/wire"
)

// commandsOf returns the commands of received messages.
func commandsOf(got []message) []string {
	var commands []string
	for _, m := range got {
		commands = append(commands, m.Command)
	}
	return commands
}

func TestPingsAlwaysCome(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := run(t, new(handler), func(c *Config) { c.PingInterval = 30 * time.Second })
		for i := range 5 {
			time.Sleep(29*time.Second + 900*time.Millisecond)
			if got := r.got(); len(got) != 0 {
				t.Fatalf("interval %d: got %v early", i, got)
			}
			r.say(`{"id":1,"command":"mesh/noop"}`) // a sign of life does not suppress a regular ping
			time.Sleep(100 * time.Millisecond)
			if got := r.got(); len(got) != 1 || got[0].Command != wire.PushPing || string(got[0].Payload) != "{}" {
				t.Fatalf("interval %d: got %v, want a ping", i, got)
			}
		}
	})
}

func TestMissedPongs(t *testing.T) {
	t.Parallel()
	for missed, want := range map[int]time.Duration{0: 20 * time.Second, 1: 30 * time.Second, 3: 50 * time.Second} {
		t.Run(fmt.Sprint(missed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := run(t, new(handler), func(c *Config) { c.PingInterval, c.MaxMissedPongs = 10*time.Second, missed })
				begun := time.Now()
				e := r.end()
				if took := time.Since(begun); e.Cause != CauseSilent || took != want {
					t.Errorf("ended with %v after %v, want silent after %v", e, took, want)
				}
				if r.clientCode() != websocket.CloseInternalServerErr {
					t.Error("the client got no close code")
				}
			})
		})
	}
}

func TestAnyFrameIsASignOfLife(t *testing.T) {
	t.Parallel()
	for name, frame := range map[string]func(r *rig){
		"pong":   func(r *rig) { r.say(`{"id":1,"command":"pong","payload":{}}`) },
		"noop":   func(r *rig) { r.say(`{"command":"mesh/noop"}`) },
		"junk":   func(r *rig) { r.say(`junk`) },
		"binary": func(r *rig) { _ = r.client.WriteMessage(websocket.BinaryMessage, nil) },
		"control": func(r *rig) {
			_ = r.client.WriteControl(websocket.PongMessage, nil, time.Now().Add(time.Minute))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := run(t, new(handler), func(c *Config) { c.PingInterval, c.MaxMissedPongs = 10*time.Second, 0 })
				time.Sleep(time.Second)
				for range 10 {
					time.Sleep(10 * time.Second)
					frame(r)
				}
				synctest.Wait()
				if e := r.Socket.ended(); e != nil {
					t.Errorf("ended with %v", e)
				}
			})
		})
	}
}

func TestNoSilenceAfterAStall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := wheel(t)
		r := run(t, new(handler), func(c *Config) {
			c.Wheel, c.PingInterval, c.MaxMissedPongs = w, 10*time.Second, 0
		})
		var stall clock.Timer
		w.Schedule(&stall, 15*time.Second, func() { time.Sleep(20 * time.Second) })
		time.Sleep(36 * time.Second)
		synctest.Wait()
		if e := r.Socket.ended(); e != nil {
			t.Fatalf("ended with %v although the clock stood still", e)
		}
		time.Sleep(10 * time.Second)
		if e := r.end(); e.Cause != CauseSilent {
			t.Errorf("ended with %v, want silent an interval later", e)
		}
	})
}

func TestExtraPings(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := run(t, new(handler), func(c *Config) { c.PingInterval, c.MaxMissedPongs = 30*time.Second, 0 })
		r.MinTTL(3 * time.Second)
		time.Sleep(4500 * time.Millisecond)
		if n := len(r.got()); n != 4 {
			t.Errorf("%d pings in 4.5 s of silence, want 4", n)
		}
		for range 10 { // no ping while frames come
			r.say(`{"id":1,"command":"pong"}`)
			time.Sleep(900 * time.Millisecond)
		}
		if got := r.got(); len(got) != 0 {
			t.Errorf("got %v although frames came", commandsOf(got))
		}
		r.MinTTL(6 * time.Second)
		time.Sleep(1200 * time.Millisecond) // 2.1 s after the last frame
		if n := len(r.got()); n != 1 {
			t.Errorf("%d pings after a third of the longer TTL, want 1", n)
		}
		r.MinTTL(0)
		time.Sleep(10 * time.Second)
		if n := len(r.got()); n != 0 {
			t.Errorf("%d pings without a TTL", n)
		}
		r.MinTTL(time.Hour) // the regular ones are enough
		time.Sleep(30 * time.Second)
		if n := len(r.got()); n != 1 {
			t.Errorf("%d pings in an interval, want the regular one", n)
		}
	})
}

func TestExtraPingsDoNotCountAsMissed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := run(t, new(handler), func(c *Config) { c.PingInterval, c.MaxMissedPongs = 10*time.Second, 0 })
		for range 10 {
			time.Sleep(9500 * time.Millisecond)
			r.say(`{"id":1,"command":"pong"}`)
			synctest.Wait()
			r.PingNow() // unanswered at the regular ping
			time.Sleep(500 * time.Millisecond)
		}
		if e := r.Socket.ended(); e != nil {
			t.Errorf("ended with %v", e)
		}
		if n := len(r.got()); n != 20 {
			t.Errorf("%d pings, want 20", n)
		}
	})
}

func TestLatency(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := run(t, new(handler), func(c *Config) { c.LatencyInterval = 5 * time.Second })
		r.say(`{"id":1,"command":"latency:response","payload":{}}`) // a response without a request
		time.Sleep(5 * time.Second)
		if got := r.got(); len(got) != 1 || got[0].Command != wire.PushLatencyRequest || string(got[0].Payload) != "{}" {
			t.Fatalf("got %v, want a latency request", got)
		}
		time.Sleep(123 * time.Millisecond)
		r.say(`{"id":2,"command":"latency:response","payload":{}}`)
		if got := r.got(); len(got) != 1 || got[0].Command != wire.PushLatency || string(got[0].Payload) != "123" {
			t.Fatalf("got %v, want a latency of 123", got)
		}
		time.Sleep(10 * time.Second) // answered after the next request
		r.say(`{"id":3,"command":"latency:response"}`)
		r.say(`{"id":4,"command":"latency:response"}`)
		got := r.got()
		if len(got) != 3 || string(got[2].Payload) != "5123" {
			t.Fatalf("got %v, want two requests and a latency of 5123", got)
		}
	})
}

// quickPeer is a connection whose peer answers before the write of the request returns.
// This happens on a busy machine, where the writer waits for a processor after its system
// call.
type quickPeer struct {
	net.Conn
	answer func()
}

func (q *quickPeer) Write(p []byte) (int, error) {
	n, err := q.Conn.Write(p)
	if q.answer != nil && err == nil && p[0]&0xf == websocket.TextMessage { // after a close frame a client sends no more
		q.answer()
		time.Sleep(20 * time.Millisecond)
	}
	return n, err
}

func TestAnswerBeforeTheWriteReturns(t *testing.T) {
	t.Parallel()
	quick := func(t *testing.T, answer string, change func(*Config)) *rig {
		serverEnd, clientEnd := net.Pipe()
		peer := &quickPeer{Conn: serverEnd}
		server, client := upgrade(t, peer, clientEnd, false)
		r := prepareOn(t, new(handler), server, client, change)
		peer.answer = func() { r.say(answer) }
		return r.start(true)
	}
	t.Run("pong", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			r := quick(t, `{"id":1,"command":"pong"}`, func(c *Config) { c.PingInterval, c.MaxMissedPongs = time.Second, 0 })
			time.Sleep(10*time.Second + time.Second/2)
			if n := len(r.got()); n != 10 {
				t.Errorf("%d pings, want 10: who answers each is not silent", n)
			}
		})
	})
	t.Run("latency", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			r := quick(t, `{"id":1,"command":"latency:response"}`, func(c *Config) { c.LatencyInterval = time.Second })
			time.Sleep(2*time.Second + time.Second/2)
			got := r.got()
			if len(got) != 4 || string(got[1].Payload) != "0" || string(got[3].Payload) != "0" {
				t.Errorf("got %v, want two requests, and a latency of 0 after each", got)
			}
		})
	})
}

// Frames that wait to be written when pings are due do not count as a write that does not
// return, however long ago the last write was.
func TestWritesThatHaveNotBegun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := run(t, new(handler), func(c *Config) {
			c.WriteTimeout, c.PingInterval, c.MaxMissedPongs = 5*time.Second, time.Minute, 1000
		})
		for range 100 {
			time.Sleep(20 * time.Second)
			r.PingNow() // usually its write has not begun when onPing is called
			r.onPing()
			if e := r.Socket.ended(); e != nil {
				t.Fatal(e)
			}
		}
	})
}
