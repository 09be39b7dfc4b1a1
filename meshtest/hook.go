package meshtest

import (
	"github.com/alicebob/miniredis/v2/server"
)

// peer is the hook's record of a connection. Only the goroutine that serves the
// connection uses it.
type peer struct {
	restarts    uint64   // Redis.restarts when it connected
	dispatching bool     // the hook is running a command of it
	tx          bool     // between MULTI and EXEC
	queued      []string // keys that may have a TTL after EXEC
}

// blocking lists the commands that may wait for another command, which they must not do
// while they hold cmdMu. None of them gives a key a TTL.
var blocking = map[string]bool{
	"BLPOP": true, "BRPOP": true, "BRPOPLPUSH": true, "BLMOVE": true, "BLMPOP": true,
	"BZPOPMIN": true, "BZPOPMAX": true, "BZMPOP": true, "XREAD": true, "XREADGROUP": true,
}

// greeting lists the commands of a new connection. A Redis that is loading, full, or a
// replica answers them nevertheless.
var greeting = map[string]bool{"HELLO": true, "AUTH": true, "SELECT": true, "CLIENT": true}

// hook is called before every command. It runs the command itself and holds cmdMu, so
// that the clock has been moved before the command and stands still until it is done. The
// result reports whether the command has been handled.
func (r *Redis) hook(c *server.Peer, cmd string, args ...string) bool {
	p := r.peer(c)
	if p == nil { // called by a script, which holds cmdMu
		r.index.note(cmd, args, r.index.touch)
		return false
	}
	if p.dispatching {
		return false
	}
	r.await()
	if blocking[cmd] {
		return false
	}
	r.cmdMu.Lock()
	defer r.cmdMu.Unlock()
	r.move(false)
	switch {
	case r.outdated(p):
		c.Close()
	case r.failure != "" && !greeting[cmd]:
		c.WriteError(r.failure)
	case cmd == "INFO" && !p.tx && r.info(c, args):
	default:
		r.run(p, c, cmd, args)
	}
	return true
}

// run lets miniredis execute the command and updates the index. r.cmdMu is held.
func (r *Redis) run(p *peer, c *server.Peer, cmd string, args []string) {
	p.dispatching = true
	r.srv.Dispatch(c, append([]string{cmd}, args...))
	p.dispatching = false

	touch := r.index.touch
	if p.tx {
		touch = func(key string) { p.queued = append(p.queued, key) }
	}
	r.index.note(cmd, args, touch)
	switch cmd {
	case "MULTI":
		p.tx = true
	case "EXEC", "DISCARD":
		for _, key := range p.queued {
			r.index.touch(key)
		}
		p.tx, p.queued = false, nil
	}
}

// peer returns the record of the connection. It returns nil for the stand-in connection
// through which a script calls commands. That one has a context from its script, but a
// client's connection gets its context with its first command.
func (r *Redis) peer(c *server.Peer) *peer {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.peers[c]
	if ok || c.Ctx != nil {
		return p
	}
	p = &peer{restarts: r.restarts}
	r.peers[c] = p
	c.OnDisconnect(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.peers, c)
	})
	return p
}

// await waits while the Redis hangs. Close and Restart end the wait too.
func (r *Redis) await() {
	for {
		r.mu.Lock()
		hung := r.hung
		r.mu.Unlock()
		if hung == nil {
			return
		}
		<-hung
	}
}

// outdated reports whether the connection was made before the Redis was restarted or
// closed.
func (r *Redis) outdated(p *peer) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed || p.restarts != r.restarts
}
