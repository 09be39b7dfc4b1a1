package socket

import (
	"encoding/binary"
	"errors"
	"time"
)

// fragmentsPerSecond limits the rate of fragments of a connection. It is far above the
// needs of a client that writes a message in small pieces: the largest message that
// FrameBytes allows by default may come at once in pieces of four bytes.
const fragmentsPerSecond = 10_000

// emptyPerMessage limits the fragments without content of one message, whatever the other
// limits are. Otherwise a message could go on forever without getting longer.
const emptyPerMessage = 2_000

// errFlood ends reading: the connection sent more fragments than allowed.
var errFlood = errors.New("mesh: too many frames")

// framing finds the frames in a stream of bytes. The websocket package returns whole
// messages and does not report the frames between. It would read empty ones for as long
// as they come.
type framing struct {
	head [14]byte // of the current frame: two bytes, the length, the mask
	have uint8    // bytes of head that have come
	left uint64   // bytes of the payload that are still to come

	empty int // fragments without content in the current message
}

const (
	finBit      = 0x80
	controlBit  = 0x08
	maskBit     = 0x80
	lengthBits  = 0x7f
	twoBytes    = 126 // the length is in the next two bytes
	eightBytes  = 127 // or in the next eight
	maskBytes   = 4
	shortHead   = 2
	mediumExtra = 2
	longExtra   = 8
)

// headSize returns the length of the current head, as far as it is known.
func (f *framing) headSize() uint8 {
	if f.have < shortHead {
		return shortHead
	}
	size := uint8(shortHead)
	switch f.head[1] & lengthBits {
	case twoBytes:
		size += mediumExtra
	case eightBytes:
		size += longExtra
	}
	if f.head[1]&maskBit != 0 {
		size += maskBytes
	}
	return size
}

// payload returns the length in a complete head.
func (f *framing) payload() uint64 {
	switch n := f.head[1] & lengthBits; n {
	case twoBytes:
		return uint64(binary.BigEndian.Uint16(f.head[shortHead:]))
	case eightBytes:
		return binary.BigEndian.Uint64(f.head[shortHead:])
	default:
		return uint64(n)
	}
}

// next reads p until the head of a fragment is complete. A fragment is a data frame that
// other frames of its message follow. next returns the rest of p and the length of the
// fragment's payload, or false if no other fragment begins in p.
func (f *framing) next(p []byte) (rest []byte, size uint64, ok bool) {
	for len(p) > 0 {
		if f.left > 0 {
			n := min(uint64(len(p)), f.left)
			f.left -= n
			p = p[n:]
			continue
		}
		f.head[f.have] = p[0]
		f.have++
		p = p[1:]
		if f.have < f.headSize() {
			continue
		}
		f.have, f.left = 0, f.payload()
		switch f.head[0] & (finBit | controlBit) {
		case finBit: // the message is complete
			f.empty = 0
		case 0:
			if f.left == 0 {
				f.empty++
			}
			return p, f.left, true
		}
	}
	return nil, 0, false
}

// count counts the fragments in the bytes read, and returns errFlood if there are too
// many. The last frame of each message counts as the message, and control frames are
// counted elsewhere. A fragment without content counts like a message, because no client
// has a reason to send it.
//
// Fragments can be counted only on connections that were upgraded here. The bytes of
// other connections are not seen.
func (s *Socket) count(p []byte) error {
	var now time.Time
	for {
		rest, size, ok := s.framing.next(p)
		if !ok {
			return nil
		}
		if now.IsZero() {
			now = time.Now()
		}
		switch {
		case size == 0 && (!s.frameLimit.Take(now) || s.framing.empty > emptyPerMessage):
			return errFlood
		case size > 0 && !s.fragmentLimit.Take(now):
			return errFlood
		}
		p = rest
	}
}
