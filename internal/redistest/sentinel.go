package redistest

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	masterName = "mesh"
	replicas   = 2
	sentinels  = 3

	// switchTimeout limits a failover. wholeTimeout limits the time until the other
	// servers follow the new master. A demoted master is told after ten seconds.
	switchTimeout = 60 * time.Second
	wholeTimeout  = 60 * time.Second
	watchInterval = 5 * time.Millisecond
)

// Sentinel is a master with two replicas and three sentinels that watch over them. As
// with Server, its methods are for the test's own goroutine.
type Sentinel struct {
	t         testing.TB
	args      []string  // of every Redis
	nodes     []*Server // the Redis processes, the first master first
	sentinels []*Server
	clients   []*redis.SentinelClient // one each
	killed    *Server                 // nil: none
}

// Switch is one failover.
type Switch struct {
	From, To *Server
	Began    time.Time // when it was requested, or the master was killed
	// Writable is the time at which the new master was seen to be one. Writes to the old
	// one after that time are lost. Announced is the time at which the last sentinel
	// published +switch-master. Before that, a client stays with the old master.
	Writable, Announced time.Time
}

// StartSentinel starts the six processes and waits until they know each other. The
// options are for the Redis processes.
func StartSentinel(t testing.TB, opts ...Option) *Sentinel {
	t.Helper()
	// A full synchronisation would wait five seconds for other replicas.
	opts = append([]Option{Args("--repl-diskless-sync-delay", "0")}, opts...)
	first := Start(t, opts...)
	s := &Sentinel{t: t, args: first.conf.args, nodes: []*Server{first}}
	for range replicas {
		s.nodes = append(s.nodes, Start(t, append(opts, Args(replicaOf(first)...))...))
	}
	// The sentinels learn of replicas from the master, at once and then every ten
	// seconds.
	s.await(wholeTimeout, "replicas", s.replicated)
	for range sentinels {
		s.sentinels = append(s.sentinels, Start(t, Args("--sentinel"), func(c *config) {
			c.file = fmt.Sprintf("sentinel monitor %[1]s 127.0.0.1 %[2]d 2\n"+
				"sentinel down-after-milliseconds %[1]s 1000\n"+
				"sentinel failover-timeout %[1]s 3000\n"+
				"sentinel parallel-syncs %[1]s 2\n", masterName, first.port)
		}))
	}
	for _, n := range s.sentinels {
		c := redis.NewSentinelClient(&redis.Options{Addr: n.Addr()})
		t.Cleanup(func() { _ = c.Close() }) // the process may have ended already
		s.clients = append(s.clients, c)
	}
	s.AwaitWhole()
	return s
}

func replicaOf(master *Server) []string {
	return []string{"--replicaof", "127.0.0.1", strconv.Itoa(master.port)}
}

// For returns the same processes for a part of the test. The methods fail that part. If
// it kills a process, it must revive it.
func (s *Sentinel) For(t testing.TB) *Sentinel {
	part := *s
	part.t = t
	return &part
}

// MasterName is the name by which the sentinels know the master.
func (s *Sentinel) MasterName() string { return masterName }

// Addrs returns the addresses of the sentinels.
func (s *Sentinel) Addrs() []string {
	list := make([]string, len(s.sentinels))
	for i, n := range s.sentinels {
		list[i] = n.Addr()
	}
	return list
}

// Client returns a new client that follows the master, closed when the test is over.
func (s *Sentinel) Client(t testing.TB) *redis.Client {
	t.Helper()
	return closed(t, redis.NewFailoverClient(&redis.FailoverOptions{MasterName: masterName, SentinelAddrs: s.Addrs()}))
}

// Master returns the server that all sentinels regard as the master, or nil while they
// differ.
func (s *Sentinel) Master() *Server {
	var master *Server
	for i := range s.clients {
		n := s.masterOf(i)
		if n == nil || master != nil && n != master {
			return nil
		}
		master = n
	}
	return master
}

// masterOf returns the master as of the last +switch-master of a sentinel. The answer of
// get-master-addr-by-name is the same, except that the sentinel that leads a failover
// names the new master sooner.
func (s *Sentinel) masterOf(sentinel int) *Server {
	m, err := s.clients[sentinel].Master(s.t.Context(), masterName).Result()
	if err != nil {
		return nil
	}
	for _, n := range s.nodes {
		if n.Addr() == net.JoinHostPort(m["ip"], m["port"]) {
			return n
		}
	}
	return nil
}

// Failover makes the sentinels replace the master, which stays alive, and returns when
// all have announced the new one. The old one accepts writes until it is told, about ten
// seconds later: see AwaitWhole.
func (s *Sentinel) Failover() Switch {
	s.t.Helper()
	from := s.present()
	var err error
	began := time.Now()
	s.await(switchTimeout, "a failover to begin", func() error {
		began = time.Now()
		err = s.clients[0].Failover(s.t.Context(), masterName).Err() // may be too soon after another one
		return err
	})
	return s.follow(from, began)
}

// KillMaster kills the master and returns when all sentinels have announced another one.
func (s *Sentinel) KillMaster() Switch {
	s.t.Helper()
	from := s.present()
	began := time.Now()
	from.Kill()
	s.killed = from
	return s.follow(from, began)
}

// Revive starts the master that KillMaster killed again, empty and as a replica, and
// waits until it is one.
func (s *Sentinel) Revive() {
	s.t.Helper()
	if s.killed == nil {
		s.t.Fatal("redistest: no master was killed")
	}
	s.killed.conf.args = append(append([]string(nil), s.args...), replicaOf(s.present())...)
	s.killed.Restart(true)
	s.killed = nil
	s.AwaitWhole()
}

// present returns the master, which must be known.
func (s *Sentinel) present() *Server {
	s.t.Helper()
	master := s.Master()
	if master == nil {
		s.t.Fatalf("redistest: sentinels differ about the master%s", s.logs())
	}
	return master
}

// follow waits for the end of a failover.
func (s *Sentinel) follow(from *Server, began time.Time) Switch {
	s.t.Helper()
	sw := Switch{From: from, Began: began}
	s.await(switchTimeout, "a new master", func() error {
		if sw.Writable.IsZero() {
			for _, n := range s.nodes {
				if n != from && role(s.t.Context(), n) == "master" {
					sw.To, sw.Writable = n, time.Now()
				}
			}
		}
		if to := s.Master(); to == nil || to != sw.To {
			return fmt.Errorf("sentinels do not agree on %v", sw.To)
		}
		sw.Announced = time.Now()
		return nil
	})
	return sw
}

// AwaitWhole waits until every running server has the role that the sentinels expect: the
// replicas follow the master and hold its data.
func (s *Sentinel) AwaitWhole() {
	s.t.Helper()
	s.await(wholeTimeout, "the topology to be whole", func() error {
		if err := s.replicated(); err != nil {
			return err
		}
		for i, c := range s.clients {
			m, err := c.Master(s.t.Context(), masterName).Result()
			if err != nil {
				return err
			}
			if m["flags"] != "master" || m["num-slaves"] != strconv.Itoa(replicas) || m["num-other-sentinels"] != strconv.Itoa(sentinels-1) {
				return fmt.Errorf("sentinel %d: %s master, %s replicas, %s other sentinels", i, m["flags"], m["num-slaves"], m["num-other-sentinels"])
			}
			list, err := c.Replicas(s.t.Context(), masterName).Result()
			if err != nil {
				return err
			}
			for _, r := range list {
				// A sentinel that has not yet seen a demoted master as a replica still
				// expects to demote it. It would undo the next failover if that promotes
				// the same server.
				dead := s.killed != nil && r["port"] == strconv.Itoa(s.killed.port)
				if !dead && (r["flags"] != "slave" || r["role-reported"] != "slave") {
					return fmt.Errorf("sentinel %d: replica %s is %s, and says %s", i, r["name"], r["flags"], r["role-reported"])
				}
			}
		}
		return nil
	})
}

// replicated returns nil if every running server follows the master.
func (s *Sentinel) replicated() error {
	master := s.nodes[0] // as long as there are no sentinels to ask
	if len(s.clients) > 0 {
		if master = s.Master(); master == nil {
			return fmt.Errorf("sentinels differ about the master")
		}
	}
	want := replicas
	if s.killed != nil {
		want--
	}
	info, err := ask(s.t.Context(), master, "INFO", "replication")
	if err != nil {
		return err
	}
	text, _ := info.(string)
	if got := strings.Count(text, "state=online"); got != want {
		return fmt.Errorf("%d of %d replicas follow the master %s", got, want, master.Addr())
	}
	return nil
}

// role returns the role that a server reports, or "" if it does not answer.
func role(ctx context.Context, n *Server) string {
	v, _ := ask(ctx, n, "ROLE")
	if list, ok := v.([]any); ok && len(list) > 0 {
		name, _ := list[0].(string)
		return name
	}
	return ""
}

// ask sends one command over a connection of its own, because a server drops its
// connections when it gets a new role.
func ask(ctx context.Context, n *Server, args ...any) (any, error) {
	c := redis.NewClient(&redis.Options{Addr: n.Addr(), MaxRetries: -1, DialerRetries: 1, DialTimeout: probeTimeout, ReadTimeout: probeTimeout})
	defer func() { _ = c.Close() }()
	return c.Do(ctx, args...).Result()
}

// await waits until ok returns nil. Otherwise it fails the test, with the end of every
// log.
//
//nolint:unparam // the limits mean different things
func (s *Sentinel) await(within time.Duration, what string, ok func() error) {
	s.t.Helper()
	for began := time.Now(); ; time.Sleep(watchInterval) {
		err := ok()
		if err == nil {
			return
		}
		if time.Since(began) > within {
			s.t.Fatalf("redistest: waited %v for %s: %v%s", within, what, err, s.logs())
		}
	}
}

// logs returns the end of the log of every process.
func (s *Sentinel) logs() string {
	var b strings.Builder
	for i, n := range s.nodes {
		fmt.Fprintf(&b, "\nredis %d, %s: %s", i, n.Addr(), n.log())
	}
	for i, n := range s.sentinels {
		fmt.Fprintf(&b, "\nsentinel %d, %s: %s", i, n.Addr(), n.log())
	}
	return b.String()
}
