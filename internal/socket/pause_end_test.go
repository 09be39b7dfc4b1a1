package socket

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// Updates that wait are written after the pause, before the close frame.
func TestCloseInAPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, nil)
		p.start(true)
		p.subscribe("r")
		p.tell("r", 1)
		synctest.Wait()
		begun := time.Now()
		p.Close(websocket.CloseServiceRestart, "")
		if code := p.clientCode(); code != websocket.CloseServiceRestart {
			t.Errorf("close code %d", code)
		}
		if took := time.Since(begun); took != updatePause {
			t.Errorf("closed after %v, want %v", took, updatePause)
		}
		p.expect("answer r, r1")
		p.end()
	})
}

// A pause without waiting updates does not delay the close frame.
func TestCloseInAnEmptyPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, nil)
		p.start(true)
		p.subscribe("r")
		synctest.Wait()
		begun := time.Now()
		p.Close(websocket.CloseNormalClosure, "")
		p.clientCode()
		p.end()
		if took := time.Since(begun); took != 0 {
			t.Errorf("closed after %v", took)
		}
	})
}

// The end of a connection waits for no pause, in any order of events, and nothing is
// left.
func TestPeerEndsInAPause(t *testing.T) {
	t.Parallel()
	goodbye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	for name, end := range map[string]func(p *pausing){
		"close frame":       func(p *pausing) { _ = p.client.WriteMessage(websocket.CloseMessage, goodbye) },
		"broken":            func(p *pausing) { _ = p.client.Close() },
		"cut":               func(p *pausing) { p.Cut() },
		"context":           func(p *pausing) { p.release() },
		"closed, then peer": func(p *pausing) { p.Close(1001, ""); _ = p.client.WriteMessage(websocket.CloseMessage, goodbye) },
		"closed, then gone": func(p *pausing) { p.Close(1001, ""); _ = p.client.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := pausingRig(t, false, nil)
				p.start(true)
				p.subscribe("r")
				p.tell("r", 1)
				synctest.Wait()
				begun := time.Now()
				end(p)
				p.Socket.group.Wait()
				p.end()
				if took := time.Since(begun); took > updatePause {
					t.Errorf("ended after %v", took)
				}
				time.Sleep(time.Second)
				synctest.Wait()
				if p.pauses != nil || p.QueueBytes() != 0 || p.group.pauses.armed {
					t.Errorf("pauses %v, %d bytes queued, line armed: %v", p.pauses, p.QueueBytes(), p.group.pauses.armed)
				}
			})
		})
	}
}

// A peer that never reads the answer gets no update, and its connection ends in the usual
// time.
func TestStuckPeerInAPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, nil)
		p.start(false)
		p.subscribe("r")
		p.tell("r", 1)
		time.Sleep(5 * time.Second)
		if p.QueueBytes() == 0 || p.group.pauses.armed {
			t.Fatal("an update has not waited for the answer")
		}
		if cause := p.end().Cause; cause != CauseStuck {
			t.Errorf("ended as %v", cause)
		}
	})
}
