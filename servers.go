package mesh

import (
	"context"
	"time"
)

const (
	// lookLimit bounds a look at the group or its rooms, however many calls of
	// Redis it takes.
	lookLimit = 2 * time.Second
	// maxServers bounds a list of servers.
	maxServers = 1000
	// maxOwnedSizes bounds how many sizes are asked for to count what servers
	// own: on a cluster that is one per server and bucket.
	maxOwnedSizes = 1 << 13
)

// ServerInfo is one server (or bare PresenceManager) of the group that shares a
// Redis and a prefix, as Redis knows it.
type ServerInfo struct {
	// Incarnation is its random id: a new one at every start, and where it was
	// declared dead and goes on.
	Incarnation string
	// Self says that it is the server that was asked.
	Self bool
	// LeaseLeft is how long its lease still runs, by Redis's clock. Zero or
	// less: it ran out that long ago, and no other server has declared it dead
	// yet. Of the dead it is 0.
	LeaseLeft time.Duration
	// LeaseAge is how long ago it renewed the lease, by Redis's clock, where its
	// LeaseTTL is the same as here, as it has to be. Of the dead it is 0.
	LeaseAge time.Duration
	// Dead says that it was declared dead DeadFor ago, and that what it left
	// behind is still being ended.
	Dead    bool
	DeadFor time.Duration
	// Owned is how many entries and connections it holds, or, dead, has left
	// behind; -1: there are too many servers and buckets to count, or not all
	// of Redis answers.
	Owned int
}

// Servers returns the living servers of the group and those among the dead
// whose entries are still being ended, by Redis's clock, at most 1,000 of each:
// the living first, and of each those whose lease ran out, or runs out, first. A
// server that was shut down is neither.
//
// It reads from masters, writes nothing, and takes at most two seconds;
// ErrUnavailable where Redis does not answer. Safe for concurrent use.
func (s *Server) Servers(ctx context.Context) ([]ServerInfo, error) { return s.n.servers(ctx) }

// Servers returns the servers of the group, as Server.Servers does.
func (p *PresenceManager) Servers(ctx context.Context) ([]ServerInfo, error) { return p.n.servers(ctx) }

func (n *node) servers(ctx context.Context) ([]ServerInfo, error) {
	if err := n.usableFor(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	list, now, err := n.store.Instances(ctx, maxServers)
	if err != nil {
		return nil, n.errorFor(ctx, err)
	}
	incs := make([]string, len(list))
	infos := make([]ServerInfo, len(list))
	for i, one := range list {
		incs[i] = one.Incarnation
		info := ServerInfo{Incarnation: one.Incarnation, Self: one.Incarnation == n.lease.Incarnation(), Dead: one.Dead, Owned: -1}
		if left := time.Duration(one.At-now) * time.Millisecond; one.Dead {
			info.DeadFor = -left
		} else {
			info.LeaseLeft, info.LeaseAge = left, n.opts.LeaseTTL-left
		}
		infos[i] = info
	}
	if len(incs)*n.keys.Buckets() > maxOwnedSizes {
		return infos, nil
	}
	sizes, err := n.store.OwnedSizes(ctx, incs)
	if err != nil {
		return infos, nil // one node of a cluster may be away: who lives is known all the same
	}
	for i, size := range sizes {
		infos[i].Owned = int(size)
	}
	return infos, nil
}
