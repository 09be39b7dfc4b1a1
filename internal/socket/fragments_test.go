package socket

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// The first bytes of frames.
const (
	opContinuation = 0x0
	opText         = 0x1
	opPong         = 0xa
)

// rawFrame returns a frame of a client as bytes, with a mask of zeros.
func rawFrame(first byte, payload string) []byte {
	b := []byte{first}
	switch n := len(payload); {
	case n < twoBytes:
		b = append(b, maskBit|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, maskBit|twoBytes), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, maskBit|eightBytes), uint64(n))
	}
	return append(append(b, 0, 0, 0, 0), payload...)
}

// inPieces returns a text message as fragments of a size.
func inPieces(text string, size int) []byte {
	var b []byte
	op := byte(opText)
	for piece := range slices.Chunk([]byte(text), size) {
		b = append(b, rawFrame(op, string(piece))...)
		op = opContinuation
	}
	return append(b, rawFrame(finBit|opContinuation, "")...)
}

// write makes the client write bytes, in any state of the connection.
func (r *rig) write(b []byte) error {
	_, err := r.client.NetConn().Write(b)
	return err
}

// Frames that never complete a message cannot keep the reader busy for long, with or
// without pongs, for any beginning of the message.
func TestFragmentsAreCounted(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		begin, repeat []byte
		tolerated     int // of repeat
	}{
		"empty fragments":              {rawFrame(opText, "x"), rawFrame(opContinuation, ""), 100},
		"empty from the first":         {nil, slices.Concat(rawFrame(opText, ""), rawFrame(finBit|opContinuation, "")), 50},
		"of a binary message":          {rawFrame(websocket.BinaryMessage, ""), rawFrame(opContinuation, ""), 99},
		"with pongs between":           {rawFrame(opText, "x"), slices.Concat(rawFrame(opContinuation, ""), rawFrame(finBit|opPong, "")), 50},
		"fragments of a byte":          {nil, slices.Concat(rawFrame(opText, " "), bytes.Repeat(rawFrame(opContinuation, " "), 999)), 20},
		"whole messages of empty ones": {nil, slices.Concat(rawFrame(opText, ""), rawFrame(opContinuation, ""), rawFrame(finBit|opContinuation, "")), 33},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := run(t, new(handler), func(c *Config) { c.CommandsPerSecond = 5 })
				if err := r.write(tt.begin); err != nil {
					t.Fatal(err)
				}
				repeat := tt.repeat
				for range tt.tolerated {
					if err := r.write(repeat); err != nil {
						t.Fatal(err)
					}
					if name == "fragments of a byte" {
						repeat = bytes.Repeat(rawFrame(opContinuation, " "), 1000)
					}
				}
				synctest.Wait()
				if r.Socket.ended() != nil {
					t.Fatal("closed already")
				}
				for range 10 {
					_ = r.write(repeat) // the connection may have been cut
				}
				if code := r.clientCode(); code != websocket.ClosePolicyViolation {
					t.Errorf("client got close code %d, want 1008", code)
				}
				if e := r.end(); e.Cause != CauseFlood {
					t.Errorf("ended with %v, want flood", e)
				}
			})
		})
	}
}

// A client may write its messages in small pieces: the largest message in pieces of four
// bytes at once, and 10,000 pieces a second.
func TestMessagesInSmallPieces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, func(c *Config) { c.CommandsPerSecond = 100 })
		h.command = func(_ context.Context, req wire.Request) {
			f, err := wire.Answer(req.ID, req.Command, len(req.Payload))
			if err != nil {
				t.Error(err)
			}
			_ = r.Send(f)
		}
		request := func(id, size int) string {
			text := fmt.Sprintf(`{"id":%d,"command":"mesh/noop","payload":"`, id)
			return text + strings.Repeat("x", size-len(text)-2) + `"}`
		}
		id := 0
		send := func(size, piece int) {
			t.Helper()
			id++
			if err := r.write(inPieces(request(id, size), piece)); err != nil {
				t.Fatal(err)
			}
			if got := r.got(); len(got) != 1 || got[0].code() != "" {
				t.Fatalf("%d bytes in pieces of %d: got %v, want an answer", size, piece, got)
			}
		}
		send(1<<16, 4)
		time.Sleep(2 * time.Second)
		for range 10 {
			send(5000, 1)
			time.Sleep(500 * time.Millisecond)
		}
		send(1<<16, 1000)
	})
}

func TestFragmentsWithoutLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := new(handler)
		r := run(t, h, nil)
		h.command = r.echo
		empty := bytes.Repeat(rawFrame(opContinuation, ""), emptyPerMessage)
		for range 20 {
			pieces := inPieces(`{"id":1,"command":"mesh/noop"`+strings.Repeat(" ", 5000)+`}`, 1)
			last := rawFrame(finBit|opContinuation, "")
			pieces = slices.Concat(pieces[:len(pieces)-len(last)], empty, last)
			if err := r.write(pieces); err != nil {
				t.Fatal(err)
			}
			if got := r.got(); len(got) != 1 || got[0].ID != "1" {
				t.Fatalf("got %v, want the answer", got)
			}
		}
		_ = r.write(slices.Concat(rawFrame(opText, "x"), empty, rawFrame(opContinuation, ""))) // the connection may have been cut
		if code := r.clientCode(); code != websocket.ClosePolicyViolation {
			t.Errorf("client got close code %d, want 1008: this message never ends", code)
		}
	})
}

// The fragments are found for any division of the bytes.
func TestFramingFindsEveryFragment(t *testing.T) {
	t.Parallel()
	var stream []byte
	var want []uint64
	for i := range 300 {
		size := []int{0, 1, 125, 126, 300, 1<<16 - 1, 1 << 16}[rand.IntN(7)]
		first := []byte{opContinuation, opText, finBit | opText, finBit | opContinuation, finBit | opPong}[i%5]
		if first == finBit|opPong {
			size = min(size, 125)
		}
		if first&(finBit|controlBit) == 0 {
			want = append(want, uint64(size))
		}
		stream = append(stream, rawFrame(first, strings.Repeat("\x01", size))...)
	}
	for _, most := range []int{1, 7, 4096, len(stream)} {
		var f framing
		var got []uint64
		for rest := stream; len(rest) > 0; {
			n := min(1+rand.IntN(most), len(rest))
			for p := rest[:n]; ; {
				more, size, ok := f.next(p)
				if !ok {
					break
				}
				got, p = append(got, size), more
			}
			rest = rest[n:]
		}
		if !slices.Equal(got, want) {
			t.Errorf("in chunks of up to %d bytes: found %d fragments, want %d", most, len(got), len(want))
		}
	}
}
