package redistest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Shards returns the number of shards.
func (c *Cluster) Shards() int { return shards }

// pair returns the two nodes of a shard.
func (c *Cluster) pair(shard int) [2]*Server {
	return [2]*Server{c.nodes[shard], c.nodes[shards+shard]}
}

// Master returns the running master of a shard, or nil if there is none.
func (c *Cluster) Master(shard int) *Server { return c.find(shard, "master") }

// Replica returns the running replica of a shard, or nil if there is none.
func (c *Cluster) Replica(shard int) *Server { return c.find(shard, "slave") }

func (c *Cluster) find(shard int, role string) *Server {
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	for _, s := range c.pair(shard) {
		if c.at(s.Addr()) == nil {
			continue
		}
		is, err := c.admin(s).Do(ctx, "role").Slice()
		if err == nil && len(is) > 0 && is[0] == role {
			return s
		}
	}
	return nil
}

// SlotOf returns the hash slot of a key.
func (c *Cluster) SlotOf(key string) int {
	c.t.Helper()
	return int(c.do(c.running()[0], "cluster", "keyslot", key).(int64))
}

// Owner returns the shard that serves a slot.
func (c *Cluster) Owner(slot int) int {
	c.t.Helper()
	owner := -1
	c.await(fmt.Sprintf("owner of slot %d", slot), func() error {
		ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
		defer cancel()
		//lint:ignore SA1019 the newer command lists dead nodes too, and not the master first
		all, err := c.admin(c.running()[0]).ClusterSlots(ctx).Result()
		if err != nil {
			return err
		}
		for _, r := range all {
			if r.Start > slot || r.End < slot || len(r.Nodes) == 0 {
				continue
			}
			for i := range shards {
				for _, s := range c.pair(i) {
					if s.Addr() == r.Nodes[0].Addr {
						owner = i
						return nil
					}
				}
			}
		}
		return errors.New("no shard serves it")
	})
	return owner
}

// Move is the move of a slot to another shard while it is in use. The old shard serves
// the keys that have not been moved yet, and the new one serves the moved keys. Neither
// runs a script that needs keys of both, or a key that does not exist.
type Move struct {
	c        *Cluster
	slot     int
	from, to *Server
}

// BeginMove begins to move a slot. It moves no keys.
func (c *Cluster) BeginMove(slot, shard int) *Move {
	c.t.Helper()
	m := &Move{c: c, slot: slot, from: c.Master(c.Owner(slot)), to: c.Master(shard)}
	if m.from == nil || m.to == nil || m.from == m.to {
		c.t.Fatalf("redistest: slot %d cannot be moved to shard %d", slot, shard)
	}
	c.do(m.to, "cluster", "setslot", slot, "importing", c.do(m.from, "cluster", "myid"))
	c.do(m.from, "cluster", "setslot", slot, "migrating", c.do(m.to, "cluster", "myid"))
	return m
}

// Keys moves at most n keys, and returns their number.
func (m *Move) Keys(n int) int {
	m.c.t.Helper()
	keys := m.c.do(m.from, "cluster", "getkeysinslot", m.slot, n).([]any)
	if len(keys) == 0 {
		return 0
	}
	args := []any{"migrate", "127.0.0.1", m.to.port, "", 0, 5000, "keys"}
	m.c.do(m.from, append(args, keys...)...)
	return len(keys)
}

// Finish moves the remaining keys and tells every master.
func (m *Move) Finish() {
	m.c.t.Helper()
	for moved := m.Keys(32); moved > 0; moved = m.Keys(32) {
		continue
	}
	id := m.c.do(m.to, "cluster", "myid")
	m.c.do(m.to, "cluster", "setslot", m.slot, "node", id)
	m.c.do(m.from, "cluster", "setslot", m.slot, "node", id)
	for i := range shards {
		if s := m.c.Master(i); s != nil && s != m.to && s != m.from {
			m.c.do(s, "cluster", "setslot", m.slot, "node", id)
		}
	}
}

// MoveSlot moves a slot to a shard while it is in use.
func (c *Cluster) MoveSlot(slot, shard int) {
	c.t.Helper()
	c.BeginMove(slot, shard).Finish()
}

// Replicate waits until a shard's replica has all current data of its master, so that it
// survives the master.
func (c *Cluster) Replicate(shard int) {
	c.t.Helper()
	offset := func(s *Server, field int) (int64, error) {
		ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
		defer cancel()
		role, err := c.admin(s).Do(ctx, "role").Slice()
		if err != nil || len(role) <= field {
			return 0, fmt.Errorf("role %v: %w", role, err)
		}
		n, _ := role[field].(int64)
		return n, nil
	}
	master, replica := c.Master(shard), c.Replica(shard)
	if master == nil || replica == nil {
		c.t.Fatalf("redistest: shard %d is not complete", shard)
	}
	stands, err := offset(master, 1)
	if err != nil {
		c.t.Fatalf("redistest: master of shard %d: %v", shard, err)
	}
	c.await(fmt.Sprintf("replication of shard %d", shard), func() error {
		has, err := offset(replica, 4)
		if err == nil && has < stands {
			err = fmt.Errorf("at %d of %d", has, stands)
		}
		return err
	})
}

// KillMaster kills the master of a shard, and returns it.
func (c *Cluster) KillMaster(shard int) *Server {
	c.t.Helper()
	s := c.Master(shard)
	if s == nil {
		c.t.Fatalf("redistest: shard %d has no master", shard)
	}
	s.Kill()
	return s
}

// WaitForFailover waits until a shard has a master again, all running nodes know it, and
// all slots are served.
func (c *Cluster) WaitForFailover(shard int) {
	c.t.Helper()
	c.await(fmt.Sprintf("new master of shard %d", shard), func() error {
		if c.Master(shard) == nil {
			return errors.New("there is none")
		}
		return nil
	})
	c.AwaitStable()
}

// Restart starts the stopped nodes of a shard again, empty, as replicas of the present
// master, and waits until they have caught up.
func (c *Cluster) Restart(shard int) {
	c.t.Helper()
	for _, s := range c.pair(shard) {
		if c.at(s.Addr()) == nil {
			s.Restart(false)
		}
	}
	c.await(fmt.Sprintf("replica of shard %d", shard), func() error {
		if c.Replica(shard) == nil {
			return errors.New("there is none")
		}
		return nil
	})
	c.AwaitStable()
}

// Detach stops a shard's replica from following its master, until its master is gone.
// Data that is written from now on is lost with the master.
func (c *Cluster) Detach(shard int) {
	c.t.Helper()
	s := c.Replica(shard)
	if s == nil {
		c.t.Fatalf("redistest: shard %d has no replica", shard)
	}
	// The master has no password and therefore refuses one.
	c.do(s, "config", "set", "masterauth", "detached")
	c.do(s, "client", "kill", "type", "master")
	c.await("replica that lags", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
		defer cancel()
		role, err := c.admin(s).Do(ctx, "role").Slice()
		if err == nil && len(role) > 3 && role[3] == "connected" {
			err = errors.New("it follows")
		}
		return err
	})
}

// Attach ends the effect of Detach, whatever role the node has now.
func (c *Cluster) Attach(shard int) {
	c.t.Helper()
	for _, s := range c.pair(shard) {
		if c.at(s.Addr()) != nil {
			c.do(s, "config", "set", "masterauth", "")
		}
	}
}

// EachMaster runs do with a client of each master. Any test may call it, even if another
// test started the cluster.
func (c *Cluster) EachMaster(t testing.TB, do func(shard int, admin *redis.Client)) {
	t.Helper()
	for i := range shards {
		s := c.Master(i)
		if s == nil {
			t.Fatalf("redistest: shard %d has no master", i)
		}
		do(i, c.admin(s))
	}
}

// Failing is about the longest time from the death of a master to the promotion of its
// replica. In that time the nodes notice the silence and tell each other, and the replica
// asks for votes after its own pause of up to a second.
const Failing = NodeTimeout + NodeTimeout/2 + 2*time.Second

// Failover makes a shard's replica the master, without a loss of data. The shard is
// unavailable only for a moment.
func (c *Cluster) Failover(shard int) {
	c.t.Helper()
	next := c.Replica(shard)
	if next == nil {
		c.t.Fatalf("redistest: shard %d has no replica", shard)
	}
	c.do(next, "cluster", "failover")
	c.await(fmt.Sprintf("other master of shard %d", shard), func() error {
		if c.Master(shard) != next || c.Replica(shard) == nil {
			return errors.New("it is the same")
		}
		return nil
	})
	c.AwaitStable()
}

// EachNode runs do with a client of each running node, replicas included.
func (c *Cluster) EachNode(do func(addr string, admin *redis.Client)) {
	for _, s := range c.running() {
		do(s.Addr(), c.admin(s))
	}
}
