package meshtest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"

	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
)

// Cut ends all connections, as a reset does, and refuses new ones until
// [Redis.Heal]. Commands that have arrived may still run; nobody gets their
// answers.
func (r *Redis) Cut() {
	r.mu.Lock()
	r.cut = true
	r.mu.Unlock()
	r.CutOnce()
}

// CutOnce ends all connections, as a reset does, and lets clients connect
// again. What is published before they have done so is lost to them.
func (r *Redis) CutOnce() {
	r.mu.Lock()
	conns := r.connections(nil)
	r.mu.Unlock()
	for _, c := range conns {
		c.abort()
	}
}

// Heal ends what [Redis.Cut] began.
func (r *Redis) Heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = false
}

// CutClient is [Redis.Cut] for the connections of one client: what a server
// sees that lost the network to its Redis, while the others have theirs. The
// client must be one that [Redis.Client] returned; an error says that it is not.
func (r *Redis) CutClient(c *redis.Client) error {
	conns, err := r.setCut(c, true)
	for _, c := range conns {
		c.abort()
	}
	return err
}

// HealClient ends what [Redis.CutClient] began.
func (r *Redis) HealClient(c *redis.Client) error {
	_, err := r.setCut(c, false)
	return err
}

// setCut marks a client's link and returns what is connected over it.
func (r *Redis) setCut(c *redis.Client, cut bool) ([]*memConn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l, ok := r.clients[c]
	if !ok {
		return nil, errors.New("meshtest: not a client that Redis.Client has returned")
	}
	l.cut = cut
	return r.connections(l), nil
}

// Hang makes the Redis answer nothing until [Redis.Resume], as a stopped
// process does: connections stay, new ones are accepted, commands wait and run
// later, expired events come late.
func (r *Redis) Hang() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hung == nil && !r.closed {
		r.hung = make(chan struct{})
	}
}

// Resume ends what [Redis.Hang] began.
func (r *Redis) Resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resume()
}

// resume lets waiting commands go on. r.mu is held.
func (r *Redis) resume() {
	if r.hung != nil {
		close(r.hung)
		r.hung = nil
	}
}

// SetError makes every command fail with that message, which begins with the
// code: "LOADING Redis is loading the dataset in memory", "READONLY …". Blocking
// commands, those called by scripts, and those with which a connection begins
// (HELLO, AUTH, SELECT, CLIENT) are left alone. "" ends it.
func (r *Redis) SetError(message string) {
	r.turn.Lock()
	defer r.turn.Unlock()
	r.failure = message
}

// FlushAll deletes everything, as FLUSHALL does. No event tells of it.
func (r *Redis) FlushAll() {
	r.turn.Lock()
	defer r.turn.Unlock()
	r.mini.FlushAll()
}

// Restart makes the Redis what a new process without saved data is: empty,
// with no script loaded, notify-keyspace-events as at the start, another
// run_id, answering (see [Redis.Hang]), and nobody connected. Nothing that came
// over an older connection runs any more. After [Redis.Cut] it still refuses
// connections. An error is [ErrClosed].
func (r *Redis) Restart() error {
	r.turn.Lock()
	defer r.turn.Unlock()
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return ErrClosed
	}
	r.life++
	r.events = r.cfg.events
	r.runID = newRunID()
	conns := r.connections(nil)
	r.resume()
	r.mu.Unlock()
	for _, c := range conns {
		c.abort()
	}
	r.mini.FlushAll()
	return r.do("SCRIPT", "FLUSH")
}

// do runs a command as if it came over a connection. r.turn is held.
func (r *Redis) do(args ...string) error {
	var reply bytes.Buffer
	c := server.NewPeer(bufio.NewWriter(&reply))
	r.mu.Lock()
	r.peers[c] = &peer{inside: true, life: r.life}
	r.mu.Unlock()
	r.srv.Dispatch(c, args)
	c.Flush()
	r.mu.Lock()
	delete(r.peers, c)
	r.mu.Unlock()
	if _, err := server.ParseReply(bufio.NewReader(&reply)); err != nil {
		return fmt.Errorf("meshtest: %s: %w", args[0], err)
	}
	return nil
}
