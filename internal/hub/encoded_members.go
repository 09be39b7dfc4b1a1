package hub

import "github.com/meshpresence/mesh/internal/wire"

const (
	// maxLoose bounds the members of a list that are not part of encodedMembers.
	// Each of them is its own piece of the text.
	maxLoose = 16
	// maxCut bounds the members that are cut off the end of encodedMembers. If more
	// would have to go, all of it is dropped and encoded again on demand.
	maxCut = 64
)

// encodedMembers is the encoded list of the first members of a room. Its text does
// not change, so that answers can share it. If some members come and go while the
// others stay, it is encoded once and makes up most of every answer.
type encodedMembers struct {
	n    int // members
	text []byte
}

// cut removes the members of the list from index i on, before the list changes.
func (e *encodedMembers) cut(list []*Member, i int) {
	if i >= e.n {
		return
	}
	if i == 0 || e.n-i > maxCut {
		*e = encodedMembers{}
		return
	}
	size := len(e.text)
	for _, m := range list[i:e.n] {
		size -= len(m.listed)
	}
	e.n, e.text = i, e.text[:size:size]
}

// encodeMembers encodes the members of a list.
func encodeMembers(list []*Member) encodedMembers {
	size := 0
	for _, m := range list {
		size += len(m.listed)
	}
	text := make([]byte, 0, size)
	for _, m := range list {
		text = append(text, m.listed...)
	}
	return encodedMembers{n: len(list), text: text}
}

// encodedList returns the first limit members (0 or less: all) as a JSON array. If conn is a member, it is always listed.
func (ms *members) encodedList(limit int, conn string) wire.Text {
	list := ms.list
	var self *Member // conn, if it is beyond the limit
	if limit > 0 && len(list) > limit {
		list = list[:limit]
		if i, ok := ms.at[conn]; ok && i >= limit {
			self = ms.list[i]
		}
	}
	if len(list)-ms.head.n > maxLoose {
		ms.head = encodeMembers(list)
	}
	head := ms.head
	if self != nil { // it takes the place of the last one
		list = list[:limit-1]
		head.cut(ms.list, len(list))
	}
	text := make(wire.Text, 0, len(list)-head.n+4)
	text = append(text, listOpen)
	if head.n > 0 {
		text = append(text, head.text)
	}
	for _, m := range list[head.n:] {
		text = append(text, m.listed)
	}
	if self != nil {
		text = append(text, self.listed)
	}
	if len(text) > 1 {
		text[1] = text[1][len(`,`):]
	}
	return append(text, listClose)
}

var listOpen, listClose = []byte(`[`), []byte(`]`)
