package socket

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

// written is one write of a network connection.
type written struct {
	at   time.Time
	data string
}

// recorder records the writes of a network connection.
type recorder struct {
	net.Conn
	mu  sync.Mutex // guards all
	all []written
}

func (r *recorder) Write(p []byte) (int, error) {
	n, err := r.Conn.Write(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, written{time.Now(), string(p)})
	return n, err
}

// take returns the writes since the last call.
func (r *recorder) take() []written {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.all
	r.all = nil
	return all
}

// subscribed returns the answer to a subscribe request.
func subscribed(t testing.TB, room string) *wire.Frame {
	f, err := wire.Answer("1", wire.CommandSubscribePresence, "answer "+room)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// pausing is a socket whose writes are recorded.
type pausing struct {
	*rig
	writes *recorder
}

// pausingRig returns a socket that does not run yet.
func pausingRig(t *testing.T, compress bool, change func(*Config)) *pausing {
	t.Helper()
	serverEnd, clientEnd := net.Pipe()
	rec := &recorder{Conn: serverEnd}
	server, client := upgrade(t, rec, clientEnd, compress)
	r := prepareOn(t, new(handler), server, client, change)
	rec.take()
	return &pausing{r, rec}
}

// text returns the frames in order, as short names. The name of an update is its room and
// number.
func text(got []message) string {
	var names []string
	for _, m := range got {
		var u struct {
			RoomName string
			Seq      uint64
		}
		switch {
		case m.ID != "":
			var name string
			_ = json.Unmarshal(m.Payload, &name)
			names = append(names, name)
		case m.Command == wire.PushPresenceUpdate && json.Unmarshal(m.Payload, &u) == nil:
			names = append(names, fmt.Sprint(u.RoomName, u.Seq))
		default:
			names = append(names, m.Command)
		}
	}
	return strings.Join(names, ", ")
}

func (p *pausing) subscribe(room string) {
	p.t.Helper()
	if err := p.SendSubscribed(room, subscribed(p.t, room)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pausing) tell(room string, seq uint64) {
	p.t.Helper()
	if err := p.SendUpdate(state(room, "c", seq)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pausing) expect(want string) {
	p.t.Helper()
	if got := text(p.got()); got != want {
		p.t.Fatalf("got %s, want %s", got, want)
	}
}

// After AwaitUpdates no update of the room is held back, so that frames keep their order.
func TestAwaitUpdates(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, nil)
		if err := p.AwaitUpdates(t.Context(), "r"); err != nil {
			t.Fatal(err)
		}
		p.subscribe("r")
		p.tell("r", 1)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if err := p.AwaitUpdates(ended, "r"); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if err := p.AwaitUpdates(t.Context(), "other"); err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() {
			err := p.AwaitUpdates(t.Context(), "r")
			if err == nil {
				err = p.Send(push(t, "after", 0))
			}
			done <- err
		}()
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatal("it does not wait: ", err)
		default:
		}
		p.start(true)
		began := time.Now()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if waited := time.Since(began); waited < updatePause {
			t.Fatal("it waited only ", waited)
		}
		synctest.Wait()
		p.expect("answer r, r1, after")
	})
}

// The answers to subscribe requests are never written together with other frames, for any
// frames around them and any size.
func TestAnswerIsWrittenByItself(t *testing.T) {
	t.Parallel()
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprint("compressed=", compress), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := pausingRig(t, compress, nil)
				for i := range 20 {
					for range 3 {
						_ = p.Send(push(t, "other", i))
					}
					if i < 10 {
						p.subscribe(fmt.Sprint("r", i))
						p.subscribe(fmt.Sprint("s", i))
					}
				}
				p.start(true)
				answers := 0
				for _, w := range p.writes.take() {
					n := strings.Count(w.data, `"answer `)
					if answers += n; n > 0 && (n > 1 || strings.Contains(w.data, "other")) {
						t.Errorf("an answer shares its write: %q", w.data)
					}
				}
				if answers != 20 {
					t.Errorf("%d answers written, want 20", answers)
				}
				if got := p.got(); len(got) != 80 {
					t.Errorf("%d frames came, want 80", len(got))
				}
			})
		})
	}
}

// The updates of the room wait until five milliseconds after the answer was written, not
// after it was queued. Nothing else waits.
func TestUpdatesWaitAfterTheAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, nil)
		p.tell("r", 1) // of an earlier subscription
		p.subscribe("r")
		p.tell("r", 2)
		p.tell("q", 1)
		time.Sleep(time.Second) // the answer is not written yet
		p.start(true)
		p.expect("r1, answer r, q1")
		p.tell("r", 3)
		_ = p.Send(push(t, "other", nil))
		p.expect("other")
		time.Sleep(updatePause - 1)
		p.tell("r", 4)
		p.expect("")
		time.Sleep(time.Nanosecond)
		p.expect("r2, r3, r4")
		p.tell("r", 5)
		p.expect("r5")
		if p.pauses != nil || p.QueueBytes() != 0 {
			t.Errorf("pauses %v, %d bytes queued, want none", p.pauses, p.QueueBytes())
		}
	})
}

// Pauses do not wait for each other, on one socket or on several.
func TestManyPausesAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, nil)
		p.start(true)
		begun := time.Now()
		for i := range 95 {
			p.subscribe(fmt.Sprint("r", i))
			p.tell(fmt.Sprint("r", i), 1)
		}
		if got := p.got(); len(got) != 95 {
			t.Fatalf("%d frames came at once, want 95 answers", len(got))
		}
		time.Sleep(updatePause)
		if got := p.got(); len(got) != 95 {
			t.Errorf("%d updates came, want 95", len(got))
		}
		if took := time.Since(begun); took != updatePause || p.QueueBytes() != 0 {
			t.Errorf("%d bytes still wait after %v", p.QueueBytes(), took)
		}
	})
}

// Waiting updates count for QueueBytes, states coalesce, and if too much waits, the
// connection is closed as slow.
func TestPauseIsLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const limit = 8000
		p := pausingRig(t, false, func(c *Config) { c.QueueBytes = limit })
		p.start(true)
		p.subscribe("r")
		for seq := range uint64(1000) {
			p.tell("r", seq+1)
			if p.QueueBytes() > limit {
				t.Fatalf("%d bytes wait", p.QueueBytes())
			}
		}
		time.Sleep(updatePause)
		got := text(p.got())
		if !strings.HasSuffix(got, "r1000") || p.QueueBytes() != 0 || p.group.Counts().Coalesced == 0 {
			t.Errorf("got …%s, %d bytes queued, %+v", got[max(len(got)-40, 0):], p.QueueBytes(), p.group.Counts())
		}
		p.subscribe("r")
		var err error
		for seq := uint64(0); err == nil && seq < 1000; seq++ {
			u := state("r", fmt.Sprint("c", seq), seq)
			u.Type = wire.UpdateJoin
			err = p.SendUpdate(u)
		}
		if err == nil || p.end().Cause != CauseSlow || p.QueueBytes() != 0 {
			t.Errorf("%v: want the end of a slow connection; %d bytes queued", err, p.QueueBytes())
		}
	})
}

// A second answer for the room drops the updates that wait for the first one's pause, and
// begins a pause of its own. Both answers are sent.
func TestSubscribedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, nil)
		p.subscribe("r")
		p.tell("r", 1)
		p.subscribe("r")
		p.tell("r", 2)
		p.start(true)
		p.expect("answer r, answer r")
		time.Sleep(updatePause - 1)
		p.subscribe("r") // during the pause
		p.tell("r", 3)
		p.expect("answer r")
		time.Sleep(time.Nanosecond)
		p.expect("")
		time.Sleep(updatePause - 1)
		p.expect("r3")
	})
}

// No more updates of the room come, and those of another subscription wait for its own
// answer.
func TestUnsubscribedInAPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, nil)
		p.start(true)
		p.subscribe("r")
		p.subscribe("q")
		p.tell("r", 1)
		p.tell("q", 1)
		p.Unsubscribed("r")
		p.Unsubscribed("r")
		p.Unsubscribed("unknown")
		p.expect("answer r, answer q")
		time.Sleep(time.Second)
		p.expect("q1")
		if p.pauses != nil || p.QueueBytes() != 0 {
			t.Errorf("pauses %v, %d bytes queued, want none", p.pauses, p.QueueBytes())
		}
	})
}

// A thousand members join within the pause after a large answer, and publish as fast as
// they can. That closes no client that reads.
func TestBusyRoomInAPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := pausingRig(t, false, func(c *Config) { c.QueueBytes = 1 << 20 })
		p.start(true)
		f, err := wire.Answer("1", wire.CommandSubscribePresence, strings.Repeat("x", 600_000))
		if err != nil {
			t.Fatal(err)
		}
		if err := p.SendSubscribed("r", f); err != nil {
			t.Fatal(err)
		}
		p.got() // it has been read
		const members, states = 1000, 20
		metadata, sent := json.RawMessage(`"`+strings.Repeat("m", 500)+`"`), 0
		for i := range members * (1 + states) {
			u := state("r", fmt.Sprint("c", i%members), uint64(i+1))
			if i < members {
				u.Type, u.State, u.Metadata = wire.UpdateJoin, nil, metadata
			}
			if err := p.SendUpdate(u); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(updatePause)
		for _, m := range p.got() {
			if m.Command == wire.PushPresenceUpdate {
				sent++
			}
		}
		if sent < 2*members || p.QueueBytes() != 0 || p.Socket.ended() != nil {
			t.Errorf("sent %d updates, want at least one join and one state of each; %d bytes are left", sent, p.QueueBytes())
		}
	})
}
