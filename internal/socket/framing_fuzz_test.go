package socket

import (
	"encoding/binary"
	"testing"
)

// FuzzFraming feeds bytes to framing in pieces, and compares the result with a reading of
// the whole.
func FuzzFraming(f *testing.F) {
	f.Add([]byte("\x01\x80\x00\x00\x00\x00\x00\x80\x00\x00\x00\x00\x80\x80\x00\x00\x00\x00"), []byte{1, 2, 3})
	f.Add([]byte("\x01\xfe\x00\x03\x01\x02\x03\x04abc\x89\x00\x00\x01x"), []byte{5})
	f.Add([]byte("\x02\x7f\x00\x00\x00\x00\x00\x00\x00\x02ab\x00\x00"), []byte{9, 1})
	f.Add([]byte("\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00rest"), []byte{0})
	f.Fuzz(func(t *testing.T, stream, cuts []byte) {
		var in framing
		var got []uint64
		for at, i := 0, 0; at < len(stream); i++ {
			n := len(stream) - at
			if len(cuts) > 0 {
				n = min(n, int(cuts[i%len(cuts)])%16+1)
			}
			piece := stream[at : at+n]
			for {
				rest, size, ok := in.next(piece)
				if !ok {
					break
				}
				got = append(got, size)
				piece = rest
			}
			at += n
		}
		want, empty := fragmentsOf(stream)
		if len(got) != len(want) || in.empty != empty {
			t.Fatalf("got %v and %d empty, want %v and %d", got, in.empty, want, empty)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("got %v, want %v", got, want)
			}
		}
	})
}

// fragmentsOf returns the lengths of the fragments with complete heads, and the number of
// empty ones in the current message.
func fragmentsOf(b []byte) (sizes []uint64, empty int) {
	for len(b) >= 2 {
		final, control := b[0]&0x80 != 0, b[0]&0x08 != 0
		masked, size := b[1]&0x80 != 0, uint64(b[1]&0x7f)
		b = b[2:]
		switch {
		case size == 126 && len(b) < 2, size == 127 && len(b) < 8:
			return sizes, empty
		case size == 126:
			size, b = uint64(binary.BigEndian.Uint16(b)), b[2:]
		case size == 127:
			size, b = binary.BigEndian.Uint64(b), b[8:]
		}
		if masked {
			if len(b) < 4 {
				return sizes, empty
			}
			b = b[4:]
		}
		switch {
		case final && !control:
			empty = 0
		case !final && !control:
			sizes = append(sizes, size)
			if size == 0 {
				empty++
			}
		}
		b = b[min(size, uint64(len(b))):]
	}
	return sizes, empty
}
