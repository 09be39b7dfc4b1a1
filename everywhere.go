package mesh

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/meshpresence/mesh/internal/store"
)

// everywhere carries out a call about a room on all servers, see onServers.
func (n *node) everywhere(ctx context.Context, call remoteCall) error {
	return n.onServers(ctx, call.Room, func(inc string) error {
		_, err := n.control.call(ctx, func(context.Context) (string, error) { return inc, nil }, call)
		return err
	})
}

// onServers does something for every server that a room may concern: this one,
// those that hold entries of the room, and all others that live, since they may
// have subscribers of it or joins that wait. It returns what failed; the others
// have carried it out.
func (n *node) onServers(ctx context.Context, room string, do func(inc string) error) error {
	var (
		homes           []string
		living          []store.Instance
		noHomes, noList error
		reads           sync.WaitGroup
	)
	reads.Go(func() { homes, noHomes = n.store.Homes(ctx, room) })
	reads.Go(func() { living, _, noList = n.store.Instances(ctx, maxServers) })
	reads.Wait()
	if ctx.Err() != nil {
		return contextError(ctx) // the caller does not want it any more
	}
	servers := append([]string{n.lease.Incarnation()}, homes...)
	for _, one := range living {
		if !one.Dead {
			servers = append(servers, one.Incarnation)
		}
	}
	slices.Sort(servers)
	servers = slices.Compact(servers)
	errs := make([]error, len(servers), len(servers)+2)
	var calls sync.WaitGroup
	for i, inc := range servers {
		calls.Go(func() { errs[i] = do(inc) })
	}
	calls.Wait()
	return errors.Join(append(errs, n.errorFor(ctx, noHomes), n.errorFor(ctx, noList))...)
}
