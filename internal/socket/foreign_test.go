package socket

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/gorilla/websocket"
)

// readRaw makes the client read n messages and returns them with their kinds.
func (r *rig) readRaw(n int) (got []string) {
	r.t.Helper()
	for range n {
		kind, data, err := r.client.ReadMessage()
		if err != nil {
			r.t.Fatalf("after %q: %v", got, err)
		}
		got = append(got, fmt.Sprint(kind, " ", string(data)))
	}
	return got
}

func TestMessagesKeepTheirOrderAmongFrames(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), nil).start(false)
		var want []string
		for i := range 50 {
			for _, err := range []error{
				r.Send(push(t, "n", i)),
				r.SendMessage(websocket.TextMessage, fmt.Append(nil, "line ", i)),
				r.SendMessage(websocket.BinaryMessage, []byte{byte(i), 0xff}),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			want = append(want, fmt.Sprintf(`1 {"command":"n","payload":%d}`, i), fmt.Sprint("1 line ", i), "2 "+string([]byte{byte(i), 0xff}))
		}
		if got := r.readRaw(len(want)); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("got %q, want %q", got, want)
		}
		synctest.Wait() // the writer has accounted for them
		if n := r.QueueBytes(); n > 0 {
			t.Errorf("%d bytes still queued", n)
		}
	})
}

// Messages without content also count while they wait for a slow reader.
func TestMessagesToASlowReaderAreLimited(t *testing.T) {
	t.Parallel()
	for name, data := range map[string][]byte{"empty": nil, "small": []byte("x"), "large": make([]byte, 3000)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const limit = 10_000
				r := prepare(t, new(handler), func(c *Config) { c.QueueBytes = limit }).start(false)
				sent := 0
				for r.SendMessage(websocket.BinaryMessage, data) == nil {
					if sent++; sent > limit/leastCharge {
						t.Fatalf("%d messages wait", sent)
					}
				}
				if sent < 3 {
					t.Errorf("only %d messages could wait", sent)
				}
				var err error
				for err == nil {
					_, _, err = r.client.ReadMessage()
				}
				if !websocket.IsCloseError(err, websocket.CloseTryAgainLater) {
					t.Errorf("client got %v, want 1013", err)
				}
				if e := r.end(); e.Cause != CauseSlow {
					t.Errorf("ended with %v, want slow", e)
				}
			})
		})
	}
}

func TestNoMessageAfterClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, new(handler), nil).start(false)
		if err := r.SendMessage(websocket.TextMessage, []byte("before")); err != nil {
			t.Fatal(err)
		}
		r.Close(4000, "bye")
		if err := r.SendMessage(websocket.TextMessage, []byte("after")); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		if got := r.readRaw(1); got[0] != "1 before" {
			t.Errorf("got %q", got)
		}
		if _, _, err := r.client.ReadMessage(); !websocket.IsCloseError(err, 4000) {
			t.Errorf("then %v, want the close frame", err)
		}
	})
}
