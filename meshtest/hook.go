package meshtest

import (
	"github.com/alicebob/miniredis/v2/server"
)

// peer is what the hook knows of a connection. Only the goroutine that serves
// the connection uses it.
type peer struct {
	life   uint64   // Redis.life when it connected
	inside bool     // the hook is running a command of it
	tx     bool     // between MULTI and EXEC
	queued []string // keys that EXEC may give a TTL
}

// blocking lists the commands that may wait for another one, which they must
// not do with the turn. None of them gives a key a TTL.
var blocking = map[string]bool{
	"BLPOP": true, "BRPOP": true, "BRPOPLPUSH": true, "BLMOVE": true, "BLMPOP": true,
	"BZPOPMIN": true, "BZPOPMAX": true, "BZMPOP": true, "XREAD": true, "XREADGROUP": true,
}

// greeting lists the commands of a new connection. A Redis that is loading,
// full, or a replica answers them all the same.
var greeting = map[string]bool{"HELLO": true, "AUTH": true, "SELECT": true, "CLIENT": true}

// hook is called before every command. It runs the command itself: with the
// turn, so that the clock has been moved up to it and stands until it is done.
// It reports whether the command has been dealt with.
func (r *Redis) hook(c *server.Peer, cmd string, args ...string) bool {
	p := r.peer(c)
	if p == nil { // called by a script, which has the turn
		r.index.note(cmd, args, r.index.touch)
		return false
	}
	if p.inside {
		return false
	}
	r.await()
	if blocking[cmd] {
		return false
	}
	r.turn.Lock()
	defer r.turn.Unlock()
	r.move(false)
	switch {
	case r.outlived(p):
		c.Close()
	case r.failure != "" && !greeting[cmd]:
		c.WriteError(r.failure)
	case cmd == "INFO" && !p.tx && r.info(c, args):
	default:
		r.run(p, c, cmd, args)
	}
	return true
}

// run has miniredis execute the command, and tells the index. r.turn is held.
func (r *Redis) run(p *peer, c *server.Peer, cmd string, args []string) {
	p.inside = true
	r.srv.Dispatch(c, append([]string{cmd}, args...))
	p.inside = false

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

// peer returns what is known of the connection; nil for the stand-in through
// which a script calls commands. That one comes with a context from its
// script, whereas a connection gets its context from its first command.
func (r *Redis) peer(c *server.Peer) *peer {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.peers[c]
	if ok || c.Ctx != nil {
		return p
	}
	p = &peer{life: r.life}
	r.peers[c] = p
	c.OnDisconnect(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.peers, c)
	})
	return p
}

// await waits while the Redis hangs. Close and Restart end it too.
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

// outlived reports whether the connection is one of a Redis that has been
// closed or restarted.
func (r *Redis) outlived(p *peer) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed || p.life != r.life
}
