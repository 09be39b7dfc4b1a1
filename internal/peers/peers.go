// Package peers lets the servers of a group talk to each other. Each server listens on a
// channel of its own in Redis. Its peers send it these messages there:
//
//	meta <conn> <version> <json>   the metadata of a connection has changed elsewhere
//	call {…}                       do something with a connection or a room, and answer
//	done {…}                       the answer to a call
//	send {…}                       deliver a frame to a connection, or to a room's members
//
// Channels lose messages. So a call is repeated until it is answered, and changes nothing
// the second time. Metadata are read again after every gap. Frames are delivered at most
// once.
package peers

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
)

const (
	wordMetadata = "meta"
	wordCall     = "call"
	wordDone     = "done"
	wordSend     = "send"
)

// Config configures Peers. All fields are required.
type Config struct {
	// Life ends when the server has stopped.
	Life context.Context
	// Incarnation returns that of this server, and Channel the channel of a server.
	Incarnation func() string
	Channel     func(incarnation string) string
	Publish     func(ctx context.Context, channel, payload string) (heard int64, err error)
	// Owners returns the incarnations that have entries of a room, and Servers all that
	// are alive.
	Owners  func(ctx context.Context, room string) ([]string, error)
	Servers func(ctx context.Context) ([]string, error)
	// Execute carries out a call on this server. A call that was carried out before must
	// change nothing.
	Execute func(ctx context.Context, call Call) (Result, error)
	// SetMetadata takes in the metadata of a connection of this server. It must not block.
	SetMetadata func(conn string, version uint64, data []byte)
	// Deliver delivers a frame to sockets of this server. It must not block.
	Deliver func(f Frame)
	// ToError turns an error of Publish, Owners or Servers, or of the context of a call,
	// into one for the app.
	ToError func(ctx context.Context, err error) error
}

// Peers sends messages to the other servers, and handles theirs. It is safe for
// concurrent use.
type Peers struct {
	cfg   Config
	slots chan struct{}  // places for calls that are carried out here
	work  sync.WaitGroup // calls that are carried out here

	mu      sync.Mutex // guards the fields below
	stopped bool
	waiting map[string]chan answer // by call id
	seen    map[string]*recentCall // recent calls of others, by id
	order   []*recentCall          // the same, oldest first
}

// New returns Peers that need no start.
func New(cfg Config) *Peers {
	return &Peers{
		cfg: cfg, slots: make(chan struct{}, callsAtOnce),
		waiting: make(map[string]chan answer), seen: make(map[string]*recentCall),
	}
}

// HandleMessage handles a message of this server's channel. It does not block.
func (p *Peers) HandleMessage(payload string) {
	word, rest, _ := strings.Cut(payload, " ")
	switch word {
	case wordMetadata:
		p.handleMetadata(rest)
	case wordCall:
		p.handleCall(rest)
	case wordDone:
		p.handleAnswer(rest)
	case wordSend:
		if f, ok := readFrame(rest); ok {
			p.cfg.Deliver(f)
		}
	}
}

func (p *Peers) handleMetadata(rest string) {
	f := strings.SplitN(rest, " ", 3)
	if len(f) != 3 {
		return
	}
	version, err := strconv.ParseUint(f[1], 10, 64)
	if err != nil {
		return
	}
	var data []byte
	if f[2] != "" {
		data = []byte(f[2])
	}
	p.cfg.SetMetadata(f[0], version, data)
}

// Send passes a frame to another incarnation, or delivers it here.
func (p *Peers) Send(ctx context.Context, incarnation string, f Frame) error {
	body, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("mesh: frame: %w", err)
	}
	if incarnation == p.cfg.Incarnation() {
		if f, ok := readFrame(string(body)); ok { // as another server reads it
			p.cfg.Deliver(f)
		}
		return nil
	}
	_, err = p.cfg.Publish(ctx, p.cfg.Channel(incarnation), wordSend+" "+string(body))
	return p.cfg.ToError(ctx, err)
}

// Stop refuses further calls of others, and waits for those that are carried out here.
func (p *Peers) Stop() {
	p.mu.Lock()
	p.stopped = true
	p.mu.Unlock()
	p.Wait()
}

// Wait waits for the calls that are carried out here.
func (p *Peers) Wait() { p.work.Wait() }
