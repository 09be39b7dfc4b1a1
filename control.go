package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/wire"
)

// What servers say to each other, each on the other's control channel:
//
//	meta <conn> <version> <json>   a connection's metadata has been changed elsewhere
//	call {…}                       do something with a connection or room of yours, and answer
//	done {…}                       the answer
//	send {…}                       pass a frame on to a connection, or to a room's members, of yours
//
// beside the beats that a server sends to itself. Channels lose messages: calls
// are repeated until answered and change nothing the second time; metadata is
// read again after every gap; frames are delivered at most once.
const (
	wordMeta = "meta"
	wordCall = "call"
	wordDone = "done"
	wordSend = "send"
)

// remoteFrame is a frame to be passed on: to Conn, or to all in Room.
type remoteFrame struct {
	Conn    string          `json:"conn,omitempty"`
	Room    string          `json:"room,omitempty"`
	Command string          `json:"command"`
	Payload json.RawMessage `json:"payload"`
}

// control speaks with the other servers.
type control struct {
	n     *node
	slots chan struct{}
	work  sync.WaitGroup // calls that are carried out here

	mu      sync.Mutex // guards the fields below
	stopped bool
	waiting map[string]chan remoteAnswer // by call id
	seen    map[string]*seenCall         // calls that came in lately, by id
	order   []*seenCall                  // the same, oldest first

	// sockets delivers frames to local sockets; nil without a Server.
	sockets func(conn string, f *wire.Frame) bool
	closer  func(conn string) bool
}

func newControl(n *node) *control {
	return &control{
		n: n, slots: make(chan struct{}, callsAtOnce),
		waiting: make(map[string]chan remoteAnswer), seen: make(map[string]*seenCall),
	}
}

// message takes one message of this server's channel. It runs on the
// listener's goroutine and does not block.
func (c *control) message(payload string) {
	if lease.IsBeat(payload) {
		c.n.lease.Heard(payload)
		return
	}
	word, rest, _ := strings.Cut(payload, " ")
	switch word {
	case wordMeta:
		c.meta(rest)
	case wordCall:
		c.called(rest)
	case wordDone:
		c.answered(rest)
	case wordSend:
		c.frame(rest)
	}
}

func (c *control) meta(rest string) {
	f := strings.SplitN(rest, " ", 3)
	if len(f) != 3 {
		return
	}
	version, err := strconv.ParseUint(f[1], 10, 64)
	if err != nil {
		return
	}
	if conn, ok := c.n.owner.Conn(f[0]); ok {
		var data []byte
		if f[2] != "" {
			data = []byte(f[2])
		}
		conn.SetMeta(version, data)
	}
}

// send passes a frame to another incarnation, or delivers it here.
func (c *control) send(ctx context.Context, inc string, f remoteFrame) error {
	body, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("mesh: frame: %w", err)
	}
	if inc == c.n.lease.Incarnation() {
		c.frame(string(body))
		return nil
	}
	_, err = c.n.store.Publish(ctx, c.n.keys.Control(inc), wordSend+" "+string(body))
	return c.n.errorFor(ctx, err)
}

// frame delivers a frame to sockets of this server.
func (c *control) frame(rest string) {
	rf, ok := readFrame(rest)
	if c.sockets == nil || !ok {
		return
	}
	f, err := wire.Push(rf.Command, wire.Raw(rf.Payload))
	if err != nil {
		return
	}
	if rf.Room == "" {
		c.sockets(rf.Conn, f)
		return
	}
	for _, conn := range c.n.owner.InRoom(rf.Room) {
		c.sockets(conn.ID(), f)
	}
}

// stop waits for the calls that are carried out here.
func (c *control) stop() {
	c.mu.Lock()
	c.stopped = true
	c.mu.Unlock()
	c.work.Wait()
}
