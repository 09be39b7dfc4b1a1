package meshtest

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/alicebob/miniredis/v2/server"
)

const (
	eventsParam = "notify-keyspace-events"
	// eventClasses are the flags of eventsParam in the order in which Redis prints them.
	// A stands for all of allClasses.
	eventClasses = "g$lshzxetdn"
	allClasses   = "g$lshzxetd"
)

// canonicalEvents returns the flags as CONFIG GET of Redis 7 prints them.
func canonicalEvents(flags string) (string, bool) {
	var set [128]bool
	for _, f := range flags {
		switch {
		case f == 'A':
			for _, c := range allClasses {
				set[c] = true
			}
		case strings.ContainsRune(eventClasses+"KEm", f):
			set[f] = true
		default:
			return "", false
		}
	}
	pick := func(from string) string {
		return strings.Map(func(f rune) rune {
			if set[f] {
				return f
			}
			return -1
		}, from)
	}
	classes := pick(eventClasses)
	if strings.HasPrefix(classes, allClasses) {
		classes = "A"
	}
	return classes + pick("KEm"), true
}

// cmdConfig implements CONFIG for notify-keyspace-events only.
func (r *Redis) cmdConfig(c *server.Peer, _ string, args []string) {
	if len(args) == 0 {
		c.WriteError("ERR wrong number of arguments for 'config' command")
		return
	}
	sub := strings.ToLower(args[0])
	args = args[1:]
	switch {
	case sub == "get" && len(args) > 0:
		r.configGet(c, args)
	case sub == "set" && len(args) >= 2:
		r.configSet(c, args)
	case sub == "resetstat" && len(args) == 0:
		c.WriteOK()
	case sub == "get" || sub == "set" || sub == "resetstat":
		c.WriteError(fmt.Sprintf("ERR wrong number of arguments for 'config|%s' command", sub))
	default:
		c.WriteError(fmt.Sprintf("ERR unknown subcommand '%s'. Try CONFIG HELP.", sub))
	}
}

func (r *Redis) configGet(c *server.Peer, patterns []string) {
	for _, p := range patterns {
		if ok, err := path.Match(strings.ToLower(p), eventsParam); err == nil && ok {
			c.WriteMapLen(1)
			c.WriteBulk(eventsParam)
			c.WriteBulk(r.keyspaceEvents())
			return
		}
	}
	c.WriteMapLen(0)
}

func (r *Redis) configSet(c *server.Peer, args []string) {
	if len(args) != 2 || !strings.EqualFold(args[0], eventsParam) {
		c.WriteError(fmt.Sprintf("ERR Unknown option or number of arguments for CONFIG SET - '%s'", args[0]))
		return
	}
	flags, ok := canonicalEvents(args[1])
	if !ok {
		c.WriteError("ERR CONFIG SET failed (possibly related to argument 'notify-keyspace-events') - " +
			"Invalid event class character. Use 'Ag$lshzxeKEtmdn'.")
		return
	}
	r.mu.Lock()
	r.events = flags
	r.mu.Unlock()
	c.WriteOK()
}

func (r *Redis) keyspaceEvents() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.events
}

// info answers INFO for the sections that miniredis lacks and reports whether it did.
// miniredis answers the other sections.
func (r *Redis) info(c *server.Peer, sections []string) bool {
	var b strings.Builder
	if len(sections) > 1 {
		return false
	}
	section := "default"
	if len(sections) == 1 {
		section = strings.ToLower(sections[0])
	}
	switch section {
	case "server", "default", "all", "everything":
		up := int(time.Since(r.started).Seconds())
		fmt.Fprintf(&b, "# Server\r\nredis_version:7.0.0\r\nredis_mode:standalone\r\nrun_id:%s\r\n", r.RunID())
		fmt.Fprintf(&b, "uptime_in_seconds:%d\r\nuptime_in_days:%d\r\n", up, up/86400)
	case "replication":
		b.WriteString("# Replication\r\nrole:master\r\nconnected_slaves:0\r\n")
	case "memory":
		b.WriteString("# Memory\r\nmaxmemory:0\r\nmaxmemory_policy:noeviction\r\n")
	default:
		return false
	}
	if all := section != "server" && section != "replication" && section != "memory"; all {
		fmt.Fprintf(&b, "\r\n# Clients\r\nconnected_clients:%d\r\n", r.srv.ClientsLen())
		fmt.Fprintf(&b, "\r\n# Stats\r\ntotal_connections_received:%d\r\ntotal_commands_processed:%d\r\n",
			r.srv.TotalConnections(), r.srv.TotalCommands())
	}
	c.WriteBulk(b.String())
	return true
}

// RunID returns the run_id of INFO, which identifies the process of a Redis.
func (r *Redis) RunID() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.runID
}

// NewRunID gives the Redis another run_id and returns it, as if another process with the
// same data answered from now on. Connections stay. See [Redis.CutOnce] and
// [Redis.Restart].
func (r *Redis) NewRunID() string {
	id := newRunID()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.runID = id
	return id
}

func newRunID() string {
	var b [20]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
