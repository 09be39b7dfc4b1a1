package hub

import "github.com/meshpresence/mesh/internal/wire"

const (
	// mostLoose is how many members a list may hold beyond a run, each a piece of
	// its own.
	mostLoose = 16
	// mostCut is how many members are taken off the end of a run; where more would
	// have to be, all of it is put together anew when somebody wants it.
	mostCut = 64
)

// run is the first members of a roster as views list them, put together. Its
// text does not change, so that answers can share it. In a room in which some
// come and go and the others stay it is made once, and is most of every answer.
type run struct {
	n    int // members
	text []byte
}

// cut takes off the members of the list from index i on, before it changes.
func (r *run) cut(list []*Member, i int) {
	if i >= r.n {
		return
	}
	if i == 0 || r.n-i > mostCut {
		*r = run{}
		return
	}
	size := len(r.text)
	for _, m := range list[i:r.n] {
		size -= len(m.listed)
	}
	r.n, r.text = i, r.text[:size:size]
}

// runOf puts the members of a list together.
func runOf(list []*Member) run {
	size := 0
	for _, m := range list {
		size += len(m.listed)
	}
	text := make([]byte, 0, size)
	for _, m := range list {
		text = append(text, m.listed...)
	}
	return run{n: len(list), text: text}
}

// present returns the first limit members (0 or less: all) as JSON, [{"id",
// "metadata"}]. Conn is one of them if it is a member at all.
func (r *roster) present(limit int, conn string) wire.Text {
	list := r.list
	var self *Member // who would not be listed
	if limit > 0 && len(list) > limit {
		list = list[:limit]
		if i, ok := r.at[conn]; ok && i >= limit {
			self = r.list[i]
		}
	}
	if len(list)-r.run.n > mostLoose {
		r.run = runOf(list)
	}
	head := r.run
	if self != nil { // it takes the place of the last one
		list = list[:limit-1]
		head.cut(r.list, len(list))
	}
	text := make(wire.Text, 0, len(list)-head.n+4)
	text = append(text, open)
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
	return append(text, end)
}

// What is around a list.
var open, end = []byte(`[`), []byte(`]`)
