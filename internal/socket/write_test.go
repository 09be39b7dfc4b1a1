package socket

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

func TestFramesSentBeforeRunComeFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), nil)
		if err := r.Send(wire.AssignID("c1")); err != nil {
			t.Fatal(err)
		}
		r.PingNow() // too early
		r.start(false)
		synctest.Wait()
		r.PingNow()
		r.PingNow() // the first is not written yet
		r.read()
		for i := range 100 {
			if err := r.Send(push(t, "n", i)); err != nil {
				t.Fatal(err)
			}
		}
		got := r.got()
		if len(got) != 102 || got[0].Command != wire.PushAssignID || got[1].Command != wire.PushPing {
			t.Fatalf("got %d frames, first %v", len(got), got[:2])
		}
		for i, m := range got[2:] {
			if string(m.Payload) != fmt.Sprint(i) {
				t.Fatalf("frame %d is %s", i, m.Payload)
			}
		}
		if err := r.Run(t.Context()); !errors.Is(err, ErrAlreadyRun) {
			t.Errorf("second Run: %v", err)
		}
	})
}

func TestOnlySlowReadersAreClosed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		limit := func(c *Config) { c.QueueBytes = 10_000 }
		slow := prepare(t, new(handler), limit).start(false)
		quick := run(t, new(handler), limit)
		begun := time.Now()
		var err error
		sent := 0
		for err == nil {
			u := &wire.Update{Type: wire.UpdateJoin, RoomName: "r", ConnectionID: fmt.Sprint(sent), Epoch: "e"}
			if e := quick.SendUpdate(u); e != nil {
				t.Fatalf("quick: %v", e)
			}
			err = slow.SendUpdate(u)
			sent++
			synctest.Wait()
		}
		if !errors.Is(err, ErrClosed) || slow.QueueBytes() > 200 {
			t.Errorf("error %v, %d bytes still queued", err, slow.QueueBytes())
		}
		e := slow.end()
		if e.Cause != CauseSlow || e.Code != websocket.CloseTryAgainLater {
			t.Errorf("ended with %v, want slow, 1013", e)
		}
		if took := time.Since(begun); took > closeGrace+20*time.Millisecond {
			t.Errorf("took %v", took)
		}
		if n := len(quick.got()); n != sent {
			t.Errorf("quick got %d of %d", n, sent)
		}
		if c := slow.group.Counts(); c.Closes["slow"] != 1 || c.Dropped == 0 || c.Coalesced != 0 {
			t.Errorf("counted %+v", c)
		}
	})
}

func TestSlowReaderGetsTheCloseCode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), func(c *Config) { c.QueueBytes = 1000 }).start(false)
		for r.Send(push(t, "n", "0123456789")) == nil {
			synctest.Wait()
		}
		r.read()
		if code := r.clientCode(); code != websocket.CloseTryAgainLater {
			t.Errorf("client got close code %d, want 1013", code)
		}
	})
}

func TestStatesCoalesce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), func(c *Config) { c.QueueBytes = 20_000 }).start(false)
		last := make(map[string]uint64)
		var kept []uint64 // joins and leaves, none of which may be lost
		for seq := uint64(1); seq <= 2000; seq++ {
			u := state("r", fmt.Sprint("c", seq%7), seq)
			if seq%100 == 0 {
				u.Type = wire.UpdateJoin
				kept = append(kept, seq)
			} else {
				last[u.ConnectionID] = seq
			}
			if err := r.SendUpdate(u); err != nil {
				t.Fatalf("update %d: %v", seq, err)
			}
		}
		r.read()
		at := uint64(0)
		for _, m := range r.got() {
			var u struct {
				Type, ConnectionID string
				Seq                uint64
			}
			if err := json.Unmarshal(m.Payload, &u); err != nil {
				t.Fatal(err)
			}
			if u.Seq <= at {
				t.Fatalf("seq %d after %d", u.Seq, at)
			}
			at = u.Seq
			if u.Type == wire.UpdateJoin {
				if len(kept) == 0 || kept[0] != u.Seq {
					t.Fatalf("join %d, want first of %v", u.Seq, kept)
				}
				kept = kept[1:]
			} else if u.Seq == last[u.ConnectionID] {
				delete(last, u.ConnectionID)
			}
		}
		if len(kept) != 0 || len(last) != 0 {
			t.Errorf("lost joins %v, states %v", kept, last)
		}
		if r.QueueBytes() != 0 || r.group.Counts().Coalesced == 0 {
			t.Errorf("%d bytes queued, counted %+v", r.QueueBytes(), r.group.Counts())
		}
	})
}

func TestLargeFrameLeavesSpace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), func(c *Config) { c.QueueBytes = 2000 }).start(false)
		if err := r.Send(push(t, "snapshot", strings.Repeat("x", 100_000))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for range 5 {
			if err := r.SendUpdate(state("r", "c", 1)); err != nil {
				t.Fatal(err)
			}
		}
		r.read()
		if n := len(r.got()); n != 6 {
			t.Errorf("got %d frames, want 6", n)
		}
	})
}

func TestCommandsWaitWhileAnswersAreNotRead(t *testing.T) {
	t.Parallel()
	answer, send := (*Socket).Answer, (*Socket).Send
	for name, c := range map[string]struct {
		answer func(*Socket, *wire.Frame) error
		beside bool
	}{"the protocol's": {answer, false}, "the app's": {answer, true}, "the app's, by Send": {send, true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := new(handler)
				r := prepare(t, h, func(cfg *Config) { cfg.QueueBytes, cfg.HandlerConcurrency = 10_000, 1 })
				var done atomic.Int64
				do := func(context.Context, wire.Request) {
					done.Add(1)
					_ = c.answer(r.Socket, push(t, "snapshot", strings.Repeat("x", 4000)))
				}
				if h.command = do; c.beside {
					h.concurrent = do
				}
				r.start(false)
				for range 20 {
					r.say(`{"id":1,"command":"mesh/subscribe-presence"}`)
				}
				synctest.Wait()
				if done.Load() != 2 || r.Socket.ended() != nil {
					t.Fatalf("%d commands done, end %v, want 2: the queue is half full", done.Load(), r.Socket.ended())
				}
				r.read()
				if n := len(r.got()); n != 20 || done.Load() != 20 {
					t.Errorf("%d answers, %d commands done, want 20", n, done.Load())
				}
			})
		})
	}
}

func TestStuckWriteCloses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), func(c *Config) { c.WriteTimeout = 3 * time.Second }).start(false)
		begun := time.Now()
		_ = r.Send(push(t, "n", 1))
		e := r.end()
		if took := time.Since(begun); e.Cause != CauseStuck || took != 3*time.Second {
			t.Errorf("ended with %v after %v, want stuck after 3s", e, took)
		}
		if err := r.Send(push(t, "n", 2)); !errors.Is(err, ErrClosed) {
			t.Errorf("Send afterwards: %v", err)
		}
	})
}

func TestControlPingsAreAnswered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := prepare(t, h, nil)
		var pongs []string
		r.client.SetPongHandler(func(data string) error {
			pongs = append(pongs, data)
			return nil
		})
		r.start(false)
		for _, data := range []string{"a", "b", "c"} { // the first is being written when the others come
			_ = r.client.WriteControl(websocket.PingMessage, []byte(data), time.Now().Add(time.Minute))
			synctest.Wait()
		}
		r.read()
		synctest.Wait()
		if fmt.Sprint(pongs) != "[a c]" {
			t.Errorf("pongs %q, want one for the first and one for the last", pongs)
		}
		if h.seen.Load() != 3 {
			t.Errorf("%d frames seen, want 3", h.seen.Load())
		}
	})
}

func TestCompressionBombIsTooLarge(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		serverEnd, clientEnd := net.Pipe()
		server, client := upgrade(t, serverEnd, clientEnd, true)
		r := prepareOn(t, new(handler), server, client, func(c *Config) { c.FrameBytes = 10_000 }).start(true)
		_ = r.client.WriteMessage(websocket.TextMessage, []byte(strings.Repeat("x", 1_000_000)))
		if code := r.clientCode(); code != websocket.CloseMessageTooBig {
			t.Errorf("client got close code %d, want 1009", code)
		}
		if e := r.end(); e.Cause != CauseTooLarge {
			t.Errorf("ended with %v, want too large", e)
		}
	})
}
