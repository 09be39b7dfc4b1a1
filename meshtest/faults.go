package meshtest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"

	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
)

// Cut ends all connections, as a reset does, and refuses new ones until [Redis.Heal].
// Commands that have arrived may still run. Their answers are lost.
func (r *Redis) Cut() {
	r.mu.Lock()
	r.cut = true
	r.mu.Unlock()
	r.CutOnce()
}

// CutOnce ends all connections, as a reset does, and lets clients connect again. A
// message that is published before a client has reconnected is lost to it.
func (r *Redis) CutOnce() {
	r.mu.Lock()
	conns := r.connections(nil)
	r.mu.Unlock()
	for _, c := range conns {
		c.abort()
	}
}

// Heal ends the effect of [Redis.Cut].
func (r *Redis) Heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = false
}

// CutClient is [Redis.Cut] for the connections of one client. It simulates a server that
// lost the network to Redis, while other servers still have theirs. The client must come
// from [Redis.Client]. Otherwise CutClient returns an error.
func (r *Redis) CutClient(c *redis.Client) error {
	conns, err := r.setCut(c, true)
	for _, c := range conns {
		c.abort()
	}
	return err
}

// HealClient ends the effect of [Redis.CutClient].
func (r *Redis) HealClient(c *redis.Client) error {
	_, err := r.setCut(c, false)
	return err
}

// setCut marks the link of a client as cut or not and returns its connections.
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

// Hang makes the Redis answer nothing until [Redis.Resume], as a stopped process does.
// Connections stay, new ones are accepted, commands wait and run later, and expired
// events come late.
func (r *Redis) Hang() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hung == nil && !r.closed {
		r.hung = make(chan struct{})
	}
}

// Resume ends the effect of [Redis.Hang].
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

// SetError makes every command fail with the given message. The message begins with the
// code: "LOADING Redis is loading the dataset in memory", "READONLY …". Blocking
// commands, commands that scripts call, and the first commands of a connection (HELLO,
// AUTH, SELECT, CLIENT) do not fail. An empty message ends it.
func (r *Redis) SetError(message string) {
	r.cmdMu.Lock()
	defer r.cmdMu.Unlock()
	r.failure = message
}

// FlushAll deletes everything, as FLUSHALL does, without any event.
func (r *Redis) FlushAll() {
	r.cmdMu.Lock()
	defer r.cmdMu.Unlock()
	r.mini.FlushAll()
}

// Restart gives the Redis the state of a new process without saved data. It is empty, no
// script is loaded, notify-keyspace-events is as at the start, and the run_id is another
// one. It answers (see [Redis.Hang]) and has no connections. No command that came over an
// older connection runs any more. After [Redis.Cut] it still refuses connections. The
// error is [ErrClosed] if the Redis has been closed.
func (r *Redis) Restart() error {
	r.cmdMu.Lock()
	defer r.cmdMu.Unlock()
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return ErrClosed
	}
	r.restarts++
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

// do runs a command as if it came over a connection. r.cmdMu is held.
func (r *Redis) do(args ...string) error {
	var reply bytes.Buffer
	c := server.NewPeer(bufio.NewWriter(&reply))
	r.mu.Lock()
	r.peers[c] = &peer{dispatching: true, restarts: r.restarts}
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
